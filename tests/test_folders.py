"""The folders of runs and sweeps: whose they are, locks, damage, lost disks, going on."""

import builtins
import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import re
import resource
import shutil
import signal
import tarfile
from pathlib import Path

import filelock
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import same_bits, small
from programs import program_of, replicas_of, share_programs
from typer.testing import CliRunner

import fedjax_sec
from fedjax_sec import cli, sweeps
from fedjax_sec.core import ConfigError, files
from fedjax_sec.data.sources import _femnist
from fedjax_sec.data.sources._files import store_cache
from fedjax_sec.runs import config, experiment, loading, results, tuning
from fedjax_sec.runs.checkpoints import Checkpoints, Saved
from fedjax_sec.runs.results import LOCK, MARK
from fedjax_sec.sweeps import groups

RUN = small(rounds=6, checkpoint={"every": 2, "keep_params": True})
GRID = {"client.l2": [0.0, 0.1]}


FIGURES = ("figures/accuracy.png", "figures/accuracy.pdf")
PROGRAMS = {}


@pytest.fixture(autouse=True)
def compile_once(monkeypatch):
    """Runs of one structure share a program in this file."""
    share_programs(monkeypatch, PROGRAMS, experiment, groups)


def states(folder):
    """The files that say of which state orbax's folder beside them is, the newest first."""
    checkpoints = folder / "checkpoints"
    return [checkpoints / f"{done}.json" for done in Checkpoints(checkpoints, ()).rounds()]


def parts(state):
    """Every file of a checkpoint."""
    paths = sorted(state.with_name(f"{state.stem}-0").rglob("*"))
    return [state, *(path for path in paths if path.is_file())]


class Stop(Exception):
    """The interruption of a run in a test."""


def stop_at(last):
    def on_evaluation(done, rows):
        if done == last:
            raise Stop

    return on_evaluation


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a finished run of six rounds."""
    out = tmp_path_factory.mktemp("whole") / "out"
    fedjax_sec.run(RUN, out=out)
    return out


@pytest.fixture(scope="module")
def half_finished(tmp_path_factory):
    """The folder of a run that was stopped after round 5: states of rounds 2 and 4."""
    out = tmp_path_factory.mktemp("half") / "out"
    with pytest.raises(Stop):
        fedjax_sec.run(RUN, out=out, on_evaluation=stop_at(5))
    assert [state.name for state in states(out)] == ["4.json", "2.json"]
    return out


@pytest.fixture
def half(half_finished, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(half_finished, tmp_path / "half"))


@pytest.fixture
def done(whole, tmp_path):
    """A copy of the finished run."""
    return Path(shutil.copytree(whole, tmp_path / "done"))


def content(folder):
    """A run's results, whenever and wherever it ran: rows, parameters, final metrics."""
    summary = json.loads((folder / "summary.json").read_text())
    rows = (folder / "metrics.jsonl").read_bytes()
    return rows, np.load(folder / "params.npy").tobytes(), summary["final"], summary["best"]


def refused(*patterns, **options):
    """Runs, and gives the message of the refusal, which has one line and holds these parts."""
    with pytest.raises(ConfigError) as error:
        fedjax_sec.run(RUN, **options)
    message = str(error.value)
    assert "\n" not in message
    for pattern in patterns:
        assert pattern in message
    return message


HOW = pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}], ids=str)


# --- Whose folder it is -------------------------------------------------------------------------


@HOW
@pytest.mark.parametrize("text", ["chapters: 7\n", config.dump_yaml(RUN), "a: [1"], ids=range(3))
def test_a_configuration_alone_does_not_make_a_folder_ours(text, how, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    (tmp_path / "thesis.tex").write_text("mine")
    message = refused("in use by something else", "not our mark", out=tmp_path, **how)
    assert "--overwrite" not in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "thesis.tex"]
    assert (tmp_path / "config.yaml").read_text() == text


def test_overwriting_removes_our_files_only_and_names_the_rest(done, caplog):
    mine = [done / "thesis.tex", done / "checkpoints" / "6-0" / "x", done / "figures" / "mine.png"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    before = content(done)
    fedjax_sec.run(RUN, out=done, overwrite=True, seed=1)
    assert all(path.read_text() == "mine" for path in mine)
    assert config.load(done / "config.yaml").seed == 1 and content(done)[0] != before[0]
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == (
        f"Not ours, so left in {str(done)!r}: checkpoints/6-0/x, figures/mine.png, thesis.tex."
    )
    assert list((done / "checkpoints" / "6-0").iterdir()) == [mine[1]]
    longer = fedjax_sec.run(RUN, out=done, resume=True, rounds=7, seed=1)
    assert longer.summary["final"]["round"] == 7 and mine[1].exists()


def test_a_sweep_removes_its_own_files_only(tmp_path, caplog):
    cells = sweeps.make_cells(RUN, GRID)

    def on_group(number, total, members):
        def callback(count, rows):
            (group,) = (tmp_path / "groups").iterdir()
            if count == 4:
                (group / "state" / "mine.txt").write_text("mine")

        return callback

    sweeps.run_cells(cells, tmp_path, on_group=on_group)
    (kept,) = [path for path in (tmp_path / "groups").rglob("*") if path.is_file()]
    assert kept.name == "mine.txt" and "mine.txt" in caplog.text
    sweeps.run_cells(cells, tmp_path)  # what was left is in nobody's way


@pytest.mark.parametrize("folder", ["cells", "locks"])
def test_a_sweep_needs_more_than_a_folder_of_that_name(folder, tmp_path):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "biology.txt").write_text("mine")
    with pytest.raises(ConfigError, match="in use by something else"):
        sweeps.run_cells(sweeps.make_cells(RUN, GRID), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [folder]


def test_runs_and_sweeps_do_not_share_a_folder(done, tmp_path):
    with pytest.raises(ConfigError, match="holds a run, not a sweep"):
        sweeps.run_cells(sweeps.make_cells(RUN, GRID), done)
    sweeps.run_cells(sweeps.make_cells(RUN, GRID), tmp_path / "sweep")
    refused("holds a sweep, not a run", out=tmp_path / "sweep", overwrite=True)


def without_mark(folder):
    """Makes a folder look as it did before there were marks and digests."""
    (folder / MARK).unlink()
    (folder / LOCK).unlink()
    for name in ("summary.json", "execution.json"):
        if (folder / name).exists():
            old = json.loads((folder / name).read_text())
            old = {key: value for key, value in old.items() if key not in ("files", "sha256")}
            (folder / name).write_text(json.dumps(old))


def test_an_older_run_goes_on_but_nothing_of_it_is_removed(half, done, whole):
    for folder in (half, done):
        without_mark(folder)
        before = sorted(path.name for path in folder.iterdir())
        message = refused("without our mark, so nothing", out=folder, overwrite=True)
        assert "--overwrite" not in message
        assert "--overwrite" not in refused("--resume to continue", out=folder)
        assert sorted(path.name for path in folder.iterdir()) == before
        fedjax_sec.run(RUN, out=folder, resume=True)
        assert content(folder) == content(whole)


def test_a_folder_begun_before_its_configuration_was_written_is_free(tmp_path, whole):
    for number, how in enumerate(({}, {"resume": True}, {"overwrite": True})):
        out = tmp_path / str(number)
        out.mkdir()
        (out / f".{MARK}.123.tmp").write_text("{")
        (out / LOCK).touch()
        if number:
            results.write_mark(out, "run")
            (out / ".config.yaml.123.tmp").write_text("da")
        fedjax_sec.run(RUN, out=out, **how)
        assert content(out) == content(whole)
        assert not list(out.rglob("*.tmp"))


def test_a_damaged_mark_is_named(done):
    (done / MARK).write_text('{"format": "fedjax_sec", "ki')
    (done / "metrics.jsonl").unlink()
    (done / "summary.json").unlink()
    refused("in use by something else", f"{MARK}' is damaged: it is no JSON", out=done, resume=True)


# --- Locks --------------------------------------------------------------------------------------


def test_a_second_run_in_a_folder_is_refused(half, whole):
    seen = []

    def meanwhile(count, rows):
        before = {path: path.read_bytes() for path in half.rglob("*") if path.is_file()}
        for how in ({"resume": True}, {"overwrite": True}):
            seen.append(refused("another process is running in it", out=half, **how))
        assert before == {path: path.read_bytes() for path in half.rglob("*") if path.is_file()}

    fedjax_sec.run(RUN, out=half, resume=True, on_evaluation=meanwhile)
    assert len(seen) == 4 and content(half) == content(whole)


def test_a_sweeps_cell_is_not_for_run(tmp_path):
    cells = sweeps.make_cells(RUN, GRID)
    cell = tmp_path / "cells" / cells[0].name

    def on_group(number, total, members):
        for how in ({"resume": True}, {"overwrite": True}):
            refused("is one of a sweep's: go on with the sweep's command", out=cell, **how)
        return stop_at(3)

    with pytest.raises(Stop):
        sweeps.run_cells(cells, tmp_path, on_group=on_group)
    refused("is one of a sweep's", out=cell, resume=True)
    outcome = sweeps.run_cells(cells, tmp_path)
    again = fedjax_sec.run(cells[0].experiment, out=cell, resume=True)  # finished: read back
    same_bits(again.metrics["loss"], outcome[0].metrics["loss"])
    refused("is one of a sweep's", out=cell, overwrite=True)


def test_a_run_in_a_cells_place_is_not_for_the_sweep(tmp_path):
    cells = sweeps.make_cells(RUN, GRID)
    with pytest.raises(Stop):
        fedjax_sec.run(
            cells[0].experiment, out=tmp_path / "cells" / cells[0].name, on_evaluation=stop_at(3)
        )
    (tmp_path / "locks").mkdir()
    with pytest.raises(ConfigError, match="holds a run that is not the sweep's"):
        sweeps.run_cells(cells, tmp_path)


def test_locks_that_exclude_nobody_are_reported(tmp_path, monkeypatch, caplog):
    first = files.acquire(tmp_path / "lock")
    assert files.acquire(tmp_path / "lock") is None and not caplog.records
    first.release()

    class Useless(filelock.SoftFileLock):
        def _acquire(self):
            self._context.lock_file_fd = os.open(self.lock_file, os.O_RDWR | os.O_CREAT)

    monkeypatch.setattr(filelock, "FileLock", Useless)
    files.acquire(tmp_path / "lock").release()
    assert "Locks exclude nobody on the file system of" in caplog.text


# --- Damage -------------------------------------------------------------------------------------


def edit(change):
    """Rewrites the lines of the metrics."""

    def damage(folder):
        path = folder / "metrics.jsonl"
        path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")

    return damage


METRICS = {
    "deleted": (lambda f: (f / "metrics.jsonl").unlink(), "line 1: round 0 is due"),
    "emptied": (lambda f: (f / "metrics.jsonl").write_text(""), "line 1: round 0 is due"),
    "broken": (edit(lambda rows: [rows[0], rows[1][:-9], *rows[2:]]), "line 2 is no JSON"),
    "doubled": (edit(lambda rows: [*rows[:2], *rows[1:]]), "line 3 holds round 1 after round 1"),
    "missing": (edit(lambda rows: [rows[0], *rows[2:]]), "line 2: round 1 is due"),
    "foreign": (edit(lambda rows: [*rows[:2], '{"a": 1}', *rows[2:]]), "line 3 is no row of"),
    "list": (edit(lambda rows: ["[]", *rows[1:]]), "line 1 is no row of metrics"),
    "other metrics": (
        edit(lambda rows: [*rows[:2], '{"round": 2, "loss": 1.0}', *rows[3:]]),
        "line 3 holds other metrics than the rows before it",
    ),
    "a digit": (
        edit(lambda rows: [rows[0], rows[1].replace('"loss": 2', '"loss": 1'), *rows[2:]]),
        "line 2 is not as the run wrote it",
    ),
    "bytes": (lambda f: (f / "metrics.jsonl").write_bytes(b"\xff\xfe\n"), "is no text"),
}


@pytest.mark.parametrize("name", METRICS)
def test_damaged_metrics_are_named(name, half):
    damage, message = METRICS[name]
    damage(half)
    refused(f"{half / 'metrics.jsonl'}'", message, "pass --overwrite", out=half, resume=True)


@pytest.mark.parametrize("name", METRICS)
def test_damaged_metrics_of_a_finished_run_are_named(name, done):
    damage, message = METRICS[name]
    damage(done)
    if name == "a digit":
        message = "metrics.jsonl' is not as the run wrote it"
    refused(message, "pass --overwrite", out=done, resume=True)


def test_damage_after_the_older_state_is_measured_again(half, whole, caplog):
    path = half / "metrics.jsonl"
    rows = path.read_text().splitlines()
    rows[3] = rows[3].replace('"loss": 2', '"loss": 1')  # of round 3
    path.write_text("\n".join(rows) + "\n")
    fedjax_sec.run(RUN, out=half, resume=True)
    assert "line 4 is not as the run wrote it" in caplog.text
    assert "Going on from round 2 instead." in caplog.text
    assert content(half) == content(whole)


def flip(path):
    outcome = bytearray(path.read_bytes())
    outcome[len(outcome) // 2] ^= 16
    path.write_bytes(outcome)


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


DAMAGES = {
    "flip": flip,
    "cut": cut,
    "empty": lambda path: path.write_bytes(b""),
    "foreign": lambda path: path.write_text("the thesis of somebody\n"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_of_a_state_is_named(damage, half_finished, tmp_path):
    shutil.copytree(half_finished / "checkpoints", tmp_path / "checkpoints")
    outcome = Checkpoints(tmp_path / "checkpoints", [config.from_mapping(RUN).to_dict()])
    program = program_of(config.from_mapping(RUN))
    replicas = replicas_of([config.from_mapping(RUN)])
    first = program.init(replicas)
    state = {"params": program.params(first, replicas), "state": first}
    newest, _ = states(tmp_path)
    assert len(parts(newest)) > 6 and outcome.restore(state).done == 4
    for path in parts(newest):
        before = path.read_bytes()
        if before:
            DAMAGES[damage](path)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(ocp, "Checkpointer", None)  # orbax is not asked
                with pytest.raises(ConfigError, match=re.escape(f"'{path}' is ")) as error:
                    outcome.params(4)
            assert "\n" not in str(error.value)
            assert outcome.restore(state).done == 2
        path.write_bytes(before)
    assert outcome.restore(state).done == 4 and outcome.params(4).shape == state["params"].shape


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("part", ["4.json", "_METADATA", "manifest.ocdbt"])
def test_the_older_state_serves_where_the_newest_is_damaged(part, damage, half, whole, caplog):
    (path, *_) = [path for path in parts(states(half)[0]) if path.name == part]
    DAMAGES[damage](path)
    seen = []
    fedjax_sec.run(RUN, out=half, resume=True, on_evaluation=lambda n, rows: seen.append(n))
    assert seen == [3, 4, 5, 6] and content(half) == content(whole)
    assert f"{path}' is damaged" in caplog.text
    assert "Going on from round 2 instead." in caplog.text
    names = {path.name for path in (half / "checkpoints").iterdir()}
    assert {"4.json", "6.json", "6-0"} < names and len(names) == 4


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_intact_state_is_an_error(damage, half):
    for state in states(half):
        DAMAGES[damage](parts(state)[-1])
    message = refused(
        "2-0/",
        "4-0/",
        "No checkpoint is left to go on from",
        "pass --overwrite to begin this run again",
        out=half,
        resume=True,
    )
    assert message.count("is damaged") == 2 and message.index("4-0/") < message.index("2-0/")


def test_a_state_that_orbax_cannot_read_is_damaged(half, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("of no version that I know\nand a trace")

    monkeypatch.setattr(ocp.Checkpointer, "restore", fail)
    refused("4-0' is damaged: of no version that I know.", out=half, resume=True)


def test_states_keep_every_leaf(tmp_path):
    """To the bit and of its type, also without elements, of which orbax knows nothing."""
    state = {
        "params": jnp.arange(6, dtype=jnp.float32).reshape(2, 3) / 7,
        "half": jnp.ones(3, jnp.bfloat16),
        "[0]['a/b']": jnp.array(True),
        "key": jnp.array([[1, 2**32 - 1]], jnp.uint32),
        "none": jnp.zeros((2, 0), jnp.int32),
    }
    outcome = Checkpoints(tmp_path, [config.from_mapping(RUN).to_dict()])
    outcome.save(Saved(3, state, 1.5, [["a"]], [None]))
    saved = outcome.restore(jax.tree.map(jnp.zeros_like, state))
    assert jax.tree.map(lambda leaf: (leaf.dtype, leaf.shape), saved.state) == jax.tree.map(
        lambda leaf: (leaf.dtype, leaf.shape), state
    )
    same_bits(saved.state, state)
    assert (saved.done, saved.elapsed, saved.rows, saved.start) == (3, 1.5, [["a"]], [None])
    for other in ({**state, "more": state["key"]}, {**state, "half": jnp.ones(4, jnp.bfloat16)}):
        with pytest.raises(ConfigError, match="3.json' holds a state of another structure"):
            outcome.restore(other)


def test_without_states_a_run_begins_anew(half, whole, caplog):
    shutil.rmtree(half / "checkpoints")
    fedjax_sec.run(RUN, out=half, resume=True)
    assert content(half) == content(whole) and "beginning anew" in caplog.text


def test_a_state_of_another_run_is_refused(half, tmp_path):
    with pytest.raises(Stop):
        fedjax_sec.run(RUN, out=tmp_path / "other", seed=7, on_evaluation=stop_at(5))
    shutil.rmtree(half / "checkpoints")
    shutil.copytree(tmp_path / "other" / "checkpoints", half / "checkpoints")
    refused("is of another configuration; it differs in seed", out=half, resume=True)


def rewrite(name, change):
    def damage(folder):
        path = folder / name
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: cut(f / "summary.json"), "summary.json' is damaged: it is no JSON"),
        (lambda f: (f / "summary.json").write_text("[]"), "it holds no mapping"),
        (lambda f: (f / "summary.json").write_text('{"a": 1}'), "is no summary of a run"),
        (rewrite("summary.json", lambda s: s | {"final": {"accuracy": 1}}), "is not as it was"),
        (lambda f: flip(f / "params.npy"), "params.npy' is not as the run wrote it"),
        (lambda f: (f / "params.npy").write_text("mine"), "params.npy' is damaged"),
        (lambda f: (f / "config.yaml").unlink(), "config.yaml"),
        (lambda f: (f / "config.yaml").write_text("rounds: six\n"), "config.yaml"),
        (lambda f: (f / "config.yaml").write_text("a: [1"), "not readable YAML"),
        (
            lambda f: (f / "config.yaml").write_text("thesis"),
            "must hold keys and values, got 'thesis'",
        ),
    ],
)
def test_damage_to_a_finished_run_is_named(damage, message, done):
    damage(done)
    with pytest.raises(ConfigError) as error:
        loading.final_params(done)
    assert message in str(error.value) and "\n" not in str(error.value)
    if "params.npy" not in message:
        refused(out=done, resume=True)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text('{"clients": "map", "chunk'),
        lambda path: path.write_text("[]"),
        lambda path: path.write_text('{"a": 1}'),
        lambda path: path.write_text(path.read_text().replace("null", "7", 1)),
    ],
)
def test_a_damaged_execution_file_is_named(damage, half):
    damage(half / "execution.json")
    refused("execution.json' is damaged", "pass --overwrite", out=half, resume=True)


def test_damage_in_a_sweep_is_named_with_a_remedy_that_helps(tmp_path):
    cells = sweeps.make_cells(RUN, GRID)
    whole = sweeps.run_cells(cells, tmp_path / "whole")
    for name in ("members.json", "execution.json", "state/2.json"):
        out = tmp_path / name.partition(".")[0]
        with pytest.raises(Stop):
            sweeps.run_cells(cells, out, on_group=lambda *a: stop_at(3))
        (group,) = (out / "groups").iterdir()
        (group / name).write_text("thesis")
        with pytest.raises(ConfigError, match=f"{Path(name).name}' is damaged.*emove '{group}'"):
            sweeps.run_cells(cells, out)
        shutil.rmtree(group)
        for one, other in zip(whole, sweeps.run_cells(cells, out), strict=True):
            same_bits(one.metrics, other.metrics)
        for cell in cells:
            assert content(out / "cells" / cell.name) == content(
                tmp_path / "whole" / "cells" / cell.name
            )
    (tmp_path / "whole" / "cells" / cells[0].name / "summary.json").write_text("{")
    with pytest.raises(ConfigError, match=r"summary.json' is damaged.* Remove '.*seed0' yourself"):
        sweeps.run_cells(cells, tmp_path / "whole")


# --- What a kill leaves -------------------------------------------------------------------------


def test_figures_that_a_kill_prevented_are_drawn(done):
    for name in FIGURES:
        (done / name).unlink()
    fedjax_sec.run(RUN, out=done, resume=True)
    assert all((done / name).stat().st_size > 1000 for name in FIGURES)


def test_temporary_files_of_dead_processes_are_removed(half):
    names = (
        ".metrics.jsonl.1.tmp",
        ".params.npy.1.tmp",
        "checkpoints/.4.json.1.tmp",
        "figures/.accuracy.pdf.1.tmp",
        ".probe.1.tmp",
    )
    (half / "figures").mkdir()
    for name in (*names, ".thesis.1.tmp"):
        (half / name).write_text("x")
    fedjax_sec.run(RUN, out=half, resume=True)
    assert [path.name for path in half.rglob("*.tmp")] == [".thesis.1.tmp"]


@pytest.mark.parametrize("place", ["3-0", "3-0.orbax-checkpoint-tmp", "4-1"])
def test_arrays_without_their_file_are_removed_by_name(place, half, whole, caplog):
    """Of a kill within orbax or after it; what is not orbax's stays, and is named."""
    theirs = half / "checkpoints" / place
    shutil.copytree(half / "checkpoints" / "4-0", theirs)
    (theirs / "manifest.ocdbt.__lock").touch()
    (theirs / "d" / "thesis.tex").write_text("mine")
    (half / "checkpoints" / "5").mkdir()  # of a version that named them so
    (half / "checkpoints" / "5" / "_METADATA").write_text("older")
    fedjax_sec.run(RUN, out=half, resume=True)
    assert content(half) == content(whole)
    assert [path.name for path in theirs.rglob("*") if path.is_file()] == ["thesis.tex"]
    assert caplog.text.count(f"Not ours, so left in {str(theirs)!r}: d/thesis.tex.") == 1
    assert (half / "checkpoints" / "5" / "_METADATA").read_text() == "older"


def test_nothing_that_orbax_writes_stays(done):
    """Its files are known by name, without the digests of `ROUND.json` too."""
    for state in states(done):
        state.unlink()
    Checkpoints(done / "checkpoints", ()).tidy()
    assert not (done / "checkpoints").exists()


def make_old(path, days):
    path.write_text("x")
    then = path.stat().st_mtime - days * 86400
    os.utime(path, (then, then))


def test_temporary_files_in_caches_are_removed_when_nobody_can_be_writing(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDJAX_SEC_CACHE", str(tmp_path))
    monkeypatch.delenv("FEDJAX_SEC_TUNING")
    monkeypatch.setattr(tuning, "_measurements", {})
    (tmp_path / "tuning").mkdir()
    for folder in (tmp_path, tmp_path / "tuning"):
        make_old(folder / ".a.1.tmp", 2)
        make_old(folder / ".b.1.tmp", 0)
    store_cache(tmp_path / "arrays.npz", {"x": np.zeros(2)})
    tuning.tune([tuning.Choice("vmap"), tuning.Choice("map")], {}, lambda choice: lambda: None)
    for folder in (tmp_path, tmp_path / "tuning"):
        names = {path.name for path in folder.iterdir() if path.suffix == ".tmp"}
        assert names == {".b.1.tmp"}


def test_a_download_replaces_and_removes_nothing_of_the_users(tmp_path, monkeypatch):
    archive = _femnist.Archive("fed_emnist", "", 62, (0, 0))
    mine, whole = tmp_path / "fed_emnist.tar.bz2", True

    def fetch(url, sha256, target):
        with tarfile.open(target, "w:bz2") as tar:
            for split in ("train", "test")[: 1 + whole]:
                member = tarfile.TarInfo(f"fed_emnist_{split}.h5")
                member.size = 5
                tar.addfile(member, io.BytesIO(split.ljust(5).encode()))

    monkeypatch.setattr(_femnist, "fetch", fetch)
    mine.write_text("mine")
    make_old(tmp_path / ".fed_emnist.tar.bz2.1.tmp", 2)
    make_old(tmp_path / ".thesis.1.tmp", 2)
    whole = False
    with pytest.raises(tarfile.TarError, match=r"holds no fed_emnist_test.h5"):
        _femnist._download(archive, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {mine.name, ".thesis.1.tmp"}
    whole = True
    _femnist._download(archive, tmp_path)
    assert (tmp_path / "fed_emnist_test.h5").read_text() == "test "
    assert mine.read_text() == "mine" and len(list(tmp_path.iterdir())) == 4


# --- Errors of the operating system -------------------------------------------------------------


@pytest.fixture
def no_program(monkeypatch):
    """Nothing may be compiled."""

    def fail(*args, **kwargs):
        raise AssertionError("compiled")

    monkeypatch.setattr(experiment, "Program", fail)
    monkeypatch.setattr(groups, "Program", fail)
    monkeypatch.setattr(experiment, "prepare", fail)
    monkeypatch.setattr(groups, "prepare", fail)


def places(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    return {
        "file": (tmp_path / "file", "choose another folder"),
        "below a file": (tmp_path / "file" / "out", "A file has the name of a folder"),
        "link": (tmp_path / "link", "choose another folder"),
        "loop": (tmp_path / "loop", "choose another folder"),
        "long": (tmp_path / ("x" * 300), "Choose a shorter name"),
    }


@pytest.mark.parametrize("place", ["file", "below a file", "link", "loop", "long"])
def test_places_that_cannot_be_a_folder(place, tmp_path, no_program):
    out, part = places(tmp_path)[place]
    message = refused(f"Output folder '{out}'", part, out=out)
    with pytest.raises(ConfigError) as error:
        sweeps.run_cells(sweeps.make_cells(RUN, GRID), out)
    assert str(error.value) == message
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("number", "part"),
    [
        (errno.ENOSPC, "No space left on device. Make room there"),
        (errno.EROFS, "Read-only file system. Choose a folder that you may write to."),
        (errno.EACCES, "Permission denied. Choose a folder that you may write to."),
    ],
)
def test_folders_that_cannot_be_written_to(number, part, tmp_path, no_program, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    refused(f"Output folder '{tmp_path / 'out'}'", part, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_loses_nothing(half, whole, monkeypatch):
    fsync, left = os.fsync, [8]

    def fill(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fill)
    with pytest.raises(OSError, match="No space left") as error:
        fedjax_sec.run(RUN, out=half, resume=True)
    assert str(half) in files.describe(error.value)
    monkeypatch.undo()
    fedjax_sec.run(RUN, out=half, resume=True)
    assert content(half) == content(whole)


def test_a_disk_that_fills_up_while_orbax_writes_is_an_error_of_the_system(tmp_path):
    outcome = Checkpoints(tmp_path, [{}])
    noise = np.random.default_rng(0).random(100_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"'{tmp_path}/1-0' cannot be written: .*arge") as error:
            outcome.save(Saved(1, {"params": noise}, 0.0, [[]], [None]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in files.describe(error.value) and outcome.rounds() == []
    outcome.save(Saved(2, {"params": noise}, 0.0, [[]], [None]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2-0", "2.json"]


@pytest.fixture
def invoke(tmp_path):
    (tmp_path / "run.yaml").write_text(config.dump_yaml(RUN))
    spec = {"experiment": "run.yaml", "grid": GRID}
    (tmp_path / "sweep.yaml").write_text(config.dump_yaml(spec))

    def call(*arguments):
        return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])

    return call


@pytest.mark.parametrize("command", ["run", "sweep", "trigger", "partition"])
def test_the_command_reports_a_place_that_cannot_be_used(command, invoke, tmp_path):
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "out.png"
    done = invoke(
        command, tmp_path / f"{'sweep' if command == 'sweep' else 'run'}.yaml", "--out", out
    )
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit)
    assert "choose another folder" in done.output and "Traceback" not in done.output
    assert done.output.count("\n") == 1


@pytest.fixture
def heard():
    """SIGINT raises `KeyboardInterrupt`, also where the tests were started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("command", ["run", "sweep"])
def test_signals_say_how_to_go_on(command, number, status, invoke, tmp_path, monkeypatch, heard):
    out, append, count = tmp_path / "the out", results.RunFolder.append, [0]

    def interrupted(self, row):
        count[0] += 1
        if count[0] == 9:  # two rows a round in the sweep
            signal.raise_signal(number)
        return append(self, row)

    monkeypatch.setattr(results.RunFolder, "append", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    config_file = tmp_path / f"{command}.yaml"
    rounds = "rounds=9" if command == "run" else "overrides.rounds=9"
    stopped = invoke(command, config_file, rounds, "--out", out)
    assert stopped.exit_code == status and signal.getsignal(signal.SIGTERM) is before
    last = stopped.output.splitlines()[-1]
    resume = " --resume" if command == "run" else ""
    again = f"fedjax-sec {command} {config_file} {rounds} --out '{out}'{resume}"
    assert last == f"Stopped by {number.name}; what is done is kept. To go on: {again}"
    arguments = [command, config_file, rounds, "--out", out, *resume.split()]
    done = invoke(*arguments)
    assert done.exit_code == 0, done.output


def test_keyboard_interrupt_passes_through_from_python(tmp_path):
    def interrupt(count, rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedjax_sec.run(RUN, out=tmp_path / "out", on_evaluation=interrupt)


def test_a_relative_folder_stays_where_it_was(tmp_path, monkeypatch, whole):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()

    def move(count, rows):
        os.chdir(tmp_path / "there")

    monkeypatch.chdir(tmp_path / "here")
    fedjax_sec.run(RUN, out="out", on_evaluation=move)
    assert content(tmp_path / "here" / "out") == content(whole)
    monkeypatch.chdir(tmp_path / "here")
    sweeps.run_cells(sweeps.make_cells(RUN, GRID), "sweep", on_group=lambda *args: move)
    assert len(list((tmp_path / "here" / "sweep" / "cells").iterdir())) == 2
    assert list((tmp_path / "there").iterdir()) == []


# --- Going on: more rounds, another start -------------------------------------------------------


@pytest.mark.parametrize("name", ["done", "half"])
def test_more_rounds_of_the_same_run(name, request, tmp_path):
    folder = request.getfixturevalue(name)
    expected = fedjax_sec.run(RUN, out=tmp_path / "ten", rounds=10)
    seen = []
    result = fedjax_sec.run(
        RUN, out=folder, resume=True, rounds=10, on_evaluation=lambda n, rows: seen.append(n)
    )
    assert seen == ([7, 8, 9, 10] if name == "done" else [5, 6, 7, 8, 9, 10])
    assert content(folder) == content(tmp_path / "ten")
    same_bits(result.metrics, expected.metrics)
    assert config.load(folder / "config.yaml").rounds == 10
    message = refused("holds a run of 10 rounds, got rounds = 6", out=folder, resume=True)
    assert "Give rounds=10" in message


def test_more_rounds_need_a_state_of_an_evaluation(tmp_path):
    every = {**RUN, "evaluation": {"every": 4}}
    fedjax_sec.run(every, out=tmp_path / "a")  # states after 6 only
    before = (tmp_path / "a" / "summary.json").read_bytes()
    with pytest.raises(ConfigError, match=r"no checkpoint at a multiple of evaluation.every = 4"):
        fedjax_sec.run(every, out=tmp_path / "a", resume=True, rounds=8)
    assert (tmp_path / "a" / "summary.json").read_bytes() == before
    every = {**every, "checkpoint": {"every": 1, "keep_params": True}}
    for out, rounds in (("b", 6), ("c", 8)):
        fedjax_sec.run(every, out=tmp_path / out, rounds=rounds)
    fedjax_sec.run(every, out=tmp_path / "b", resume=True, rounds=8)  # from round 4
    assert content(tmp_path / "b") == content(tmp_path / "c")
    with pytest.raises(ConfigError, match="differs in rounds, seed"):
        fedjax_sec.run(every, out=tmp_path / "b", resume=True, rounds=12, seed=1)


def test_start_from_a_finished_run(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(whole.parent)
    started = fedjax_sec.run(RUN, start_from="out", out=tmp_path / "next", seed=3)
    first = started.metrics["loss"][0]
    assert first == fedjax_sec.run(RUN, out=whole, resume=True).metrics["loss"][-1]
    assert first != fedjax_sec.run(RUN, seed=3).metrics["loss"][0]
    parameters = np.load(whole / "params.npy")
    written = json.loads((tmp_path / "next" / "summary.json").read_text())["start_from"]
    digest = hashlib.sha256(parameters.tobytes()).hexdigest()
    assert written == {"run": str(whole), "parameters": digest}
    assert config.load(tmp_path / "next" / "config.yaml").start_from == str(whole)
    with pytest.raises(Stop):
        fedjax_sec.run(
            RUN, start_from=str(whole), out=tmp_path / "cut", seed=3, on_evaluation=stop_at(3)
        )
    fedjax_sec.run(RUN, start_from=str(whole), out=tmp_path / "cut", seed=3, resume=True)
    assert content(tmp_path / "cut") == content(tmp_path / "next")


@pytest.mark.parametrize(
    "changes",
    [
        {"start_from": "done"},
        {"evaluation.evasions": {"name": "transfer", "surrogate": "done", "attack": "fgsm"}},
    ],
)
def test_a_run_that_is_needed_is_not_replaced(changes, done, monkeypatch):
    monkeypatch.chdir(done.parent)
    before = content(done)
    with pytest.raises(ConfigError, match="is needed by this one, so it cannot be replaced"):
        fedjax_sec.run(RUN, out=done, overwrite=True, **changes)
    assert content(done) == before


def test_replicas_of_one_program_may_start_from_different_runs(whole, tmp_path):
    cells = sweeps.make_cells(RUN, {"start_from": {"initial": None, "trained": str(whole)}})
    assert len({cell.experiment.structure() for cell in cells}) == 1
    outcome = sweeps.run_cells(cells, tmp_path)
    alone = [fedjax_sec.run(cell.experiment) for cell in cells]
    for one, other in zip(outcome, alone, strict=True):
        same_bits(one.metrics["loss"][0], other.metrics["loss"][0])
    assert outcome[0].metrics["loss"][0] != outcome[1].metrics["loss"][0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start_from": "nowhere"}, "start_from: Folder '.*nowhere' holds no finished run"),
        ({"model.hidden": [7]}, "has another network: 'mlp' of 460 parameters.* 'mlp' of 535"),
        ({"model": "logistic_regression"}, "has another network: 'mlp' of 460 parameters"),
    ],
)
def test_runs_that_cannot_be_started_from(changes, message, whole):
    with pytest.raises(ConfigError, match=message):
        fedjax_sec.run(RUN, **{"start_from": str(whole)} | changes)


def test_a_run_of_other_inputs_cannot_be_started_from(whole, monkeypatch):
    load = loading.load_source

    def narrower(one):
        source = load(one)
        return source if one.seed == 0 else source._replace(num_classes=9)

    monkeypatch.setattr(loading, "load_source", narrower)
    with pytest.raises(ConfigError, match=r"inputs of shape \(8, 8, 1\) in 10 classes, this .* 9"):
        loading.load_start(config.from_mapping(RUN, {"start_from": str(whole), "seed": 1}))


# --- Kills at every file operation, and damage to every file ------------------------------------


class Killed(BaseException):
    """The end of a process: nothing of it happens afterwards, no clean-up either."""


class Disk:
    """Counts operations on files below a folder, and lets one of them be the process's last."""

    def __init__(self, root, monkeypatch):
        self.root, self.count, self.last, self.dead = str(root), 0, None, False
        for name in ("open", "replace", "rename", "mkdir", "unlink", "remove", "rmdir"):
            monkeypatch.setattr(os, name, self.wrapped(getattr(os, name)))
        opened = builtins.open

        @functools.wraps(opened)
        def write(path, mode="r", *args, **kwargs):
            if isinstance(mode, str) and set(mode) & set("wax+"):
                self.operate(path)
            return opened(path, mode, *args, **kwargs)

        monkeypatch.setattr(builtins, "open", write)
        monkeypatch.setattr(io, "open", write)
        fsync = os.fsync

        def sync(descriptor):
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            try:
                self.operate(path)
            except Killed:  # what was not synchronised may be lost, in part too
                os.ftruncate(descriptor, max(os.fstat(descriptor).st_size - 7, 0))
                raise
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", sync)

    def wrapped(self, function):
        @functools.wraps(function)
        def operation(path, *args, **kwargs):
            self.operate(path)
            return function(path, *args, **kwargs)

        return operation

    def operate(self, path):
        if not isinstance(path, (str, os.PathLike)) or not str(path).startswith(self.root):
            return
        self.count += not self.dead
        self.dead = self.dead or self.count == self.last
        if self.dead:
            raise Killed

    @contextlib.contextmanager
    def dying_at(self, last):
        """Kills at this operation; says whether there was one."""
        self.count, self.last, self.dead = 0, last, False
        with contextlib.suppress(Killed):
            yield
        self.last, self.dead = None, False


def nothing_is_left(folder):
    """Each folder of arrays is one that a state names, and no file is temporary."""
    kept = [str(state.relative_to(folder))[:-5] for state in folder.rglob("checkpoints/*.json")]
    arrays = [str(path.relative_to(folder)) for path in folder.rglob("checkpoints/*/")]
    assert sorted(name.rpartition("-")[0] for name in arrays) == sorted(kept)
    assert not list(folder.rglob("*tmp*"))


SHORT = small(rounds=2, checkpoint={"every": 1, "keep_params": True})


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["new", "more rounds", "overwrite"])
def test_a_kill_at_any_file_operation_loses_nothing(scenario, tmp_path, monkeypatch):
    before, root, changes = tmp_path / "before", tmp_path / "runs", {}
    if scenario != "new":
        fedjax_sec.run(SHORT, out=before)
        changes = {"rounds": 3} if scenario == "more rounds" else {"seed": 1}
    how = {"new": {}, "more rounds": {"resume": True}, "overwrite": {"overwrite": True}}[scenario]
    fedjax_sec.run(SHORT, out=tmp_path / "whole", **changes)
    expected = content(tmp_path / "whole")
    root.mkdir()
    disk, last = Disk(root, monkeypatch), 0
    while True:
        last += 1
        out = root / str(last)
        if scenario != "new":
            shutil.copytree(before, out)
        with disk.dying_at(last):
            fedjax_sec.run(SHORT, out=out, **changes, **how)
        killed = disk.count >= last
        again = {"resume": True}
        if not (out / "config.yaml").exists():  # the three ways to use the folder again
            again = ({}, {"resume": True}, {"overwrite": True})[last % 3]
        elif scenario == "overwrite" and config.load(out / "config.yaml").seed == 0:
            again = {"overwrite": True}
        fedjax_sec.run(SHORT, out=out, **changes, **again)
        assert content(out) == expected, f"after a kill at operation {last}"
        assert all((out / name).stat().st_size > 1000 for name in FIGURES)
        nothing_is_left(out)
        shutil.rmtree(out)
        if not killed:
            break
    assert last > 50  # there were so many operations


@pytest.mark.slow
def test_a_kill_at_any_file_operation_of_a_sweep_loses_nothing(tmp_path, monkeypatch):
    cells, root = sweeps.make_cells(SHORT, GRID), tmp_path / "sweeps"
    sweeps.run_cells(cells, tmp_path / "whole")
    expected = [content(tmp_path / "whole" / "cells" / cell.name) for cell in cells]
    root.mkdir()
    disk, last = Disk(root, monkeypatch), 0
    while True:
        last += 1
        out = root / str(last)
        with disk.dying_at(last):
            sweeps.run_cells(cells, out)
        killed = disk.count >= last
        sweeps.run_cells(cells, out)
        outcome = [content(out / "cells" / cell.name) for cell in cells]
        assert outcome == expected, f"after a kill at operation {last}"
        assert not list((out / "groups").iterdir())
        nothing_is_left(out)
        shutil.rmtree(out)
        if not killed:
            break
    assert last > 50


@pytest.mark.slow
def test_any_damage_gives_the_same_bits_or_one_line(half_finished, whole, tmp_path):
    rng = np.random.default_rng(0)
    outcomes = {"same": 0, "refused": 0}

    def flip_one(path):
        outcome = bytearray(path.read_bytes())
        if outcome:
            outcome[rng.integers(len(outcome))] ^= 1 << rng.integers(8)
        path.write_bytes(outcome)

    def cut_somewhere(path):
        outcome = path.read_bytes()
        path.write_bytes(outcome[: rng.integers(len(outcome) + 1)])

    def double_a_line(path):
        lines = path.read_bytes().splitlines(keepends=True)
        at = rng.integers(len(lines)) if lines else 0
        path.write_bytes(b"".join([*lines[: at + 1], *lines[at:]]))

    damages = [flip_one] * 12 + [cut_somewhere] * 6 + [double_a_line] * 3
    damages += [Path.unlink, DAMAGES["empty"], DAMAGES["foreign"]]
    paths = sorted(path for path in half_finished.rglob("*") if path.is_file())
    arrays = [path for state in states(half_finished) for path in parts(state)[1:]]
    sample = [arrays[i] for i in rng.choice(len(arrays), 6, replace=False)]
    for path in [path for path in paths if path not in arrays] + sample:
        name = path.relative_to(half_finished)
        for damage in damages:
            out = Path(shutil.copytree(half_finished, tmp_path / "out"))
            damage(out / name)
            try:
                fedjax_sec.run(RUN, out=out, resume=True)
            except ConfigError as error:
                assert "\n" not in str(error) and str(out) in str(error), (name, error)
                outcomes["refused"] += 1
            else:
                assert content(out) == content(whole), (name, damage)
                outcomes["same"] += 1
            shutil.rmtree(out)
    assert outcomes["same"] > 30 and outcomes["refused"] > 30, outcomes

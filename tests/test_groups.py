"""A sweep's groups: planned without a device, worked anywhere, collected, surveyed."""

import json
import os
import re
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import filelock
import numpy as np
import pytest
from helpers import same_bits, small
from programs import share_programs
from typer.testing import CliRunner

import fedjax_sec
from fedjax_sec import cli, sweeps
from fedjax_sec.cli import app
from fedjax_sec.cli.common import data_overrides
from fedjax_sec.core import ConfigError, files
from fedjax_sec.runs import config, experiment, results, tuning
from fedjax_sec.runs.prepare import prepare
from fedjax_sec.runs.program import Program
from fedjax_sec.sweeps import groups
from fedjax_sec.sweeps.launchers import ahead

BASE = small(rounds=4, checkpoint={"every": 1, "keep_params": True})
L2 = {"client.l2": [0.0, 0.1]}
PROGRAMS = {}


@pytest.fixture(autouse=True)
def compile_once(monkeypatch):
    """Runs of one structure share a program in this file."""
    share_programs(monkeypatch, PROGRAMS, groups)


@pytest.fixture
def cells():
    """Two groups, with the mean and the median, of two strengths and two seeds each."""
    return sweeps.make_cells(BASE, {"defense": ["mean", "median"]} | L2, seeds=(0, 1))


@pytest.fixture
def counted(monkeypatch):
    """The names of functions of a sweep's work, each time one is called."""
    calls = []

    def counting(name):
        original = getattr(groups, name)

        def function(*args, **kwargs):
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(groups, name, function)

    for name in ("prepare", "resolve_layout", "train"):
        counting(name)
    return calls


class Stop(Exception):
    """The interruption of a group in a test."""


def stop_at(last):
    def on_evaluation(done, rows):
        if done == last:
            raise Stop

    return on_evaluation


def names_of(planned):
    return [[cell.name for cell in group.cells] for group in planned]


def rows(out, cell):
    return (out / "cells" / cell.name / "metrics.jsonl").read_bytes()


# --- Planning -----------------------------------------------------------------------------------

WITHOUT_A_DEVICE = """
import json, sys
from jax._src import xla_bridge
from fedjax_sec import sweeps

base, out = json.loads(sys.argv[1]), sys.argv[2]
cells = sweeps.make_cells(base, {"defense": ["mean", "krum"]}, seeds=range(3))
planned = sweeps.plan(cells, out, group_size=2)
print([len(group.cells) for group in planned], sweeps.survey(out).counts["waiting"])
print(xla_bridge.backends_are_initialized())
print(sorted({"pandas", "matplotlib", "tensorflow_datasets"} & set(sys.modules)))
import jax
jax.devices()
print(xla_bridge.backends_are_initialized())
"""


def test_planning_and_looking_use_no_device(tmp_path, subprocess_env):
    command = [sys.executable, "-c", WITHOUT_A_DEVICE, json.dumps(BASE), str(tmp_path / "out")]
    done = subprocess.run(command, env=subprocess_env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[1, 2, 1, 2] 6", "False", "[]", "True"]


def test_planning_verifies_and_measures_nothing(cells, tmp_path, counted):
    planned = sweeps.plan(cells, tmp_path)
    assert names_of(planned) == [[cell.name for cell in part] for part in (cells[:4], cells[4:])]
    assert not counted
    for group in planned:
        folder = tmp_path / "groups" / group.name
        assert [path.name for path in folder.iterdir()] == ["members.json"]
    again = sweeps.plan(cells, tmp_path)
    assert [group.name for group in again] == [group.name for group in planned]


@pytest.mark.parametrize(
    ("seeds", "limit", "sizes"),
    [
        (200, None, [50] * 4),
        (200, 100, [100] * 2),
        (65, None, [32, 33]),
        (64, None, [64]),
        (3, 1, [1] * 3),
        (7, 3, [2, 2, 3]),
    ],
)
def test_a_structure_with_many_seeds_is_split_evenly(seeds, limit, sizes):
    cells = sweeps.make_cells(BASE, {}, seeds=range(seeds))
    planned = groups.grouped(cells, groups.limit(limit))
    assert [len(group.cells) for group in planned] == sizes
    assert [cell for group in planned for cell in group.cells] == cells


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "many"])
def test_limits_that_are_none(wrong, cells, tmp_path):
    with pytest.raises(ConfigError, match="group_size must be an integer >= 1, got"):
        sweeps.plan(cells, tmp_path / "out", group_size=wrong)
    with pytest.raises(ConfigError, match="group_size"):
        sweeps.load({"experiment": BASE, "group_size": wrong if wrong else 0})
    assert not (tmp_path / "out").exists()


def test_the_limit_is_a_key_of_a_sweep(tmp_path):
    spec = {"experiment": BASE, "seeds": [0, 1], "group_size": 1}
    sizes = []
    done = fedjax_sec.sweep(
        spec, out=tmp_path, on_group=lambda number, total, cells: sizes.append((total, len(cells)))
    )
    assert sizes == [(2, 1), (2, 1)]
    settings, cells = sweeps.load(spec, ["group_size=null"])
    assert settings.group_size is None
    whole = sweeps.run_cells(cells, tmp_path / "whole")
    for one, other in zip(whole, done.results, strict=True):
        np.testing.assert_allclose(one.metrics["loss"], other.metrics["loss"], rtol=1e-5)


def test_begun_groups_keep_their_members_and_others_follow_the_new_limit(cells, tmp_path):
    whole = sweeps.run_cells(cells, tmp_path / "whole")
    out = tmp_path / "cut"
    first, second = sweeps.plan(cells, out)
    with pytest.raises(Stop):
        sweeps.work(out, first, on_evaluation=stop_at(3))
    planned = sweeps.plan(cells, out, group_size=1)
    assert names_of(planned) == [names_of([first])[0], *[[cell.name] for cell in cells[4:]]]
    assert sorted(path.name for path in (out / "groups").iterdir()) == sorted(
        group.name for group in planned
    )
    assert sweeps.work(out, second)  # taken apart: there is nothing to do, and nothing is done
    assert not any((out / "cells" / cell.name / "metrics.jsonl").exists() for cell in cells[4:])
    seen = []
    outcome = sweeps.run_cells(
        cells,
        out,
        group_size=2,
        on_group=lambda number, total, members: (
            lambda done, rows: seen.append((len(members), done))
        ),
    )
    assert seen[:2] == [(4, 3), (4, 4)]  # from its checkpoint
    assert seen[2:] == [(2, done) for done in range(5)] * 2
    for one, other, cell in zip(outcome[:4], whole[:4], cells, strict=False):
        same_bits(one.metrics, other.metrics)
        assert rows(out, cell) == rows(tmp_path / "whole", cell)
    assert not list((out / "groups").iterdir())


def test_groups_that_another_process_runs_keep_their_members(cells, tmp_path):
    first, second = sweeps.plan(cells, tmp_path)
    lock = groups.take(tmp_path, first.name)
    try:
        planned = sweeps.plan(cells, tmp_path, group_size=3)
    finally:
        lock.release()
    assert names_of(planned)[0] == names_of([first])[0]
    assert [len(group.cells) for group in planned] == [4, 2, 2]
    assert second.name not in {group.name for group in planned}


def test_groups_that_are_taken_apart_meanwhile_are_planned_anew(cells, tmp_path):
    """Another process plans with another limit while this one works on its first group."""
    planned = []

    def on_group(number, total, members):
        if not planned:
            planned.extend(sweeps.plan(cells, tmp_path, group_size=2))

    outcome = sweeps.run_cells(cells, tmp_path, on_group=on_group)
    # The first is locked; the other is taken apart, unless its program is being compiled ahead.
    assert [len(group.cells) for group in planned] == [4, 2, 2]
    assert [result.experiment for result in outcome] == [cell.experiment for cell in cells]
    assert not list((tmp_path / "groups").iterdir())


# --- Working ------------------------------------------------------------------------------------


def test_work_is_idempotent(cells, tmp_path, counted):
    planned = sweeps.plan(cells, tmp_path)
    assert sweeps.work(tmp_path, planned[0])
    assert counted == ["prepare"] * 4 + ["resolve_layout", "train"]
    assert not (tmp_path / "groups" / planned[0].name).exists()
    before = [rows(tmp_path, cell) for cell in cells[:4]]
    assert sweeps.work(tmp_path, planned[0]) and sweeps.work(tmp_path, planned[0].name)
    assert len(counted) == 6 and [rows(tmp_path, cell) for cell in cells[:4]] == before
    assert [group.name for group in sweeps.plan(cells, tmp_path)] == [planned[1].name]


def test_work_by_name_is_the_same(cells, tmp_path):
    for place in ("by name", "by cells"):
        for group in sweeps.plan(cells, tmp_path / place):
            assert sweeps.work(tmp_path / place, group.name if place == "by name" else group)
    for cell in cells:
        assert rows(tmp_path / "by name", cell) == rows(tmp_path / "by cells", cell)


def test_cells_are_read_back_with_their_names(tmp_path):
    grid = {"defense": [["clip_norm", "median"], "mean"], "client.l2": {"a_b c": 0.1}}
    cells = sweeps.make_cells(BASE, grid) + sweeps.make_cells(BASE, {}, seeds=[4])
    for group in sweeps.plan(cells, tmp_path):
        read = groups.read_group(tmp_path, group.name)
        assert names_of([read]) == names_of([group])
        for one, other in zip(read.cells, group.cells, strict=True):
            assert one.experiment.to_dict() == other.experiment.to_dict()


def test_a_name_that_was_never_planned(cells, tmp_path):
    (group, *_) = sweeps.plan(cells, tmp_path)
    wrong = group.name[:-1] + "x"
    with pytest.raises(ConfigError, match=f"no group '{wrong}'. Did you mean '{group.name}'"):
        sweeps.work(tmp_path, wrong)


def test_work_waits_for_another_process_or_does_not(cells, tmp_path, monkeypatch):
    (group, *_) = sweeps.plan(cells, tmp_path)
    lock = groups.take(tmp_path, group.name)
    assert sweeps.work(tmp_path, group, wait=False) is False
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        lock.release()

    monkeypatch.setattr(groups, "time", types.SimpleNamespace(sleep=sleep))
    assert sweeps.work(tmp_path, group) and slept == [groups.PAUSE]
    assert all((tmp_path / "cells" / cell.name / "summary.json").exists() for cell in cells[:4])


def test_work_verifies_what_nobody_has_verified(tmp_path):
    too_many = {
        "evasions": ["fgsm"],
        "evasion_images": 361,
    }  # more than there are: nobody else sees
    base = BASE | {"evaluation": BASE["evaluation"] | too_many}
    (cell,) = sweeps.make_cells(base, {})
    with pytest.raises(ConfigError, match="evasion_images must be <= 360") as error:
        prepare(cell.experiment)
    (group,) = sweeps.plan([cell], tmp_path / "planned")
    for call in (
        lambda: sweeps.work(tmp_path / "planned", group),
        lambda: sweeps.work(tmp_path / "planned", group.name),
        lambda: sweeps.Local().launch(tmp_path / "planned", [group]),
        lambda: sweeps.run_cells([cell], tmp_path / "run"),
    ):
        with pytest.raises(ConfigError, match=re.escape(str(error.value))):
            call()
    assert not (tmp_path / "run").exists()  # before anything is written


def test_each_cell_is_verified_once(cells, tmp_path, counted):
    sweeps.run_cells(cells, tmp_path)
    assert counted.count("prepare") == len(cells) and counted.count("train") == 2
    counted.clear()
    sweeps.run_cells(cells, tmp_path)
    assert not counted  # what is finished is read back only


def test_programs_of_the_next_groups_are_compiled_meanwhile(cells, tmp_path, monkeypatch):
    """Both are being compiled before one is finished, in threads; traced by the caller."""
    together, here = threading.Barrier(2, timeout=60), threading.get_ident()
    finish, lower, threads = Program.finish, Program.lower, []

    def finishing(program):
        threads.append(threading.get_ident())
        together.wait()
        return finish(program)

    def lowering(program, prepared):
        assert threading.get_ident() == here
        return lower(program, prepared)

    monkeypatch.setattr(ahead, "usable_cores", lambda: 2)
    monkeypatch.setattr(Program, "finish", finishing)
    monkeypatch.setattr(Program, "lower", lowering)
    results = sweeps.run_cells(cells, tmp_path)
    assert len(results) == len(cells) and len(set(threads)) == 2 and here not in threads


def test_every_process_measures_for_itself_and_a_resumed_group_does_not(
    cells, tmp_path, monkeypatch
):
    """No lock of the sweep is held meanwhile, and nothing runs or compiles."""
    measured, running, asked = [], [], []
    choices = iter([tuning.Tuning(tuning.Choice("map"), {"map": float(i)}) for i in range(9)])
    train = groups.train

    def measure(one, replicas, before):
        asked.append(replicas)
        before()  # an error where this is no time to measure
        assert not running
        assert not files.is_locked(tmp_path / "locks" / "groups.lock")
        measured.append(one.experiment.defense.stages[0].registered_name)
        return next(choices)

    def training(*args, **kwargs):
        running.append(None)
        try:
            return train(*args, **kwargs)
        finally:
            running.pop()

    finish = Program.finish

    def finishing(program):
        running.append(None)
        try:
            return finish(program)
        finally:
            running.pop()

    monkeypatch.setattr(experiment, "choose_layout", measure)
    monkeypatch.setattr(groups, "train", training)
    monkeypatch.setattr(Program, "finish", finishing)
    (first, second) = sweeps.plan(cells, tmp_path)
    assert not measured
    with pytest.raises(Stop):
        sweeps.work(tmp_path, first, on_evaluation=stop_at(2))
    written = files.read_json(tmp_path / "groups" / first.name / "execution.json")
    assert written["milliseconds"] == {"map": 0.0} and measured == ["mean"]
    tunings = []
    monkeypatch.setattr(
        groups,
        "traced",
        lambda group, at_once, tuning: (
            tunings.append(tuning.milliseconds["map"])
            or groups.Program(group.prepared[0], at_once, tuning)
        ),
    )
    sweeps.run_cells(cells, tmp_path)
    # The first is not measured again. The second's choice was made before the first ran; since it
    # is another when it is its turn, as it may be on a machine that forgets, it is compiled again.
    assert measured == ["mean", "median", "median"] and tunings == [0.0, 1.0, 2.0]
    # Asked while the first was compiled, too, when nothing may be measured.
    sizes = len(first.cells), len(second.cells)
    assert asked == [sizes[0], *[sizes[1]] * 3]


# --- Launching ----------------------------------------------------------------------------------

WORKER = """
import sys
from fedjax_sec import sweeps
assert sweeps.work(sys.argv[1], sys.argv[2])
"""


class Subprocesses:
    """Runs each group in a process of its own, that is told the folder and the name alone."""

    def __init__(self, env):
        self.env, self.launched = env, []

    def launch(self, out, groups, **_):
        started = [
            subprocess.Popen([sys.executable, "-c", WORKER, str(out), group.name], env=self.env)
            for group in groups
        ]
        self.launched += [group.name for group in groups]
        assert [process.wait(timeout=300) for process in started] == [0] * len(groups)


def test_another_launcher_needs_work_alone(cells, tmp_path, subprocess_env):
    env = subprocess_env | {"FEDJAX_SEC_TUNING": "off"}
    launcher = Subprocesses(env)
    assert isinstance(launcher, sweeps.Launcher) and isinstance(sweeps.Local(), sweeps.Launcher)
    outcome = sweeps.run_cells(cells, tmp_path / "out", launcher=launcher)
    assert len(launcher.launched) == 2 and not list((tmp_path / "out" / "groups").iterdir())
    local = sweeps.run_cells(cells, tmp_path / "local")
    for one, other in zip(outcome, local, strict=True):
        assert one.experiment == other.experiment
        np.testing.assert_allclose(one.metrics["loss"], other.metrics["loss"], rtol=1e-5)
    same = sweeps.run_cells(cells, tmp_path / "out", launcher=launcher)
    assert len(launcher.launched) == 2  # nothing is left to launch
    same_bits([one.metrics for one in same], [one.metrics for one in outcome])


def test_what_a_launcher_leaves_is_named(cells, tmp_path):
    class Lazy:
        calls = 0

        def launch(self, out, groups, **_):
            Lazy.calls += 1
            sweeps.work(out, groups[0])

    with pytest.raises(ConfigError, match="4 of 8 runs in .* are not finished: median_0.0/seed0, "):
        sweeps.run_cells(cells, tmp_path, launcher=Lazy())
    assert Lazy.calls == 1


# --- Collecting ---------------------------------------------------------------------------------


def test_collecting_names_what_is_missing(cells, tmp_path):
    with pytest.raises(ConfigError, match="8 of 8 runs .* not finished: .* and 3 more. Start"):
        sweeps.collect(cells, tmp_path)
    first, _ = sweeps.plan(cells, tmp_path)
    sweeps.work(tmp_path, first)
    with pytest.raises(ConfigError) as error:
        sweeps.collect(cells, tmp_path)
    assert "4 of 8 runs" in str(error.value) and "\n" not in str(error.value)
    assert all(cell.name in str(error.value) for cell in cells[4:])
    assert not any(cell.name in str(error.value) for cell in cells[:4])
    outcome = sweeps.collect(list(first.cells)[::-1], tmp_path)
    assert [result.experiment for result in outcome] == [cell.experiment for cell in cells[3::-1]]
    assert outcome[0].params is None and outcome[0].metrics["round"].tolist() == [0, 1, 2, 3, 4]
    longer = sweeps.make_cells(BASE | {"rounds": 9}, {"defense": ["mean"]} | L2)
    with pytest.raises(ConfigError, match="another configuration; it differs in rounds"):
        sweeps.collect(longer, tmp_path)
    summary = tmp_path / "cells" / cells[0].name / "summary.json"
    summary.write_text("{")
    with pytest.raises(ConfigError, match="summary.json' is damaged"):
        sweeps.collect(cells[:4], tmp_path)


# --- Status -------------------------------------------------------------------------------------


def status(*arguments):
    return CliRunner().invoke(cli.app, ["status", *map(str, arguments)])


def as_json(out):
    done = status(out, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.output)


def test_status_of_a_sweep_in_every_state(tmp_path):
    grid = {"client.optimizer.learning_rate": [0.1, 1e30], "defense": ["mean", "median", "krum"]}
    base = BASE | {"threat": {"num_malicious": 1}}
    cells = sweeps.make_cells(base, grid)
    planned = sweeps.plan(cells, tmp_path, group_size=2)
    assert as_json(tmp_path)["waiting"] == 6 and as_json(tmp_path)["seconds_left"] is None
    states = {
        group.cells[0].experiment.defense.stages[0].registered_name: group for group in planned
    }
    sweeps.work(tmp_path, states["mean"])
    with pytest.raises(Stop):
        sweeps.work(tmp_path, states["median"], on_evaluation=stop_at(3))
    seen = []
    with pytest.raises(Stop):

        def look(done, new):
            seen.append(as_json(tmp_path))
            text = status(tmp_path).output
            assert "2 finished, 2 running, 2 interrupted, 1 diverged\n" in text
            assert f"running\t0.1_krum/seed0, 1e-30_krum/seed0\t{done}/4" in text.replace("+", "-")
            assert "diverged\t1e+30_mean/seed0" in text
            if done == 1:
                raise Stop

        sweeps.work(tmp_path, states["krum"], on_evaluation=look)
    by_name = {run["name"]: run for run in seen[-1]["runs"]}
    assert seen[-1]["kind"] == "sweep" and seen[-1]["total"] == 6 and len(by_name) == 6
    mean, median, krum = (by_name[f"0.1_{name}/seed0"] for name in ("mean", "median", "krum"))
    assert (mean["state"], mean["done"], mean["rounds"], mean["diverged"]) == (
        "finished",
        4,
        4,
        False,
    )
    assert by_name["1e+30_mean/seed0"]["diverged"] is True
    assert (median["state"], median["done"]) == ("interrupted", 3)
    assert (krum["state"], krum["done"], krum["group"]) == ("running", 1, states["krum"].name)
    # Two runs of 4 rounds took so long; 2 x 1 and 2 x 3 rounds are left, to one process.
    summary = files.read_json(tmp_path / "cells" / cells[0].name / "summary.json")
    assert seen[-1]["seconds_left"] == pytest.approx(summary["wall_seconds"] / 8 * 8)
    assert seen[0]["seconds_left"] == pytest.approx(summary["wall_seconds"] / 8 * 10)
    assert as_json(tmp_path)["interrupted"] == 4  # nobody holds the lock any more
    sweeps.run_cells(cells, tmp_path)
    last = as_json(tmp_path)
    assert (last["finished"], last["seconds_left"]) == (6, 0.0)
    assert "estimated time left: none" in status(tmp_path).output


def test_status_of_a_run(tmp_path):
    out, seen = tmp_path / "out", []

    def look(done, new):
        seen.append(as_json(out))
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        fedjax_sec.run(BASE, out=out, on_evaluation=look)
    assert [(one["running"], one["runs"][0]["done"]) for one in seen] == [(1, 0), (1, 1), (1, 2)]
    assert seen[0]["seconds_left"] is None and seen[0]["kind"] == "run"
    # The state after round 1 tells how long it took; three rounds and two are left.
    elapsed = files.read_json(out / "checkpoints" / "1.json")["elapsed"]
    assert seen[2]["seconds_left"] == pytest.approx(2 * elapsed)
    stopped = as_json(out)
    assert stopped["interrupted"] == 1 and stopped["runs"][0]["rounds"] == 4
    assert "interrupted\tout\t2/4" in status(out).output
    fedjax_sec.run(BASE, out=out, resume=True)
    assert as_json(out)["finished"] == 1


def test_time_left_without_a_checkpoint(tmp_path):
    """By the times of the files: 3 rounds in 30 seconds, and one is left."""
    with pytest.raises(Stop):
        fedjax_sec.run(BASE | {"checkpoint": {"every": 9}}, out=tmp_path, on_evaluation=stop_at(3))
    then = (tmp_path / "execution.json").stat().st_mtime
    os.utime(tmp_path / "metrics.jsonl", (then + 30, then + 30))
    assert as_json(tmp_path)["seconds_left"] == pytest.approx(10)


def test_status_of_a_folder_without_runs(tmp_path, cells):
    assert status(tmp_path).exit_code == 2
    assert "nothing was run in it" in status(tmp_path / "nowhere").output
    (tmp_path / "thesis.tex").write_text("mine")
    done = status(tmp_path)
    assert done.exit_code == 2 and "holds neither a run nor a sweep" in done.output
    sweeps.plan(cells, tmp_path / "runs")  # as a paper's script does
    assert as_json(tmp_path)["waiting"] == 8


def test_status_changes_nothing(cells, tmp_path):
    first, _ = sweeps.plan(cells, tmp_path)
    with pytest.raises(Stop):
        sweeps.work(tmp_path, first, on_evaluation=stop_at(2))

    def everything():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    before = everything()
    survey = sweeps.survey(tmp_path)
    assert everything() == before and survey.counts["interrupted"] == 4


def test_the_last_row_is_found_in_long_files(tmp_path):
    path = tmp_path / "metrics.jsonl"
    text = "".join(json.dumps({"round": n, "x": [0.5] * 3000}) + "\n" for n in range(5))
    for cut, expected in ((text, 4), (text[:-1], 3), (text + '{"round": 5', 4), ("", None)):
        path.write_text(cut)
        assert (sweeps.status._last_row(path) or {}).get("round") == expected
    assert sweeps.status._last_row(tmp_path / "none") is None


def test_a_lock_is_seen_without_taking_it(tmp_path):
    path = tmp_path / "lock"
    assert not files.is_locked(path) and not path.exists()
    lock = filelock.FileLock(path)
    with lock:
        assert files.is_locked(path)
        stat = path.stat()
        assert files.is_locked(path) and path.stat().st_mtime_ns == stat.st_mtime_ns
    assert not files.is_locked(path)


def test_thousands_of_runs_are_surveyed_quickly(tmp_path):
    sweeps.run_cells(sweeps.make_cells(BASE, {}), tmp_path)
    files_of = {
        path.name: path.read_bytes()
        for path in (tmp_path / "cells" / "run" / "seed0").iterdir()
        if path.is_file()
    }
    for number in range(2000):
        folder = tmp_path / "cells" / f"copy{number}" / "seed0"
        folder.mkdir(parents=True)
        for name in ("summary.json", results.MARK)[number % 2 :]:
            (folder / name).write_bytes(files_of[name])
        (folder / "config.yaml").write_bytes(files_of["config.yaml"])
    begin = time.perf_counter()
    counts = sweeps.survey(tmp_path).counts
    assert counts["finished"] == 1001 and counts["waiting"] == 1000
    assert time.perf_counter() - begin < 10  # reading the YAML of each would take 20


# --- Seeds, and where the data lies ---------------------------------------------------------------


def test_the_seed_of_the_experiment_is_not_lost():
    base = BASE | {"seed": 5}
    assert [cell.experiment.seed for cell in sweeps.make_cells(base, {})] == [5]
    assert [cell.experiment.seed for cell in sweeps.load({"experiment": base})[1]] == [5]
    assert [cell.experiment.seed for cell in sweeps.make_cells(base, {}, seeds=(4, 5))] == [4, 5]
    with pytest.raises(ConfigError, match=r"experiment.seed = 5 would be ignored, since seeds are"):
        sweeps.load({"experiment": base}, ["seeds=[0, 1]"])
    # The default, which a resolved configuration spells out, is nobody's wish.
    spelt = BASE | {"seed": 0}
    assert [cell.experiment.seed for cell in sweeps.make_cells(spelt, {}, seeds=(3,))] == [3]


@pytest.mark.parametrize(
    "text",
    [
        "data.data_dir=there",
        "data={name: mnist, data_dir: there}",
        "overrides.data.data_dir=there",
        "overrides={data.data_dir: there}",
        "overrides={data: {data_dir: null}}",
        "experiment.data.data_dir=there",
    ],
)
def test_two_places_of_the_data_are_refused(text):
    with pytest.raises(ConfigError, match="--data-dir here and the override .* leave one of the"):
        data_overrides(Path("here"), ["rounds=3", text])
    assert data_overrides(None, [text]) == {}


@pytest.mark.parametrize("command", ["run", "sweep", "trigger", "partition"])
def test_commands_refuse_two_places_of_the_data(command, tmp_path):
    spec = {"experiment": BASE} if command == "sweep" else BASE
    (tmp_path / "file.yaml").write_text(config.dump_yaml(spec))
    text = "overrides.data.data_dir=there" if command == "sweep" else "data.data_dir=there"
    arguments = [command, tmp_path / "file.yaml", text, "--data-dir", "here"]
    done = CliRunner().invoke(cli.app, [*map(str, arguments), "--out", str(tmp_path / "out")])
    assert done.exit_code == 2 and "both say where the data lies" in done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [["alie", "all"], ["fat", "all"], ["fltrust", "all", "--dataset", "mnist-0.5"], ["rlr", "all"]],
    ids=lambda arguments: arguments[0],
)
def test_the_papers_refuse_two_places_of_the_data(arguments, tmp_path):
    both = ["--data-dir", "here", "--set", "data.data_dir=there", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["paper", *arguments, *both])
    assert done.exit_code == 2 and "both say where the data lies" in done.output
    assert not (tmp_path / "out").exists()


# --- From Python --------------------------------------------------------------------------------


def test_a_sweep_from_python(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(config.dump_yaml({"experiment": BASE, "grid": L2, "title": "T"}))
    done = fedjax_sec.sweep(path, out=tmp_path / "out", **{"overrides.rounds": 2, "seeds": [3]})
    assert isinstance(done, fedjax_sec.SweepResult)
    assert [cell.experiment.rounds for cell in done.cells] == [2, 2]
    assert done.frame["accuracy"].tolist() == [r.metrics["accuracy"][-1] for r in done.results]
    assert list(done.frame["seed"]) == [3, 3]
    for name in ("runs.csv", "table.csv", "table.md", "accuracy.png", "accuracy.pdf"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    with pytest.raises(ConfigError, match="A sweep is a YAML file or a mapping, got 3"):
        sweeps.load(3)
    with pytest.raises(ConfigError, match="out must be the path of a folder, got 3"):
        sweeps.run_cells(done.cells, 3)
    with pytest.raises(ConfigError, match="on_group must be a function, got 3"):
        sweeps.run_cells(done.cells, tmp_path / "out", on_group=3)

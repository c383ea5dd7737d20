"""Loggers: what TensorBoard and W&B are told is `metrics.jsonl`, each point once; exports; load."""

import errno
import json
import logging
import math
import os
import shutil
import struct
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from helpers import small
from typer.testing import CliRunner

import fedjax_sec
from fedjax_sec import sweeps
from fedjax_sec.cli import app
from fedjax_sec.core import ConfigError
from fedjax_sec.report import exports
from fedjax_sec.runs import config, experiment, loggers, results
from fedjax_sec.runs import program as program_lib
from fedjax_sec.runs.loggers import tensorboard, writing
from fedjax_sec.sweeps.launchers.processes import Processes

BASE = small(rounds=4, threat={"num_malicious": 1}, attack="sign_flip", checkpoint={"every": 2})
GRID = {"client.l2": [0.0, 0.1], "defense": ["mean", "median"]}


class Stop(Exception):
    """An interruption."""


def stop_at(round):
    def look(done, rows):
        if done == round:
            raise Stop

    return look


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events_in(folder):
    """The events of the only event file in a folder, by the format of TFRecord."""
    from tensorboardX.proto.event_pb2 import Event

    (path,) = folder.glob("events.out.tfevents.*")
    data, place, events = path.read_bytes(), 0, []
    while place < len(data):
        (size,) = struct.unpack_from("<Q", data, place)
        events.append(Event.FromString(data[place + 12 : place + 12 + size]))
        place += 16 + size
    return events


def points_in(events):
    """(tag, round) -> value of all scalars; each is there once."""
    found = [
        ((value.tag, event.step), value.simple_value)
        for event in events
        for value in event.summary.value
        if value.HasField("simple_value")
    ]
    points = dict(found)
    assert len(points) == len(found)
    return points


def expected(rows):
    return {
        (name, row["round"]): math.nan if value is None else np.float32(value)
        for row in rows
        for name, value in row.items()
        if name != "round" and not isinstance(value, list)
    }


def check_logged(folder, rows):
    np.testing.assert_equal(points_in(events_in(folder)), expected(rows))


def settings_in(events):
    """The hyper-parameters of the session."""
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    for event in events:
        for value in event.summary.value:
            if value.tag == "_hparams_/session_start_info":
                data = HParamsPluginData.FromString(value.metadata.plugin_data.content)
                given = data.session_start_info.hparams.items()
                return {k: v.string_value or v.number_value for k, v in given}
    return None


@pytest.fixture
def programs(monkeypatch):
    """The programs that are built while a test runs."""
    built, original = [], program_lib.Program.__init__

    def record(self, *args, **kwargs):
        built.append(self)
        original(self, *args, **kwargs)

    monkeypatch.setattr(program_lib.Program, "__init__", record)
    return built


# --- TensorBoard --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """A finished run's folder, and its result."""
    out = tmp_path_factory.mktemp("logged") / "out"
    return out, fedjax_sec.run(BASE, out=out, logging="tensorboard")


def test_event_files_hold_the_metrics(logged):
    out, result = logged
    np.testing.assert_equal(result.metrics, fedjax_sec.run(BASE).metrics)
    check_logged(out / "tensorboard", rows_of(out))
    events = events_in(out / "tensorboard")
    assert settings_in(events) == {"seed": 0} and len(rows_of(out)) == 5
    (text,) = (v.tensor for e in events for v in e.summary.value if v.tag == "config/text_summary")
    assert b"sign_flip" in text.string_val[0]


def test_tensorboard_itself_reads_them(logged):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = reader.EventAccumulator(str(logged[0] / "tensorboard"))
    read.Reload()
    got = [(one.step, np.float32(one.value)) for one in read.Scalars("accuracy")]
    assert got == [(row["round"], np.float32(row["accuracy"])) for row in rows_of(logged[0])]


def test_a_resumed_run_has_each_point_once(tmp_path):
    """Round 3 was measured and logged, and is measured again from the state after round 2."""
    with pytest.raises(Stop):
        fedjax_sec.run(BASE, out=tmp_path, logging="tensorboard", on_evaluation=stop_at(3))
    check_logged(tmp_path / "tensorboard", rows_of(tmp_path))
    assert len(rows_of(tmp_path)) == 4
    longer = BASE | {"rounds": 6}
    fedjax_sec.run(longer, out=tmp_path, logging="tensorboard", resume=True)
    check_logged(tmp_path / "tensorboard", rows_of(tmp_path))
    assert len(rows_of(tmp_path)) == 7


def test_overwriting_removes_what_was_logged_and_nothing_else(logged, tmp_path):
    shutil.copytree(logged[0], tmp_path / "out")
    mine = tmp_path / "out" / "tensorboard" / "events.out.tfevents.1.me"
    mine.write_text("mine")
    results.RunFolder(tmp_path / "out").remove()
    assert list(mine.parent.iterdir()) == [mine]


def test_a_sweep_is_one_run_a_cell_and_seed(finished):
    frame = fedjax_sec.load(finished).groupby("run").first()
    assert len(frame) == 8
    for name, row in frame.iterrows():
        events = events_in(finished / "tensorboard" / name)
        assert settings_in(events) == {axis: row[axis] for axis in ("defense", "client.l2", "seed")}
        np.testing.assert_equal(points_in(events), expected(rows_of(finished / "cells" / name)))


def test_workers_of_a_launcher_log_with_labels(tmp_path, monkeypatch, subprocess_env):
    for name, value in (subprocess_env | {"FEDJAX_SEC_TUNING": "off"}).items():
        monkeypatch.setenv(name, value)
    base, grid = BASE | {"logging": ["tensorboard"]}, {"defense": ["mean", {"name": "median"}]}
    cells = sweeps.make_cells(base, {"(a_b)": {"x y": {"client.l2": 0.5}}} | grid)
    sweeps.run_cells(cells, tmp_path, launcher=Processes(2))
    for cell in cells:
        events = events_in(tmp_path / "tensorboard" / cell.name)
        assert settings_in(events) == cell.labels | {"seed": 0}
        rows = rows_of(tmp_path / "cells" / cell.name)
        np.testing.assert_equal(points_in(events), expected(rows))


def test_an_interrupted_group_has_each_point_once(tmp_path):
    cells = sweeps.make_cells(BASE | {"logging": "tensorboard"}, {}, seeds=(0, 1))
    with pytest.raises(Stop):
        sweeps.run_cells(cells, tmp_path, on_group=lambda *group: stop_at(3))
    sweeps.run_cells(cells, tmp_path)
    for cell in cells:
        check_logged(tmp_path / "tensorboard" / cell.name, rows_of(tmp_path / "cells" / cell.name))


def test_only_the_leading_process_logs(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(experiment.distributed, "leads", lambda: False)
    monkeypatch.setattr(experiment, "train", lambda _, **given: seen.append(given) or [None])
    experiment.execute(BASE, out=tmp_path / "out", logging="tensorboard")
    assert seen == [{"on_evaluation": None}] and not (tmp_path / "out").exists()


# --- What logging is not ------------------------------------------------------------------------


def test_logging_is_no_part_of_a_runs_identity(tmp_path):
    one, other = config.from_mapping(BASE), config.from_mapping(BASE | {"logging": "tensorboard"})
    assert one.fingerprint() == other.fingerprint() and one.structure() == other.structure()
    assert config.differences(one.to_dict(), other.to_dict()) == []
    with pytest.raises(Stop):
        fedjax_sec.run(BASE, out=tmp_path, on_evaluation=stop_at(3))
    fedjax_sec.run(BASE, out=tmp_path, resume=True, logging="tensorboard")
    check_logged(tmp_path / "tensorboard", rows_of(tmp_path))  # earlier rounds, too
    assert config.load(tmp_path / "config.yaml").logging == ("tensorboard",)


def test_a_logger_that_fails_stops_no_run(tmp_path, monkeypatch, caplog):
    original, failed = tensorboard.TensorBoard.log, []

    def log(self, row):
        if row["round"] == 2:
            failed.append(row)
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, row)

    monkeypatch.setattr(tensorboard.TensorBoard, "log", log)
    with caplog.at_level(logging.WARNING):
        result = fedjax_sec.run(BASE, out=tmp_path, logging="tensorboard")
    assert result.metrics["round"].tolist() == [0, 1, 2, 3, 4] and len(failed) == 1
    said = [one.getMessage() for one in caplog.records if one.name == writing.__name__]
    assert len(said) == 1
    assert "'tensorboard' is left out from here on" in said[0] and "No space left" in said[0]
    check_logged(tmp_path / "tensorboard", rows_of(tmp_path)[:2])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_stops_no_run(tmp_path, monkeypatch, caplog):
    from tensorboardX import record_writer

    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(record_writer, "open_file", lambda path: full)
        fedjax_sec.run(BASE, out=tmp_path, logging="tensorboard")
    said = [one.getMessage() for one in caplog.records if one.name == writing.__name__]
    assert len(said) == 1 and "No space left on device" in said[0] and len(rows_of(tmp_path)) == 5


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("tensorbord", "logging: unknown logger 'tensorbord'. Did you mean 'tensorboard'?"),
        (["wandb", 3], "logging: unknown logger 3. Known: tensorboard, wandb."),
        ({"wandb": True}, "logging must be a list of tensorboard, wandb, got {'wandb': True}."),
    ],
)
def test_loggers_that_are_none(tmp_path, given, said, programs):
    calls = (
        lambda: fedjax_sec.run(BASE, out=tmp_path / "out", logging=given),
        lambda: fedjax_sec.sweep({"experiment": BASE}, out=tmp_path / "out", logging=given),
    )
    for call in calls:
        with pytest.raises(ConfigError) as caught:
            call()
        assert str(caught.value) == said or said in str(caught.value)
    assert not programs and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_before_anything_is_compiled(
    tmp_path, name, monkeypatch, programs
):
    monkeypatch.setitem(sys.modules, loggers.PACKAGES[name], None)  # importing it fails
    words = rf"The logger '{name}' needs the package {loggers.PACKAGES[name]}.*: pip install"
    with pytest.raises(ConfigError, match=words):
        fedjax_sec.run(BASE, out=tmp_path / "out", logging=name)
    with pytest.raises(ConfigError, match=words):
        fedjax_sec.sweep({"experiment": BASE}, out=tmp_path / "out", logging=name)
    assert not programs and not (tmp_path / "out").exists()
    config.from_mapping({"logging": name})  # a configuration is read all the same


def test_without_a_folder_there_is_no_place(programs):
    with pytest.raises(ConfigError, match="logging: 'tensorboard' writes beside a run's folder"):
        fedjax_sec.run(BASE, logging="tensorboard")
    assert not programs


def test_commands_log(tmp_path):
    file, invoke = tmp_path / "one.yaml", CliRunner().invoke
    file.write_text(config.dump_yaml(BASE))
    done = invoke(app, ["run", str(file), "--out", str(tmp_path / "run"), "--log", "tensorboard"])
    assert done.exit_code == 0, done.output
    check_logged(tmp_path / "run" / "tensorboard", rows_of(tmp_path / "run"))
    many = tmp_path / "sweep.yaml"
    many.write_text(config.dump_yaml({"experiment": BASE, "seeds": [5]}))
    done = invoke(app, ["sweep", str(many), "--out", str(tmp_path / "s"), "--log", "tensorboard"])
    assert done.exit_code == 0, done.output
    check_logged(tmp_path / "s/tensorboard/run/seed5", rows_of(tmp_path / "s/cells/run/seed5"))
    done = invoke(app, ["run", str(file), "--out", str(tmp_path / "x"), "--log", "tensorbord"])
    assert done.exit_code == 2 and "--log: unknown logger 'tensorbord'. Did you" in done.output


# --- W&B ----------------------------------------------------------------------------------------


def records_of(path):
    """The records of a transaction file of W&B: LevelDB's format of a log."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts, records = path.read_bytes(), 7, [], []
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:  # a header is never cut
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        parts.append(data[place + 7 : place + 7 + size])
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(b"".join(parts)))
            parts = []
    return records


def wandb_points(folder):
    """name of a run -> ((metric, round) -> value, its group, its configuration), each run once."""
    runs = {}
    for path in folder.glob("wandb/offline-run-*/run-*.wandb"):
        points, name, group, settings = {}, None, None, {}
        for record in records_of(path):
            if record.HasField("run"):
                name, group = record.run.display_name, record.run.run_group
                items = record.run.config.update
                settings = {one.key: json.loads(one.value_json) for one in items}
            elif record.HasField("history"):
                items = {".".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
                numbers = {key: float(json.loads(text)) for key, text in items.items()}
                round = int(numbers["_step"])
                for key, value in numbers.items():
                    if not key.startswith("_"):
                        assert (key, round) not in points
                        points[key, round] = value
        assert name not in runs
        runs[name] = points, group, settings
    return runs


def numbers_of(rows):
    wide = {(n, row["round"]): v for row in rows for n, v in row.items() if not isinstance(v, list)}
    wide = {key: math.nan if value is None else float(value) for key, value in wide.items()}
    return {key: value for key, value in wide.items() if key[0] != "round"}


@pytest.fixture
def offline(monkeypatch):
    """W&B without a network; a test is skipped where it is not installed."""
    pytest.importorskip("wandb", reason="W&B is heavy, and so no part of the extra [dev]")
    monkeypatch.setenv("WANDB_MODE", "offline")


def test_wandb_holds_the_metrics_also_of_a_resumed_run(tmp_path, offline):
    with pytest.raises(Stop):
        fedjax_sec.run(BASE, out=tmp_path, logging="wandb", on_evaluation=stop_at(3))
    fedjax_sec.run(BASE, out=tmp_path, logging="wandb", resume=True)
    ((points, group, settings),) = wandb_points(tmp_path).values()
    np.testing.assert_equal(points, numbers_of(rows_of(tmp_path)))
    assert group == "" and settings["seed"] == 0 and settings["experiment"]["rounds"] == 4
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2


def test_a_sweep_is_a_group_of_wandb(tmp_path, offline):
    out = tmp_path / "mine"
    grid = {"client.l2": [0.0, 0.1]}
    spec = {"experiment": BASE, "grid": grid, "logging": ["wandb", "tensorboard"]}
    done = fedjax_sec.sweep(spec, out=out)
    runs = wandb_points(out)
    assert list(runs) != [] and len(runs) == len(done.cells) == 2
    for cell in done.cells:
        points, group, settings = runs[cell.name]
        np.testing.assert_equal(points, numbers_of(rows_of(out / "cells" / cell.name)))
        assert group == "mine" and settings["client.l2"] == float(cell.labels["client.l2"])
    exports.export(out, "wandb", tmp_path / "there")
    again = wandb_points(tmp_path / "there")
    np.testing.assert_equal(again, runs)


# --- Exports and tables -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A sweep's folder."""
    out = tmp_path_factory.mktemp("finished") / "s"
    grid = {"defense": {"a_b c": "mean", "none": "median"}, "client.l2": [0.0, 1e-4]}
    clean = {"attack": None, "threat": {}}  # what is measured of attackers is null
    spec = {"experiment": BASE | {"rounds": 2} | clean, "grid": grid, "seeds": [3, 1]}
    fedjax_sec.sweep(spec, out=out, logging=["tensorboard"])
    return out


def test_load_has_every_row_and_every_axis(finished):
    frame = fedjax_sec.load(finished)
    assert list(frame.columns[:6]) == ["defense", "client.l2", "seed", "run", "finished", "round"]
    assert len(frame) == 2 * 2 * 2 * 3 and frame["finished"].all()
    assert frame["client.l2"].dtype == float and set(frame["defense"]) == {"a_b c", "none"}
    one = frame.query("defense == 'a_b c' and `client.l2` == 0.0001 and seed == 3")
    rows = rows_of(finished / "cells" / "a-b-c_0.0001" / "seed3")
    assert one["run"].unique().tolist() == ["a-b-c_0.0001/seed3"]
    for name in ("round", "accuracy", "loss"):
        assert one[name].tolist() == [row[name] for row in rows]
    assert math.isnan(one["train_loss"].iloc[0]) and "kept" not in frame
    wide = fedjax_sec.load(finished, lists=True)
    assert (
        wide["per_class_accuracy"].iloc[0]
        == rows_of(finished / f"cells/{wide['run'][0]}")[0]["per_class_accuracy"]
    )
    pd.testing.assert_frame_equal(wide[list(frame)], frame)


def test_load_takes_runs_and_what_is_not_finished(tmp_path):
    with pytest.raises(ConfigError, match="nothing was run in it"):
        fedjax_sec.load(tmp_path / "run")
    with pytest.raises(Stop):
        fedjax_sec.run(BASE, out=tmp_path / "run", seed=7, on_evaluation=stop_at(1))
    frame = fedjax_sec.load(tmp_path / "run")
    assert frame[["seed", "run", "finished", "round"]].values.tolist() == [
        [7, "run", False, 0],
        [7, "run", False, 1],
    ]
    cells = sweeps.make_cells(BASE, GRID)
    sweeps.plan(cells, tmp_path / "sweep")
    with pytest.raises(ConfigError, match="No run in .* has measured anything yet"):
        fedjax_sec.load(tmp_path / "sweep")
    first = sweeps.plan(cells, tmp_path / "sweep")[0]
    sweeps.work(tmp_path / "sweep", first)
    frame = fedjax_sec.load(tmp_path / "sweep")
    assert set(frame["run"]) == {cell.name for cell in first.cells}


def test_a_changed_row_is_noticed(logged, tmp_path):
    shutil.copytree(logged[0], tmp_path / "out")
    path = tmp_path / "out" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"round": 1', '"round": 1 '))
    with pytest.raises(ConfigError, match="is not as the run wrote it"):
        fedjax_sec.load(tmp_path / "out")


def test_folders_without_labels_name_their_cells(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "s")
    (tmp_path / "s" / "cells.json").unlink()
    frame, known = fedjax_sec.load(tmp_path / "s"), fedjax_sec.load(finished)
    assert set(frame["cell"]) == {"a-b-c_0.0", "a-b-c_0.0001", "none_0.0", "none_0.0001"}
    assert len(frame) == len(known) and "defense" not in frame
    (tmp_path / "s" / "cells.json").write_text("{")
    with pytest.raises(ConfigError, match=r"cells.json' is damaged.* Remove it, and start the sw"):
        fedjax_sec.load(tmp_path / "s")


@pytest.mark.parametrize("to", ["csv", "parquet"])
def test_tables_read_back_are_what_load_gives(finished, tmp_path, to):
    command = ["export", str(finished), "--to", to, "--out", str(tmp_path / "there")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0 and "8 runs as" in done.output, done.output
    read = {"csv": pd.read_csv, "parquet": pd.read_parquet}[to]
    got = read(tmp_path / "there" / f"metrics.{to}")
    pd.testing.assert_frame_equal(got, fedjax_sec.load(finished))


def test_what_is_exported_is_what_would_have_been_logged(finished, tmp_path):
    names = exports.export(finished, "tensorboard", tmp_path)
    assert len(names) == 8
    exports.export(finished, "tensorboard", tmp_path)  # again, and no point is there twice
    for name in names:
        check_logged(tmp_path / name, rows_of(finished / "cells" / name))
    assert settings_in(events_in(tmp_path / "none_0.0001" / "seed1")) == {
        "defense": "none",
        "client.l2": 1e-4,
        "seed": 1,
    }


def test_exports_that_are_none(finished, tmp_path):
    with pytest.raises(ConfigError, match="to must be one of tensorboard.*Did you mean 'parquet'"):
        exports.export(finished, "parket", tmp_path)
    with pytest.raises(ConfigError, match=r"holds results \(sweep\). Choose another folder"):
        exports.export(finished, "csv", finished)
    done = CliRunner().invoke(app, ["export", str(tmp_path), "--to", "csv", "--out", "x"])
    assert done.exit_code == 2 and "nothing was run in it" in done.output


def test_importing_the_package_loads_no_logger(subprocess_env):
    program = "import sys, fedjax_sec, fedjax_sec.cli\n"
    program += "print([n for n in ('tensorboardX', 'wandb', 'pandas') if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], env=subprocess_env, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr

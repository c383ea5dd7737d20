"""The command: run, sweep, list, show; errors are one message and exit status 2."""

import dataclasses
import json
import re
import runpy
import sys

import numpy as np
import pandas as pd
import pytest
from helpers import small
from typer.testing import CliRunner

from fedjax_sec.cli import app, console
from fedjax_sec.core import optimizers, registry
from fedjax_sec.report import keys, plotting
from fedjax_sec.report import sweeps as sweeps_report
from fedjax_sec.runs import config
from fedjax_sec.runs.experiment import Result
from fedjax_sec.sweeps import grid

NAMES = [name for result in registry.KINDS.values() for name in result.names()]


@pytest.fixture
def invoke(monkeypatch):
    """Runs the command with a wide terminal, so that tables are not folded."""
    monkeypatch.setattr(console, "width", 300)  # read at import, so COLUMNS comes too late

    def call(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return call


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "experiment.yaml"
    path.write_text(config.dump_yaml(small(rounds=2)))
    return path


def test_the_module_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fedjax_sec", "list", "attacks"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("fedjax_sec", run_name="__main__")
    assert end.value.code == 0 and "sign_flip" in capsys.readouterr().out


def test_run(invoke, file, tmp_path):
    done = invoke("run", file, "client.l2=0.5", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert f"{summary['final']['accuracy']:.4g}" in done.output
    assert "2 rounds" in done.output and "subset: 43 of 1437" in done.output
    assert config.load(tmp_path / "out" / "config.yaml").client.l2 == 0.5
    again = invoke("run", file, "client.l2=0.5", "--out", tmp_path / "out")
    assert again.exit_code == 2 and "already holds a run" in again.output
    resumed = invoke("run", file, "client.l2=0.5", "--out", tmp_path / "out", "--resume")
    assert resumed.exit_code == 0 and f"{summary['final']['loss']:.4g}" in resumed.output


def test_sweep(invoke, file, tmp_path):
    content = {
        "experiment": "experiment.yaml",
        "seeds": [0, 1],
        "grid": {"client.l2": [0.0, 0.1], "client.optimizer.learning_rate": [0.1, 0.2]},
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(config.dump_yaml(content))
    out = tmp_path / "out"
    done = invoke("sweep", path, "--out", out)
    assert done.exit_code == 0, done.output
    text = (out / "table.md").read_text()
    assert "mean ± standard deviation over 2 seeds" in text
    assert (
        "### accuracy (%), digits (subset: 43 of 1437" in text and "| learning_rate = 0.2" in text
    )
    assert "Warning: all 8 runs: data: digits (subset: 43 of 1437" in done.output
    lines = (out / "runs.csv").read_text().splitlines()
    assert len(lines) == 9 and lines[0].startswith("client.l2,client.optimizer.learning_rate,seed")
    for name in ("accuracy.png", "accuracy.pdf", "table.csv"):
        assert (out / name).stat().st_size > 0
    assert (out / "cells").is_dir()


def test_a_title_of_ones_own_hides_nothing(invoke, file, tmp_path, monkeypatch):
    drawn, draw = [], plotting.titled
    monkeypatch.setattr(plotting, "titled", lambda *args: drawn.append(args[1:]) or draw(*args))
    path, grid = tmp_path / "sweep.yaml", {"client.optimizer.learning_rate": [0.1, 1e30]}
    content = {"experiment": "experiment.yaml", "title": "Mine", "grid": grid, "seeds": [0, 1]}
    path.write_text(config.dump_yaml(content))
    done = invoke("sweep", path, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    part = "digits (subset: 43 of 1437 train, 360 of 360 test)"
    assert drawn == [("Mine", f"{part}; mean over 2 seeds, band: ± one standard deviation")]
    assert "(2 of 2 diverged)" in (tmp_path / "out" / "table.md").read_text()
    assert "Warning: learning_rate = 1e+30, seeds 0, 1: the global model's loss" in done.output
    runs = pd.read_csv(tmp_path / "out" / "runs.csv")
    assert runs["diverged"].tolist() == [False, False, True, True] and (runs["accuracy"] <= 1).all()
    one = invoke("sweep", path, "seeds=[0]", "title=''", "--out", tmp_path / "one")
    assert one.exit_code == 0 and drawn[1] == (f"{part}; one seed",)


def test_a_single_axis_has_one_panel_and_a_backdoor_a_figure(tmp_path, monkeypatch):
    """Of one axis the labels are lines; of two the first one's are panels."""
    drawn = []
    monkeypatch.setattr(plotting, "grid_of_curves", lambda *args: drawn.append(args) or [None])
    experiment = config.from_mapping(small(rounds=1))
    metrics = {name: np.array([0.1, 0.2]) for name in ("round", "accuracy", "loss")}
    summary = {"data": {"label": "digits"}, "final": {"accuracy": 0.2}, "warnings": []}
    summary["best"] = summary["final"] | {"round": 1}

    def write(labels, **more):
        cells = [grid.Cell(one, experiment) for one in labels]
        results = [Result(experiment, metrics | more, summary, None) for _ in cells]
        drawn.clear()
        sweeps_report.write(cells, results, tmp_path)
        shape = {panel: list(lines) for panel, lines in drawn[-1][0].items()}
        return shape, [path.name for _, _, path, *_ in drawn], [one for _, _, _, *one in drawn]

    one = [{"defense": "mean"}, {"defense": "krum"}]
    assert write(one) == ({"defense": ["mean", "krum"]}, ["accuracy"], [["accuracy"]])
    two = [axis | {"attack": "alie"} for axis in one]
    success = {"attack_success_rate": np.array([0.5, 0.5])}
    assert write(two, **success) == (
        {"mean": ["alie"], "krum": ["alie"]},
        ["attack_success_rate", "accuracy"],
        [["accuracy", "attack_success_rate"], ["accuracy"]],  # beside each other
    )
    assert write([{}])[0] == {"": ["run"]}


def test_list(invoke):
    done = invoke("list")
    assert done.exit_code == 0
    for result in registry.KINDS.values():
        assert f"{result.kind}s" in done.output
        for name in result.names():
            assert name in done.output and registry.summary(result.get(name)) in done.output
    only = invoke("list", "attacks")
    assert "alie" in only.output and "trimmed_mean" not in only.output


@pytest.mark.parametrize("name", NAMES)
def test_show(invoke, name):
    done = invoke("show", name)
    assert done.exit_code == 0
    result, cls = registry.find(name)
    assert f"{name} ({result.kind})" in done.output
    assert registry.summary(cls) in done.output and "Source:" in done.output
    for field in cls.__dataclass_fields__.values():
        assert field.name in done.output and field.metadata["doc"] in done.output


@pytest.mark.parametrize("name", keys.SECTIONS)
def test_show_sections(invoke, name):
    done = invoke("show", name)
    assert done.exit_code == 0 and f"{name} (section)" in done.output
    for field in dataclasses.fields(keys.SECTIONS[name]):
        assert field.name in done.output and field.metadata["doc"] in done.output


def test_show_optimizers(invoke):
    done = invoke("show", "optimizer")
    assert done.exit_code == 0
    for name in (*optimizers.OPTIMIZERS, *optimizers.SCHEDULES):
        assert name in done.output
    adam = invoke("show", "adam").output
    assert "adam (optimizer), optax.adam" in adam and ">= 0 and < 1" in adam
    both = invoke("show", "sgd").output  # a client, and an optimizer too
    assert "sgd (client)" in both and "sgd (optimizer), optax.sgd" in both
    rate = invoke("show", "cosine_decay_schedule").output
    assert "schedule of a learning rate" in rate and "decay_steps" in rate and "required" in rate


def test_show_says_why_an_end_is_missing(invoke):
    text = "> 0 (no upper end: lengths of updates depend on network and learning rate)"
    assert text in invoke("show", "clip_norm").output


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["show", "evaluaton"], "Did you mean 'evaluation'?"),
        (["show", "kurm"], "Did you mean 'krum'?"),
        (["list", "attack"], "Did you mean 'attacks'?"),
        (["run", "absent.yaml", "--out", "{out}"], "No configuration file 'absent.yaml'"),
        (["run", "{file}", "rouns=3", "--out", "{out}"], "Did you mean 'rounds'?"),
        (["run", "{file}", "rounds", "--out", "{out}"], "must look like key.path=value"),
        (["run", "{file}", "client.batch_size=99", "--out", "{out}"], "batch_size must be <= 9"),
        (["run", "{file}", "--out", "{out}", "--resume", "--overwrite"], "not both"),
        (
            [
                "run",
                "{file}",
                "data.name=mnist",
                "data.download=false",
                "--out",
                "{out}",
                "--data-dir",
                "{out}",
            ],
            "Data set 'mnist' is not in",
        ),
        (["sweep", "{file}", "--out", "{out}"], "is an experiment, not a sweep"),
    ],
)
def test_errors(invoke, file, tmp_path, monkeypatch, arguments, part):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))  # and put back, as --data-dir sets it
    places = {"file": file, "out": tmp_path / "out"}
    done = invoke(*(argument.format(**places) for argument in arguments))
    assert done.exit_code == 2
    assert "Error:" in done.output and part in done.output
    assert "Traceback" not in done.output and isinstance(done.exception, SystemExit)


def test_partition_picture(invoke, tmp_path):
    path = tmp_path / "experiment.yaml"
    path.write_text("data: {name: digits, num_clients: 12, partition: label_groups}\n")
    out = tmp_path / "folder" / "clients.png"
    done = invoke(
        "partition",
        path,
        "--out",
        out,
        "threat.num_malicious=3",
        "attack=zero",
        "server.root={size: 50}",
    )
    assert done.exit_code == 0 and out.stat().st_size > 5000 and str(out) in done.output
    wrong = invoke("partition", path, "--out", out, "data.partition=dirichlett")
    assert wrong.exit_code == 2 and "Did you mean 'dirichlet'" in wrong.output


@pytest.mark.parametrize(
    ("command", "title"),
    [
        ("partition", "iid, digits (subset: 43 of 1437 train, 360 of 360 test), seed 0"),
        ("trigger", "trojan, digits (subset: 43 of 1437 train, 360 of 360 test)"),
    ],
)
def test_pictures_name_the_part_of_the_data(invoke, file, tmp_path, monkeypatch, command, title):
    drawn = []
    name = {"partition": "class_table", "trigger": "trigger_pictures"}[command]
    monkeypatch.setattr(plotting, name, lambda result, title, path: drawn.append(title) or [path])
    backdoor = "evaluation.backdoor={name: trojan, base: 5, target: 7}"
    done = invoke(command, file, backdoor, "--out", tmp_path / "picture.png")
    assert done.exit_code == 0 and drawn == [title], done.output


def test_trigger(invoke, tmp_path):
    path, out = tmp_path / "experiment.yaml", tmp_path / "folder" / "trigger.png"
    attack = {"name": "trojan", "base": 5, "target": 7, "split": 2}
    path.write_text(config.dump_yaml(small(attack=attack, threat={"num_malicious": 2})))
    done = invoke("trigger", path, "--out", out, "--count", "2")
    assert done.exit_code == 0, done.output
    assert str(out) in done.output and out.stat().st_size > 1000
    assert out.with_suffix(".pdf").exists()
    clean = invoke("trigger", path, "attack=null", "--out", tmp_path / "none.png")
    assert clean.exit_code == 2 and "no backdoor to show" in clean.output
    assert not (tmp_path / "none.png").exists()


def test_audit(invoke, tmp_path):
    path, run = tmp_path / "experiment.yaml", tmp_path / "run"
    path.write_text(config.dump_yaml(small(rounds=2)))
    assert invoke("run", path, "--out", run).exit_code == 0
    report = tmp_path / "reports" / "audit.md"
    done = invoke("audit", run, "--eps", "0.1", "--images", "40", "--steps", "3", "--out", report)
    assert done.exit_code == 0, done.output
    verdict = r"^\*\*(Believable|Overstated|Not believable): "
    assert "withstand" in done.output and re.search(verdict, report.read_text(), re.MULTILINE)
    refused = invoke("audit", run)
    assert refused.exit_code == 2 and "give eps" in refused.output


def test_help_names_every_command(invoke):
    done = invoke("--help")
    assert done.exit_code == 0
    for command in ("run", "sweep", "status", "list", "show", "trigger", "partition", "audit"):
        assert command in done.output

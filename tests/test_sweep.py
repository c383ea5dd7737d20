"""Sweeps: grids and labels, what is run and what is kept, groups, tables."""

import json
import threading

import filelock
import numpy as np
import pandas as pd
import pytest
from helpers import same_bits, small

from fedjax_sec import config, experiment, sweep
from fedjax_sec import program as program_lib
from fedjax_sec.schema import ConfigError

BASE = small(rounds=2, evaluation={"every": 1}, threat={"num_malicious": 1})
GRID = {
    "attack": {
        "clean": None,
        "flip": "sign_flip",
        "flip more": {"name": "sign_flip", "scale": 3.0},
    },
    "defense": ["mean", "median"],
}


@pytest.fixture
def programs(monkeypatch):
    """The programs that are built while a test runs."""
    built, original = [], program_lib.Program.__init__

    def record(self, *args, **kwargs):
        built.append(self)
        original(self, *args, **kwargs)

    monkeypatch.setattr(program_lib.Program, "__init__", record)
    return built


def test_grid_is_a_product_of_axes_and_seeds():
    cells = sweep.make_cells(BASE, GRID, seeds=(3, 4), overrides={"client.l2": 0.5})
    assert len(cells) == 3 * 2 * 2
    assert [cell.name for cell in cells[:3]] == [
        "clean_mean/seed3", "clean_mean/seed4", "clean_median/seed3",
    ]  # fmt: skip
    assert cells[-1].labels == {"attack": "flip more", "defense": "median"}
    last = cells[-1].experiment
    assert last.attack.stages[0].scale == 3.0 and last.seed == 4 and last.client.l2 == 0.5
    assert last.defense.stages[0].registered_name == "median"
    assert len({cell.experiment.structure() for cell in cells}) == 4


def test_labels_of_a_list():
    grid = {"defense": ["mean", {"name": "krum", "num_byzantine": 1}, ["clip_norm", "median"]]}
    cells = sweep.make_cells(BASE, grid)
    assert [cell.labels["defense"] for cell in cells] == [
        "mean", "krum num_byzantine=1", "clip_norm + median",
    ]  # fmt: skip
    assert cells[1].name == "krum-num-byzantine=1/seed0"


def test_linked_axis_changes_several_keys():
    grid = {
        "(setting)": {
            "weak": {"attack": "sign_flip", "client.optimizer.learning_rate": 0.1},
            "strong": {"attack": {"name": "sign_flip", "scale": 9.0}, "threat.num_malicious": 2},
        }
    }
    weak, strong = sweep.make_cells(BASE, grid)
    assert weak.experiment.client.optimizer.traced["learning_rate"] == 0.1
    assert weak.experiment.threat.num_malicious == 1
    assert strong.experiment.threat.num_malicious == 2
    assert strong.experiment.attack.stages[0].scale == 9.0
    assert strong.labels == {"(setting)": "strong"}


@pytest.mark.parametrize(
    ("grid", "part"),
    [
        ({"defense": []}, "grid.defense is empty"),
        ({"defense": 3}, "expected a list or {label: value}"),
        ({"(x)": {"a": 3}}, "grid.(x).a: expected dotted keys"),
        ({"defense": {"a b": "mean", "a-b": "median"}}, "two cells have the same name"),
        ({"defense": ["mean", "mean"]}, "values look alike"),
        ({"defence": ["mean"]}, "Did you mean 'defense'?"),
        ({"defense": ["mean", "kurm"]}, "Did you mean 'krum'?"),
    ],
)
def test_bad_grids(grid, part, programs):
    with pytest.raises(ConfigError) as error:
        sweep.make_cells(BASE, grid)
    assert part in str(error.value) and not programs


def test_file_with_an_experiment_beside_it(tmp_path):
    (tmp_path / "base.yaml").write_text(config.dump_yaml(BASE))
    content = {"experiment": "base.yaml", "grid": GRID, "seeds": [1, 2], "title": "T"}
    (tmp_path / "sweep.yaml").write_text(config.dump_yaml(content))
    settings, cells = sweep.load(tmp_path / "sweep.yaml", ["overrides={rounds: 5}", "seeds=[7]"])
    assert settings.title == "T" and len(cells) == 6
    assert {(c.experiment.rounds, c.experiment.seed) for c in cells} == {(5, 7)}


def test_groups_results_and_finished_cells(tmp_path, programs):
    cells = sweep.make_cells(BASE, GRID, seeds=(0, 1))
    calls = []
    found = sweep.run_cells(
        cells, tmp_path, on_group=lambda *args: calls.append(args) or (lambda done, rows: None)
    )
    # Clean or attacked, mean or median; both strengths of the attack share a program.
    assert len(programs) == 4 and [len(members) for _, _, members in calls] == [2, 2, 4, 4]
    assert all(1 <= program.traces <= 2 for program in programs)
    assert not list((tmp_path / "groups").iterdir())
    for cell, result in zip(cells, found, strict=True):
        assert result.experiment == cell.experiment
        saved = json.loads((tmp_path / "cells" / cell.name / "summary.json").read_text())
        assert saved["final"]["accuracy"] == result.summary["final"]["accuracy"]
    single = experiment.train([cells[-1].experiment])[0]
    for name, values in single.metrics.items():
        np.testing.assert_allclose(values, found[-1].metrics[name], rtol=1e-4, atol=1e-5)

    # Nothing is run again; what is added is.
    files = sorted((tmp_path / "cells").rglob("metrics.jsonl"))
    before = [(file.stat().st_mtime_ns, file.read_bytes()) for file in files]
    programs.clear()
    again = sweep.run_cells(cells, tmp_path)
    assert not programs
    assert [(file.stat().st_mtime_ns, file.read_bytes()) for file in files] == before
    same_bits([r.metrics["accuracy"] for r in again], [r.metrics["accuracy"] for r in found])
    more = sweep.make_cells(BASE, GRID, seeds=(0, 1, 2))
    names = {cell.name for cell in cells}
    ran = []
    sweep.run_cells(more, tmp_path, on_group=lambda i, n, members: ran.extend(members))
    assert {cell.name for cell in ran} == {c.name for c in more} - names
    with pytest.raises(ConfigError, match="another configuration; it differs in rounds"):
        sweep.run_cells(sweep.make_cells(BASE, GRID, overrides={"rounds": 3}), tmp_path)


class Stop(Exception):
    """What interrupts a sweep in a test."""


def stop_at_three(number, total, members):
    def callback(done, rows):
        if done == 3:
            raise Stop

    return callback


def test_interrupted_group_resumes_to_the_same_bits(tmp_path, programs):
    base = BASE | {"rounds": 6, "checkpoint": {"every": 2}}
    cells = sweep.make_cells(base, {"attack": {"flip": "sign_flip"}}, seeds=(0, 1))
    whole = sweep.run_cells(cells, tmp_path / "whole")

    with pytest.raises(Stop):
        sweep.run_cells(cells, tmp_path / "cut", on_group=stop_at_three)
    assert len(list((tmp_path / "cut" / "groups").iterdir())) == 1
    seen = []
    resumed = sweep.run_cells(
        cells, tmp_path / "cut", on_group=lambda *a: lambda done, rows: seen.append(done)
    )
    assert seen == [3, 4, 5, 6]  # from the checkpoint after round 2
    for one, other, cell in zip(whole, resumed, cells, strict=True):
        same_bits(one.metrics, other.metrics)
        same_bits(one.params, other.params)
        rows, expected = (
            (tmp_path / name / "cells" / cell.name / "metrics.jsonl").read_text()
            for name in ("cut", "whole")
        )
        assert rows == expected
    assert not list((tmp_path / "cut" / "groups").iterdir())


# --- Several processes in one folder --------------------------------------------------------------


def test_processes_share_a_folder(tmp_path):
    """Threads stand in for processes: a lock is held by who took it, in either case."""
    cells = sweep.make_cells(BASE, GRID)
    alone = sweep.run_cells(cells, tmp_path / "alone")
    ran, found, both = [[], []], {}, threading.Barrier(2, timeout=120)

    def work(number):
        def on_group(place, total, members):
            if not ran[number]:
                both.wait()  # until each of the two has a group
            ran[number] += [cell.name for cell in members]

        found[number] = sweep.run_cells(cells, tmp_path / "shared", on_group=on_group)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ran[0] and ran[1] and sorted(ran[0] + ran[1]) == sorted(cell.name for cell in cells)
    for results in found.values():
        for one, other in zip(results, alone, strict=True):
            same_bits(one.metrics["accuracy"], other.metrics["accuracy"])
    assert not list((tmp_path / "shared" / "groups").iterdir())


def test_a_group_whose_process_died_goes_on_in_another(tmp_path):
    base = BASE | {"rounds": 6, "checkpoint": {"every": 2}}
    cells = sweep.make_cells(base, {"attack": {"flip": "sign_flip", "clean": None}})
    whole = sweep.run_cells(cells, tmp_path / "whole")
    with pytest.raises(Stop):
        sweep.run_cells(cells, tmp_path / "cut", on_group=stop_at_three)
    groups = {
        json.loads(path.read_text())["cells"][0]: path.parent.name
        for path in (tmp_path / "cut" / "groups").glob("*/members.json")
    }
    # The process that dies is not dead yet: it still holds its lock, until somebody waits for it.
    held = filelock.FileLock(tmp_path / "cut" / "locks" / f"{groups['flip/seed0']}.lock")
    held.acquire()
    waited, seen = [], []

    def on_wait(left):
        waited.append([cell.name for cell in left])
        held.release()

    found = sweep.run_cells(
        cells, tmp_path / "cut", on_wait=on_wait,
        on_group=lambda number, total, members: lambda done, rows: seen.append(
            (members[0].name, done)
        ),
    )  # fmt: skip
    assert waited == [["flip/seed0"]]
    assert [name for name, done in seen][:7] == ["clean/seed0"] * 7
    assert seen[7:] == [("flip/seed0", done) for done in (3, 4, 5, 6)]  # from its checkpoint
    for one, expected in zip(found, whole, strict=True):
        same_bits(one.metrics, expected.metrics)


def test_cells_that_another_sweep_runs_are_refused(tmp_path, programs):
    cells = sweep.make_cells(BASE, {"defense": ["mean"]}, seeds=(0, 1))

    def while_it_runs(number, total, members):
        with pytest.raises(ConfigError, match="another process is running 'mean/seed0' together"):
            sweep.run_cells(cells[:1], tmp_path)

    sweep.run_cells(cells, tmp_path, on_group=while_it_runs)
    assert len(programs) == 1


def test_a_folder_of_something_else_is_left_alone(tmp_path, programs):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="in use by something else"):
        sweep.run_cells(sweep.make_cells(BASE, {}), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"] and not programs


# --- Tables -------------------------------------------------------------------------------------


def fake_results(cells, values):
    """Results with given final accuracies, twice as high at best."""
    found = []
    for cell, value in zip(cells, values, strict=True):
        summary = {"final": {"accuracy": value}, "best": {"accuracy": 2 * value}}
        metrics = {"attack_success_rate": np.array([0.0, value / 2])}
        found.append(experiment.Result(cell.experiment, metrics, summary, None))
    return found


def test_table_values_are_means_and_deviations_over_seeds():
    cells = sweep.make_cells(BASE, GRID, seeds=(0, 1, 2))
    values = np.random.default_rng(0).random(len(cells))
    frame = sweep.to_frame(cells, fake_results(cells, values))
    assert list(frame.columns) == [
        "attack", "defense", "seed", "final accuracy", "best accuracy", "attack success rate",
    ]  # fmt: skip
    np.testing.assert_allclose(frame["best accuracy"], 200 * values)
    np.testing.assert_allclose(frame["attack success rate"], 50 * values)
    table = sweep.pivot(frame, "final accuracy")
    assert list(table.index) == ["clean", "flip", "flip more"]
    assert list(table.columns) == ["mean", "median"]
    grouped = pd.DataFrame(
        {"value": 100 * values, "row": frame["attack"], "column": frame["defense"]}
    ).groupby(["row", "column"])["value"]
    for (row, column), mean in grouped.mean().items():
        spread = grouped.std().loc[(row, column)]
        assert table.loc[row, column] == f"{mean:.1f} ± {spread:.1f}"


def test_table_of_one_axis_and_of_one_seed():
    cells = sweep.make_cells(BASE, {"defense": ["median", "mean"]})
    frame = sweep.to_frame(cells, fake_results(cells, [0.5, 0.25]))
    table = sweep.pivot(frame, "final accuracy")
    assert table["final accuracy"].tolist() == ["50.0", "25.0"]
    assert list(table.index) == ["median", "mean"]
    alone = sweep.make_cells(BASE, {})
    table = sweep.pivot(sweep.to_frame(alone, fake_results(alone, [0.125])), "best accuracy")
    assert table.to_numpy().tolist() == [["25.0"]]

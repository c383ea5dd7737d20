"""Sweeps: grids and labels, what is run and what is kept, groups, tables."""

import dataclasses
import json
import threading

import filelock
import numpy as np
import pandas as pd
import pytest
from helpers import same_bits, small
from programs import train

from fedjax_sec import sweeps
from fedjax_sec.core import ConfigError, registry
from fedjax_sec.report import tables
from fedjax_sec.runs import config, experiment
from fedjax_sec.runs import program as program_lib

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
    cells = sweeps.make_cells(BASE, GRID, seeds=(3, 4), overrides={"client.l2": 0.5})
    assert len(cells) == 3 * 2 * 2
    assert [cell.name for cell in cells[:3]] == [
        "clean_mean/seed3",
        "clean_mean/seed4",
        "clean_median/seed3",
    ]
    assert cells[-1].labels == {"attack": "flip more", "defense": "median"}
    last = cells[-1].experiment
    assert last.attack.stages[0].scale == 3.0 and last.seed == 4 and last.client.l2 == 0.5
    assert last.defense.stages[0].registered_name == "median"
    assert len({cell.experiment.structure() for cell in cells}) == 4


def test_labels_of_a_list():
    grid = {"defense": ["mean", {"name": "krum", "num_byzantine": 1}, ["clip_norm", "median"]]}
    cells = sweeps.make_cells(BASE, grid)
    assert [cell.labels["defense"] for cell in cells] == [
        "mean",
        "krum num_byzantine=1",
        "clip_norm + median",
    ]
    assert cells[1].name == "krum-num-byzantine=1/seed0"


def test_linked_axis_changes_several_keys():
    grid = {
        "(setting)": {
            "weak": {"attack": "sign_flip", "client.optimizer.learning_rate": 0.1},
            "strong": {"attack": {"name": "sign_flip", "scale": 9.0}, "threat.num_malicious": 2},
        }
    }
    weak, strong = sweeps.make_cells(BASE, grid)
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
        ({"(x)": {"a": 3}}, "grid.(x).a: expected a mapping of dotted keys"),
        ({"defense": {"a b": "mean", "a-b": "median"}}, "two cells have the same name"),
        ({"defense": ["mean", "mean"]}, "values look alike"),
        ({"defence": ["mean"]}, "Did you mean 'defense'?"),
        ({"defense": ["mean", "kurm"]}, "Did you mean 'krum'?"),
    ],
)
def test_bad_grids(grid, part, programs):
    with pytest.raises(ConfigError) as error:
        sweeps.make_cells(BASE, grid)
    assert part in str(error.value) and not programs


def test_file_with_an_experiment_beside_it(tmp_path):
    (tmp_path / "base.yaml").write_text(config.dump_yaml(BASE))
    content = {"experiment": "base.yaml", "grid": GRID, "seeds": [1, 2], "title": "T"}
    (tmp_path / "sweeps.yaml").write_text(config.dump_yaml(content))
    settings, cells = sweeps.load(tmp_path / "sweeps.yaml", ["overrides={rounds: 5}", "seeds=[7]"])
    assert settings.title == "T" and len(cells) == 6
    assert {(c.experiment.rounds, c.experiment.seed) for c in cells} == {(5, 7)}


@pytest.mark.slow
def test_groups_results_and_finished_cells(tmp_path, programs):
    cells = sweeps.make_cells(BASE, GRID, seeds=(0, 1))
    calls = []
    got = sweeps.run_cells(
        cells, tmp_path, on_group=lambda *args: calls.append(args) or (lambda done, rows: None)
    )
    # Clean or attacked, mean or median; both strengths of the attack share a program.
    assert len(programs) == 4 and [len(members) for _, _, members in calls] == [2, 2, 4, 4]
    assert all(1 <= program.traces <= 2 for program in programs)
    assert not list((tmp_path / "groups").iterdir())
    for cell, result in zip(cells, got, strict=True):
        assert result.experiment == cell.experiment
        saved = json.loads((tmp_path / "cells" / cell.name / "summary.json").read_text())
        assert saved["final"]["accuracy"] == result.summary["final"]["accuracy"]
    single = train([cells[-1].experiment])[0]
    for name, values in single.metrics.items():
        np.testing.assert_allclose(values, got[-1].metrics[name], rtol=1e-4, atol=1e-5)

    # Nothing is run again; what is added is.
    files = sorted((tmp_path / "cells").rglob("metrics.jsonl"))
    before = [(file.stat().st_mtime_ns, file.read_bytes()) for file in files]
    programs.clear()
    again = sweeps.run_cells(cells, tmp_path)
    assert not programs
    assert [(file.stat().st_mtime_ns, file.read_bytes()) for file in files] == before
    same_bits([r.metrics["accuracy"] for r in again], [r.metrics["accuracy"] for r in got])
    more = sweeps.make_cells(BASE, GRID, seeds=(0, 1, 2))
    names = {cell.name for cell in cells}
    ran = []
    sweeps.run_cells(more, tmp_path, on_group=lambda i, n, members: ran.extend(members))
    assert {cell.name for cell in ran} == {c.name for c in more} - names
    with pytest.raises(ConfigError, match="another configuration; it differs in rounds"):
        sweeps.run_cells(sweeps.make_cells(BASE, GRID, overrides={"rounds": 3}), tmp_path)


class Stop(Exception):
    """The interruption of a sweep in a test."""


def stop_at_three(number, total, members):
    def callback(done, rows):
        if done == 3:
            raise Stop

    return callback


def test_interrupted_group_resumes_to_the_same_bits(tmp_path, programs):
    base = BASE | {"rounds": 6, "checkpoint": {"every": 2, "keep_params": True}}
    cells = sweeps.make_cells(base, {"attack": {"flip": "sign_flip"}}, seeds=(0, 1))
    whole = sweeps.run_cells(cells, tmp_path / "whole")

    with pytest.raises(Stop):
        sweeps.run_cells(cells, tmp_path / "cut", on_group=stop_at_three)
    assert len(list((tmp_path / "cut" / "groups").iterdir())) == 1
    seen = []
    resumed = sweeps.run_cells(
        cells, tmp_path / "cut", on_group=lambda *a: lambda done, rows: seen.append(done)
    )
    assert seen == [3, 4, 5, 6]  # from the checkpoint after round 2
    for one, other, cell in zip(whole, resumed, cells, strict=True):
        same_bits(one.metrics, other.metrics)
        for name in ("metrics.jsonl", "params.npy"):
            written, expected = (
                (tmp_path / run / "cells" / cell.name / name).read_bytes()
                for run in ("cut", "whole")
            )
            assert written == expected
    assert not list((tmp_path / "cut" / "groups").iterdir())


# --- Several processes in one folder --------------------------------------------------------------


@pytest.mark.slow
def test_processes_share_a_folder(tmp_path):
    """Threads stand in for processes: a lock is held by who took it, in either case."""
    cells = sweeps.make_cells(BASE, GRID)
    alone = sweeps.run_cells(cells, tmp_path / "alone")
    ran, got, both = [[], []], {}, threading.Barrier(2, timeout=120)

    def work(number):
        def on_group(place, total, members):
            if not ran[number]:
                both.wait()  # until each of the two has a group
            ran[number] += [cell.name for cell in members]

        got[number] = sweeps.run_cells(cells, tmp_path / "shared", on_group=on_group)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ran[0] and ran[1] and sorted(ran[0] + ran[1]) == sorted(cell.name for cell in cells)
    for results in got.values():
        for one, other in zip(results, alone, strict=True):
            same_bits(one.metrics["accuracy"], other.metrics["accuracy"])
    assert not list((tmp_path / "shared" / "groups").iterdir())


@pytest.mark.slow
def test_a_group_whose_process_died_goes_on_in_another(tmp_path):
    base = BASE | {"rounds": 6, "checkpoint": {"every": 2}}
    cells = sweeps.make_cells(base, {"attack": {"flip": "sign_flip", "clean": None}})
    whole = sweeps.run_cells(cells, tmp_path / "whole")
    with pytest.raises(Stop):
        sweeps.run_cells(cells, tmp_path / "cut", on_group=stop_at_three)
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

    got = sweeps.run_cells(
        cells,
        tmp_path / "cut",
        on_wait=on_wait,
        on_group=lambda number, total, members: (
            lambda done, rows: seen.append((members[0].name, done))
        ),
    )
    assert waited == [["flip/seed0"]]
    assert [name for name, done in seen][:7] == ["clean/seed0"] * 7
    assert seen[7:] == [("flip/seed0", done) for done in (3, 4, 5, 6)]  # from its checkpoint
    for one, expected in zip(got, whole, strict=True):
        same_bits(one.metrics, expected.metrics)


def test_cells_that_another_sweep_runs_are_refused(tmp_path, programs):
    cells = sweeps.make_cells(BASE, {"defense": ["mean"]}, seeds=(0, 1))

    def while_it_runs(number, total, members):
        with pytest.raises(ConfigError, match="another process is running 'mean/seed0' together"):
            sweeps.run_cells(cells[:1], tmp_path)

    sweeps.run_cells(cells, tmp_path, on_group=while_it_runs)
    assert len(programs) == 1


def test_a_folder_of_something_else_is_left_alone(tmp_path, programs):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="in use by something else"):
        sweeps.run_cells(sweeps.make_cells(BASE, {}), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"] and not programs


# --- Tables -------------------------------------------------------------------------------------


def fake_results(cells, values, **summary):
    """Results with given final accuracies, twice as high at best; `summary` is the same for all."""
    got = []
    for cell, value in zip(cells, values, strict=True):
        final = {"round": 2.0, "accuracy": value, "loss": 1.0}
        if cell.experiment.backdoor is not None:
            final["attack_success_rate"] = value / 2
        one = {"final": final, "best": {"accuracy": 2 * value, "round": 1.0}, "diverged": False}
        one |= {"excluded_updates": 0, "malicious_clients": [3, 1], "data": {"label": "digits"}}
        got.append(experiment.Result(cell.experiment, {}, one | summary, None))
    return got


def test_runs_are_one_row_each_with_fractions_and_the_names_of_the_metrics():
    cells = sweeps.make_cells(BASE, GRID, seeds=(0, 1, 2))
    values = np.random.default_rng(0).random(len(cells))
    frame = tables.to_frame(cells, fake_results(cells, values))
    assert list(frame.columns) == [
        "attack",
        "defense",
        "seed",
        "rounds",
        "accuracy",
        "loss",
        "best_accuracy",
        "best_round",
        "diverged",
        "excluded_updates",
        "malicious_clients",
    ]
    np.testing.assert_allclose(frame["accuracy"], values)
    np.testing.assert_allclose(frame["best_accuracy"], 2 * values)
    assert set(frame["malicious_clients"]) == {"3 1"} and set(frame["rounds"]) == {2}


def test_table_values_are_means_and_deviations_over_seeds():
    cells = sweeps.make_cells(BASE, GRID, seeds=(0, 1, 2))
    values = np.random.default_rng(0).random(len(cells))
    frame = tables.to_frame(cells, fake_results(cells, values))
    table = tables.pivot(frame, ["attack", "defense"], "accuracy")
    assert list(table.index) == ["clean", "flip", "flip more"] and table.index.name == "attack"
    assert list(table.columns) == ["mean", "median"]
    grouped = pd.DataFrame(
        {"value": values, "row": frame["attack"], "column": frame["defense"]}
    ).groupby(["row", "column"])["value"]
    long = tables.summarized(frame, ["attack", "defense"]).set_index(
        ["metric", "attack", "defense"]
    )
    for (row, column), mean in grouped.mean().items():
        spread = grouped.std().loc[(row, column)]
        assert table.loc[row, column] == f"{100 * mean:.1f} ± {100 * spread:.1f}"
        one = long.loc["accuracy", row, column]
        np.testing.assert_allclose([one["mean"], one["std"]], [mean, spread])
        assert (one["seeds"], one["diverged"]) == (3, 0)
    heading, said, _ = tables.tables(cells, fake_results(cells, values))["best_accuracy"]
    assert heading == "best_accuracy (%), digits, mean ± standard deviation over 3 seeds"
    assert said == "At each run's best evaluation (`best_round` in `runs.csv`)."


def test_table_of_one_axis_and_of_one_seed():
    cells = sweeps.make_cells(BASE, {"defense": ["median", "mean"]})
    got = fake_results(cells, [0.5, 0.25])
    heading, _, table = tables.tables(cells, got)["accuracy"]
    assert heading == "accuracy (%), digits, one seed"
    assert table["accuracy"].tolist() == ["50.0", "25.0"]
    assert list(table.index) == ["median", "mean"]
    alone = sweeps.make_cells(BASE, {})
    got = fake_results(alone, [0.125])
    table = tables.tables(alone, got)["best_accuracy"][2]
    assert table.to_numpy().tolist() == [["25.0"]]


def test_labels_of_several_axes_can_be_read_alone():
    grid = {"defense": ["mean"], "client.l2": [0.0, 0.5], "attack": [None, "sign_flip"]}
    cells = sweeps.make_cells(BASE, grid)
    table = tables.tables(cells, fake_results(cells, [0.1, 0.2, 0.3, 0.4]))["accuracy"][2]
    assert list(table.columns) == [
        "l2 = 0.0 / attack = none",
        "l2 = 0.0 / sign_flip",
        "l2 = 0.5 / attack = none",
        "l2 = 0.5 / sign_flip",
    ]
    assert cells[0].title == "mean / l2 = 0.0 / attack = none"


def test_an_axis_may_have_the_name_of_a_column():
    cells = sweeps.make_cells(BASE, {"rounds": {"short": 2, "long": 4}}, seeds=(0, 1))
    got = fake_results(cells, [0.1, 0.2, 0.3, 0.4])
    frame = tables.to_frame(cells, got)
    assert frame["grid.rounds"].tolist() == ["short", "short", "long", "long"]
    assert frame["rounds"].tolist() == [2, 2, 4, 4]
    assert tables.tables(cells, got)["accuracy"][2]["accuracy"].tolist() == [
        "15.0 ± 7.1",
        "35.0 ± 7.1",
    ]


def test_cells_say_what_diverged_and_how_many_seeds_they_are_of():
    cells = sweeps.make_cells(BASE, {"defense": ["mean", "median"]}, seeds=(0, 1))
    got = fake_results(cells, [0.1, 0.2, 0.3, 0.4])
    for number in (0, 1, 2):
        got[number].summary["diverged"] = True
    assert tables.tables(cells, got)["accuracy"][2]["accuracy"].tolist() == [
        "15.0 ± 7.1 (2 of 2 diverged)",
        "35.0 ± 7.1 (1 of 2 diverged)",
    ]
    got[3].summary["diverged"] = True
    heading, _, table = tables.tables(cells[1:], got[1:])["accuracy"]
    assert heading == "accuracy (%), digits, mean ± standard deviation over 1 to 2 seeds"
    assert table["accuracy"].tolist() == [
        "20.0 (one seed, diverged)",
        "35.0 ± 7.1 (2 of 2 diverged)",
    ]
    assert tables.to_frame(cells, got)["diverged"].tolist() == [True] * 4


def test_every_warning_names_its_runs():
    cells = sweeps.make_cells(BASE, GRID, seeds=(0, 1))
    got = fake_results(cells, [0.5] * len(cells))
    for result in got:
        result.summary["warnings"] = ["a part of the data"]
    for number in (0, 1, 5):
        got[number].summary["warnings"] = ["the loss is not finite", "a part of the data"]
    assert tables.warnings_of(cells, got) == [
        "clean / mean, seeds 0, 1; flip / mean, seed 1: the loss is not finite",
        "all 12 runs: a part of the data",
    ]
    for result in got[1:]:
        result.summary["warnings"] = ["a part of the data"] * (result is not got[1])
    got[0].summary["warnings"] = []
    assert tables.warnings_of(cells[:1], got[:1]) == []
    assert tables._named_runs(cells[:11], 12, most=2) == (
        "clean / mean, seeds 0, 1; clean / median, seeds 0, 1; and 4 more"
    )


def test_tables_name_every_data_set_of_a_sweep():
    cells = sweeps.make_cells(BASE, {"data.max_train": [43, 60]})
    got = fake_results(cells, [0.1, 0.2])
    got[1] = got[1]._replace(summary=got[1].summary | {"data": {"label": "other"}})
    assert tables.tables(cells, got)["accuracy"][0] == "accuracy (%), digits / other, one seed"


# --- The base rate of a backdoor -----------------------------------------------------------------

TROJAN = {"name": "trojan", "base": 5, "target": 7}


@pytest.mark.parametrize(
    "name", [n for n in registry.attacks.names() if registry.attacks.get(n).stage == "data"]
)
def test_cells_without_an_attack_measure_the_attacks_backdoor(name):
    fields = {
        "trojan": TROJAN,
        "label_flip": {"name": name, "base": 5, "target": 7},
        "feature_trigger": {"name": name, "target": 1},
    }
    grid = {
        "attack": {"clean": None, "backdoor": fields.get(name, name)},
        "defense": ["mean", "median"],
    }
    cells = sweeps.make_cells(BASE, grid, seeds=(0, 1))
    alone = sweeps.make_cells(BASE, {"defense": ["mean", "median"]}, seeds=(0, 1))
    for cell, mine in zip(cells[:4], alone, strict=True):
        assert cell.experiment.evaluation.backdoor == cells[-1].experiment.attack.backdoor
        rest = dataclasses.replace(cell.experiment.evaluation, backdoor=None)
        assert dataclasses.replace(cell.experiment, evaluation=rest) == mine.experiment
    assert all(cell.experiment.evaluation.backdoor is None for cell in cells[4:])
    got = fake_results(cells, [0.5] * 8)
    _, said, table = tables.tables(cells, got)["attack_success_rate"]
    assert said.endswith(
        "Without an attack it is the base rate: of the backdoor that nobody taught."
    )
    assert table.loc["clean", "mean"] == "25.0 ± 0.0"


def test_the_base_rate_changes_no_other_number(tmp_path):
    grid = {"attack": {"clean": None, "trojan": TROJAN}}
    base = BASE | {"data": BASE["data"] | {"max_train": 100}}
    both, alone = sweeps.make_cells(base, grid), sweeps.make_cells(base, {})
    with_rate = train([both[0].experiment])[0].metrics
    without = train([alone[0].experiment])[0].metrics
    assert 0 <= with_rate["attack_success_rate"][-1] <= 1
    assert set(with_rate) - set(without) == {
        "attack_success_rate",
        "base_class_accuracy",
        "backdoor_loss",
    }
    same_bits({name: with_rate[name] for name in without}, without)


@pytest.mark.parametrize(
    ("base", "grid", "overrides"),
    [
        ({}, {"attack": {"clean": None, "a": TROJAN, "b": TROJAN | {"target": 1}}}, {}),
        ({}, {"attack": {"clean": None, "a": TROJAN}}, {"evaluation.backdoor": None}),
        ({}, {"(a)": {"clean": {"evaluation.backdoor": None}, "a": {"attack": TROJAN}}}, {}),
        (
            {"evaluation": {"backdoor": TROJAN | {"target": 1}}},
            {"attack": {"clean": None, "a": TROJAN}},
            {},
        ),
    ],
)
def test_what_is_ambiguous_or_given_is_left_alone(base, grid, overrides):
    cells = sweeps.make_cells(BASE | base, grid, overrides=overrides)
    given = config.from_mapping(BASE | base).evaluation.backdoor
    assert all(cell.experiment.evaluation.backdoor == given for cell in cells)
    if given is None:
        said = tables.about_backdoor(cells)
        assert "have no base rate" in said and "evaluation.backdoor names one" in said


# --- Nothing that is set is lost -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "overrides", "part"),
    [
        (
            {"defense": ["mean"]},
            {"defense": "median"},
            "overrides.defense would do nothing: grid.defense replaces it in every cell",
        ),
        ({"defense": ["mean"]}, {"defense.num_byzantine": 1}, "overrides.defense.num_byzantine w"),
        (
            {"(x)": {"a": {"client.l2": 0.1}, "b": {"client.l2": 0.2}}},
            {"client.l2": 0.5},
            "overrides.client.l2 would do nothing: grid.(x) replaces it",
        ),
        (
            {"(x)": {"a": {"defense": "krum"}, "b": {}}, "defense": ["mean", "median"]},
            {},
            "grid.defense sets 'defense' and replaces 'defense' of grid.(x)",
        ),
        (
            {"client.l2": [0.1], "client": [{"name": "sgd", "batch_size": 9, "steps": 1}]},
            {},
            "grid.client sets 'client' and replaces 'client.l2' of grid.client.l2",
        ),
    ],
)
def test_what_would_be_replaced_in_every_cell_is_refused(grid, overrides, part, programs):
    with pytest.raises(ConfigError) as error:
        sweeps.make_cells(BASE, grid, overrides=overrides)
    assert part in str(error.value) and not programs


def test_an_override_of_the_other_cells_is_none_that_is_lost():
    grid = {
        "(x)": {"a": {"client.l2": 0.1}, "b": {}},
        "defense": ["krum"],
        "defense.convention": ["paper", "author"],
    }
    cells = sweeps.make_cells(BASE, grid, overrides={"client.l2": 0.5})
    assert [cell.experiment.client.l2 for cell in cells] == [0.1, 0.1, 0.5, 0.5]

"""The papers' tables and figures: their cells, the published numbers, and what is written."""

import dataclasses
import re

import numpy as np
import pandas as pd
import pytest

from fedjax_sec.core import ConfigError
from fedjax_sec.papers import alie, fat, fedsecurity, fltrust, reconstruction, rlr
from fedjax_sec.report import audit, plotting
from fedjax_sec.report import paper as engine
from fedjax_sec.report.paper_writers import percent
from fedjax_sec.runs import config
from fedjax_sec.runs.experiment import Result, best_evaluation

ALIE, FAT, FLTRUST, RLR = alie.PAPER, fat.PAPER, fltrust.PAPER, rlr.PAPER
FEDSECURITY = fedsecurity.PAPER
PAPERS = [ALIE, FAT, FEDSECURITY, FLTRUST, RLR]


def cells_of(paper, items, files=None, **plan):
    """(item, file, row, column, x) without what is empty -> the row's cells, one a seed.

    Papers whose items are of one file each have keys without it.
    """
    sheets = engine.make_cells(paper, paper.plan(**plan), items, files)
    several = paper is FAT
    return {
        (name, *([part.file] if several else []), *filter(None, row[:1] + row[2:4])): cells
        for name, part, rows in sheets
        for row, cells in rows
    }


def test_published_numbers_are_all_there():
    """Each paper's numbers: how many, of how many items, and a checksum of their values."""
    known = {
        "alie": (36, 3, 2594.5),
        "fat": (52, 3, 3659.74),
        "fedsecurity": (0, 0, 0),  # its text prints none
        "fltrust": (26, 1, 4.01),
        "rlr": (84, 4, 7012.3),
    }
    for paper in PAPERS:
        lines = engine.published_lines(paper.module)
        total = round(sum(float(line["value"]) for line in lines), 2)
        assert (len(lines), len({line["item"] for line in lines}), total) == known[paper.name]
        assert all(line["place"] for line in lines)
        for line in lines:
            assert line["item"] in paper.items


@pytest.mark.parametrize("scale", engine.SCALES)
def test_labels_are_read_from_the_untrained_network_first(scale):
    """What the figure calls untrained is the first evaluation, which must be that of round 1."""
    plan = reconstruction.PAPER.plan(scale)
    sheets = engine.make_cells(reconstruction.PAPER, plan, ["labels", "labels_cifar100"])
    cells = [cell for _, _, rows in sheets for _, row in rows for cell in row]
    assert len(cells) > 50
    for cell in cells:
        assert cell.experiment.evaluation.every == 1 and cell.experiment.rounds > 1


@pytest.mark.parametrize("scale", engine.SCALES)
def test_every_item_is_a_set_of_valid_experiments(scale):
    got = cells_of(RLR, list(RLR.items), scale=scale, seeds=2)
    assert {item for item, _ in got} == set(RLR.items)
    for cells in got.values():
        assert [cell.experiment.seed for cell in cells] == [0, 1]
        assert cells[0].experiment.backdoor is not None


def test_rows_are_the_published_ones():
    for item in ("table1-iid", "table1-noniid", "table2-trojan", "table2-distributed"):
        ((_, part, rows),) = engine.make_cells(RLR, RLR.plan(), [item])
        published = RLR.published(item, part.dataset or part.file)
        assert {row for row, _, _ in published} == {row.row for row, _ in rows}
        assert {metric for _, _, metric in published} == set(rlr.METRICS)
    noniid = RLR.published("table1-noniid", "femnist_digits")
    assert noniid["FedAvg with RLR", "", "backdoor"] == 3.4
    assert RLR.published("table2-distributed", "cifar10")["FedAvg", "", "base"] == 78.2


def test_shared_rows_are_run_once():
    got = cells_of(RLR, ["table1-iid", "figure2", "figure5-iid", "removal"])
    for item, row in (("figure2", "FedAvg"), ("figure5-iid", "FedAvg"), ("removal", "FedAvg")):
        assert got[item, row][0] is got["table1-iid", "FedAvg"][0]
    assert len({id(cells[0]) for cells in got.values()}) == 11 + 1  # and RLR from a round on


def test_what_a_row_defends_with():
    """Equation 2 with Equation 5's learning rate: clip, aggregate, noise, reverse; projection."""
    got = cells_of(RLR, ["table1-noniid"])
    last = got["table1-noniid", "FedAvg with RLR, clipping and noise"][0].experiment
    clip, mean, noise, reverse = last.defense.stages
    assert (clip.max_norm, noise.max_norm, noise.std) == (0.5, 0.5, 1e-3)
    assert (mean.registered_name, reverse.threshold, last.client.max_norm) == ("mean", 8, 0.5)
    sign = got["table1-noniid", "Sign"][0].experiment
    assert sign.server.optimizer.dump_spec()["learning_rate"] == rlr.SIGN_LEARNING_RATE
    clean = got["table1-noniid", "FedAvg-No Attack"][0].experiment
    assert clean.attack.stages == () and clean.backdoor.base == 1


@pytest.fixture(scope="module")
def regenerated(tmp_path_factory):
    """Some items on scikit-learn's digits with a perceptron."""
    changes = {
        "data": {"name": "digits", "num_clients": 10},
        "model": "mlp",
        "client": {"name": "sgd", "epochs": 1, "batch_size": 20},
        "attack": {"name": "trojan", "base": 5, "target": 7},
        "evaluation": {"every": 1, "backdoor": {"name": "trojan", "base": 5, "target": 7}},
    }
    known = engine.Files(RLR)
    files = {name: {**known[name], **changes} for name in ("fashion_mnist", "cifar10")}
    files["cifar10"] |= {"threat": {"num_malicious": 4}}
    plan = RLR.plan("smoke", overrides=("client.batch_size=20",))
    out = tmp_path_factory.mktemp("rlr")
    items = ["table2-distributed", "figure4-iid", "figure5-iid", "removal"]
    return out, engine.regenerate(RLR, plan, items, out, files=files)


@pytest.mark.slow
def test_tables_hold_published_and_measured_numbers(regenerated):
    out, _ = regenerated
    table = pd.read_csv(out / "table2-distributed.csv").set_index("aggregation")
    assert table.loc["FedAvg", "backdoor: paper"] == 61.7
    measured = table[[column for column in table if column.endswith(": ours")]]
    assert measured.shape == (3, 3) and np.isfinite(measured).all(axis=None)
    text = (out / "table2-distributed.md").read_text()
    assert "10 agents (10 a round, 4 corrupt), 2 rounds" in text and "Table 2, bottom" in text


def test_figures_are_drawn(regenerated):
    out, written = regenerated
    for name in ("figure4-iid", "figure5-iid", "removal"):
        for suffix in (".png", ".pdf"):
            path = out / f"{name}{suffix}"
            assert path in written and path.stat().st_size > 5000


def test_rlr_is_switched_on_half_way():
    rounds = engine.Files(RLR)["fashion_mnist"]["rounds"]
    got = cells_of(RLR, ["removal"])
    scheduled = got["removal", f"RLR from round {rounds // 2}"][0].experiment
    spec = scheduled.to_dict()["defense"][1]["threshold"]
    assert spec["values"] == {0: 0.0, rounds // 2: 4.0}


# --- FLTrust ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dataset", "scale"),
    [
        *((dataset, "paper") for dataset in fltrust.DATASETS),
        ("har_windows", "smoke"),
        ("mnist-0.5", "smoke"),
        ("mnist-0.5", "small"),
        ("cifar10", "smoke"),
        ("cifar10", "small"),
    ],
)
def test_every_item_of_fltrust_is_a_set_of_valid_experiments(dataset, scale):
    got = cells_of(FLTRUST, list(FLTRUST.items), dataset=dataset, scale=scale, seeds=1)
    kind = fltrust.kind(dataset)
    expected = set(FLTRUST.items) - ({"q"} if kind == "har" else set())
    expected -= set() if kind == "resnet" else {"norms"}
    assert {item for item, *_ in got} == expected
    cells = {id(cell) for several in got.values() for cell in several}
    assert len(cells) < sum(map(len, got.values())), "equal cells are not shared"
    assert all(cell.experiment.server.root for several in got.values() for cell in several)


def test_table_three_gives_krum_and_trimmed_mean_the_true_number():
    got = cells_of(FLTRUST, ["table3"], dataset="har_windows")
    for column in ("Krum", "Trim-mean"):
        for row in ("Trim attack", "No attack"):  # "f = k = m", whether they attack or not
            (stage,) = got["table3", row, column][0].experiment.defense.stages
            assert stage.num_byzantine == 6
    scaling = got["table3", "Scaling attack", "FedAvg"][0].experiment.attack.stages[0]
    assert scaling.backdoor.every == 20 and scaling.factor is None
    clean = got["table3", "No attack", "FedAvg"][0].experiment
    assert clean.attack.stages == () and clean.backdoor == scaling.backdoor
    assert len(got) == 6 * 6


@pytest.mark.parametrize(
    ("overrides", "step"),
    [
        ((), 100 / 32),
        (("server.optimizer.learning_rate=0.5",), 50 / 32),
        (("server.root.batch_size=64", "client.batch_size=16"), 64 / 16),
    ],
)
def test_the_authors_step_is_longer_by_the_servers_batch_over_the_clients(overrides, step):
    got = cells_of(FLTRUST, ["table3"], dataset="mnist-0.5", seeds=1, overrides=overrides)
    for row in fltrust.attacks(FLTRUST.plan(dataset="mnist-0.5")):
        long, short = (
            got["table3", row, column][0].experiment for column in (fltrust.LONG_STEPS, "FLTrust")
        )
        assert long.server.optimizer.traced["learning_rate"] == step
        server = dataclasses.replace(long.server, optimizer=short.server.optimizer)
        assert dataclasses.replace(long, server=server) == short


def test_the_authors_step_needs_a_rate_that_is_a_number():
    schedule = "{name: cosine_decay_schedule, init_value: 1.0, decay_steps: 9}"
    rate = f"server.optimizer.learning_rate={schedule}"
    with pytest.raises(ConfigError, match="server.optimizer.learning_rate.*must be a number, got"):
        cells_of(FLTRUST, ["table3"], dataset="har_windows", seeds=1, overrides=(rate,))


@pytest.mark.parametrize(
    ("scale", "dataset", "rate", "rounds", "sweeps"),
    [
        ("paper", "mnist-0.5", 0.0096, 2000, 10),
        ("small", "mnist-0.5", 0.096, 400, 2),
        ("small", "fashion_mnist", 0.192, 400, 2),
        ("small", "har_windows", 0.096, 1000, 10),
    ],
)
def test_what_fltrusts_scales_change(scale, dataset, rate, rounds, sweeps):
    got = cells_of(FLTRUST, ["table3"], dataset=dataset, scale=scale, seeds=1)
    one = got["table3", "Adaptive attack", "FLTrust"][0].experiment
    assert one.client.optimizer.traced["learning_rate"] == rate and one.rounds == rounds
    assert one.attack.stages[0].rounds == sweeps


def test_a_part_of_fltrusts_table_can_be_asked_for():
    only = ("* / FLTrust", "No attack / FedAvg")
    given = {"items": ["table3", "bias"], "dataset": "har_windows", "seeds": 1}
    got = cells_of(FLTRUST, only=only, **given)
    known = fltrust.attacks(FLTRUST.plan(dataset="har_windows"))
    rows = {("No attack", "FedAvg"), *((row, "FLTrust") for row in known)}
    assert {(row, column) for _, row, column, *_ in got} == rows
    whole = cells_of(FLTRUST, **given)
    assert all(got[key][0].name == whole[key][0].name for key in got)
    with pytest.raises(ConfigError, match="'Trim atack / FLTrust'.*Did you mean 'Trim attack / "):
        cells_of(FLTRUST, ["table3"], dataset="har_windows", only=("Trim atack / FLTrust",))


def test_fltrusts_cnn_has_the_trigger_as_published_and_one_that_it_sees():
    got = cells_of(FLTRUST, ["table3", "q"], dataset="mnist-0.5", seeds=1)
    pixels = [
        cells[0].experiment.attack.stages[0].backdoor.pixels
        for cells in (
            got["table3", "Scaling attack", "FedAvg"],
            got["table3", fltrust.IN_SIGHT, "FedAvg"],
            got["q", fltrust.IN_SIGHT, "FedAvg", "0.5"],
        )
    ]
    assert {tuple(one) for one in pixels[0]} == {(26, 26), (24, 26), (26, 24), (25, 25)}
    assert {tuple(one) for one in pixels[1]} == {(24, 24), (22, 24), (24, 22), (23, 23)}
    assert pixels[2] == pixels[1] and ("q", "Scaling attack", "FedAvg", "0.5") not in got


def test_shares_of_malicious_clients_are_numbers_of_them():
    got = cells_of(FLTRUST, ["malicious"], dataset="mnist-0.5", seeds=1)
    for (_, _, _, share), (cell,) in got.items():
        assert cell.experiment.threat.num_malicious == round(100 * float(share))
        assert bool(cell.experiment.attack.stages) == (float(share) > 0)


def made_up(experiment, error, success=None):
    """A result as a run gives it, with the errors of two evaluations."""
    metrics = {"round": np.array([0.0, 5.0]), "accuracy": 1 - np.array(error)}
    if success is not None:
        metrics["attack_success_rate"] = np.array([0.0, success])
    return Result(experiment, metrics, {"data": {"label": "har_windows"}}, None)


def made_up_run(cells, folder):
    """Stands in for `sweeps.run_cells`: the first seed errs less."""
    errors = ([0.1, 0.2], [0.3, 0.4])
    return [
        made_up(
            cell.experiment,
            errors[cell.experiment.seed],
            0.75 if cell.labels["run"].startswith("Scaling attack") else None,
        )
        for cell in cells
    ]


def test_fltrusts_table_holds_the_last_round_and_leaves_unknown_cells_empty(tmp_path):
    plan = FLTRUST.plan(dataset="har_windows", seeds=2)
    engine.regenerate(FLTRUST, plan, ["table3"], tmp_path, run=made_up_run)
    table = pd.read_csv(tmp_path / "table3.csv")
    assert len(table) == 36 and np.allclose(table["error: mean"], 0.3)
    assert np.allclose(table["error: best"], 0.2) and table["error: paper"].isna().all()
    scaling = table[table["attack"] == "Scaling attack"]
    assert np.allclose(scaling["success: mean"], 0.75)
    text = (tmp_path / "table3.md").read_text()
    assert "0.30 ± 0.14 / 0.75 ± 0.00" in text and "paper |" not in text
    published = FLTRUST.published("table3", "mnist-0.1")
    assert published["Scaling attack", "FedAvg", "success"] == 1.0 and len(published) == 15
    assert FLTRUST.published("table3", "ch_mnist")["No attack", "Krum", "error"] == 0.24


def test_fltrusts_norms_are_told_apart(tmp_path):
    plan = FLTRUST.plan("small", 1, dataset="cifar10")
    ((_, _, rows),) = engine.make_cells(FLTRUST, plan, ["norms"])
    for row, (cell,) in rows:
        model = cell.experiment.model
        assert (model.norm, model.statistics) == {
            "aggregated": ("batch", "aggregated"),
            "local": ("batch", "local"),
            "group": ("group", "aggregated"),
        }[row.x]

    def run(cells, folder):
        results = [
            made_up(cell.experiment, [0.5, number / 100]) for number, cell in enumerate(cells)
        ]
        for result in results:
            for whose, first in (("honest", 0.4), ("malicious", 0.2)):
                result.metrics[f"kept_{whose}"] = np.array([first, first + 0.1])
        return results

    engine.regenerate(FLTRUST, plan, ["norms"], tmp_path, run=run)
    table = pd.read_csv(tmp_path / "norms.csv")
    np.testing.assert_allclose(table["error"], np.arange(12) / 100)
    trusts = table[table["defense"] == "FLTrust"]
    np.testing.assert_allclose(trusts["trust, honest: mean"], 0.45)
    np.testing.assert_allclose(trusts["trust, malicious: first"], 0.2)
    assert table[table["defense"] == "FedAvg"]["trust, honest: mean"].isna().all()


@pytest.mark.parametrize("item", ["malicious", "root_size", "bias"])
def test_fltrusts_curves_are_drawn(tmp_path, item):
    plan = FLTRUST.plan(dataset="har_windows", seeds=2)
    written = engine.regenerate(FLTRUST, plan, [item], tmp_path, run=made_up_run)
    assert all(path.stat().st_size > 300 for path in written) and len(written) == 3
    lines = pd.read_csv(tmp_path / f"{item}.csv")
    assert sorted(lines["x"].unique()) == sorted(
        {"malicious": fltrust.SHARES, "root_size": fltrust.SIZES, "bias": fltrust.BIASES}[item]
    )


# --- FAT ----------------------------------------------------------------------------------------

USERS = ("mnist_by_writer", "femnist")


@pytest.mark.parametrize("scale", engine.SCALES)
@pytest.mark.parametrize("users", USERS)
def test_every_item_of_fat_is_a_set_of_valid_experiments(scale, users):
    given = {"dataset": fat.DATASETS, "users": users}
    got = cells_of(FAT, list(FAT.items), scale=scale, seeds=2, **given)
    assert {item for item, *_ in got} == set(FAT.items)
    assert got["table3", "mnist", "None"] == got["curves", "mnist", "None"]
    assert got["table1", "mnist", "federated"][0] is got["table3", "mnist", "None"][0]
    assert ("table3", "cifar10", "None") not in got
    for cells in got.values():
        assert [cell.experiment.seed for cell in cells] == [0, 1]
        assert cells[0].experiment.evaluation.evasions[0].registered_name == "pgd"


@pytest.mark.parametrize("dataset", fat.DATASETS)
def test_fats_fewer_steps_of_pgd_are_longer(dataset):
    got = {
        scale: cells_of(FAT, ["table1"], scale=scale, seeds=1, dataset=(dataset,))
        for scale in engine.SCALES
    }
    clients = [cells["table1", dataset, "federated"][0].experiment.client for cells in got.values()]
    assert [client.pgd_steps for client in clients[:2]] == [2, 10]
    ways = [client.pgd_steps * client.step_size for client in clients]
    np.testing.assert_allclose(ways, ways[-1])


def test_fats_defences_withstand_as_many_as_they_are_made_for():
    got = cells_of(FAT, ["table3"])

    def row(name):
        return got["table3", "mnist", name][0].experiment

    for name, bad, z in (("Trimmed Mean", 24, 1.5), ("Bulyan", 12, 1.0)):
        attacked = row(f"{name}, convergence attack")
        assert attacked.threat.num_malicious == attacked.defense.stages[0].num_byzantine == bad
        assert attacked.attack.stages[0].z == z
        assert row(name).threat.num_malicious == 0
        assert attacked.threat.start == 0
    krum = row("Krum, distillation")
    assert krum.threat.num_malicious == 24 and krum.threat.start == 200 and krum.rounds == 500
    assert krum.attack.stages[0].batch_size == krum.client.batch_size == 64
    assert krum.attack.stages[0].temperature == 100 and krum.attack.stages[0].alike
    assert krum.evaluation.evasions[1].logit_scale == 0.01
    assert krum.client.keep_optimizer_state and krum.client.pgd_steps == 40


@pytest.mark.parametrize(
    ("scale", "honest", "adversary"),
    [
        ("paper", 0.001, 0.001),
        ("small", 0.003, 0.002),
    ],
)
def test_fats_adversary_on_krum_has_its_own_rate(scale, honest, adversary):
    got = cells_of(FAT, ["table3"], scale=scale)
    one = got["table3", "mnist", "Krum, distillation"][0].experiment
    rates = (
        owner.optimizer.traced["learning_rate"] for owner in (one.client, one.attack.stages[0])
    )
    assert tuple(rates) == (honest, adversary)
    assert got["table3", "mnist", "Krum"][0].experiment.attack.stages == ()


def test_fats_jumps_are_those_of_its_text():
    got = cells_of(FAT, ["table2", "figure1"], users="femnist")
    spec = got["table2", "femnist", "FAT-0.8"][0].experiment.to_dict()["client"]
    assert spec["fraction"]["values"] == {0: 0.1, 200: 0.8} and spec["most"] == 0.8
    later = got["figure1", "femnist", "0.1, 0.8 from round 400"][0].experiment.to_dict()
    assert later["client"]["fraction"]["values"] == {0: 0.1, 400: 0.8}
    plain = got["table2", "femnist", "FedAvg"][0].experiment.client
    assert plain.registered_name == "sgd" and plain.batch_size == 10 and plain.epochs == 1
    together = got["table2", "femnist", "Cent-AT"][0].experiment
    assert (
        together.data.num_clients == 1 and together.client.steps and together.client.epochs is None
    )


@pytest.fixture(scope="module")
def fat_regenerated(tmp_path_factory):
    """Most items on scikit-learn's digits with a perceptron."""
    data = {"name": "digits", "num_clients": 11, "local_test": True}
    known = engine.Files(FAT)
    files = {name: {**known[name], "data": data} for name in ("mnist", "femnist")}
    small_work = (
        "model=mlp",
        "client.batch_size=8",
        "server.clients_per_round=null",
        "data.max_train=700",
    )
    plan = FAT.plan("smoke", 1, small_work, dataset=("mnist",), users="femnist")
    out = tmp_path_factory.mktemp("fat")

    def regenerate(items):
        return engine.regenerate(FAT, plan, items, out, files=files)

    return out, regenerate(["table1", "table3", "curves", "figure2"]), regenerate


@pytest.mark.slow
def test_fats_tables_hold_published_and_measured_numbers(fat_regenerated):
    out, written, _ = fat_regenerated
    one = pd.read_csv(out / "table1.csv").iloc[0]
    assert one["centralised, robust: paper"] == 92.76 and 0 <= one["federated, robust: ours"] <= 100
    three = pd.read_csv(out / "table3-mnist.csv").set_index("defence, attack")
    last = three.loc["Krum, distillation"]
    assert last["scaled: paper"] == 0.29 and last["transfer: paper"] == 12.64
    assert np.isfinite([last["scaled: ours"], last["transfer: ours"], last["robust: ours"]]).all()
    assert three["transfer: ours"].notna().sum() == 2  # not of the surrogate itself
    assert len(three) == 7 and np.isfinite(three["robust: ours"]).all()
    said = (out / "table3-mnist-audit.md").read_text()
    verdicts = re.findall(r"^\*\*(Believable|Overstated|Not believable): ", said, re.MULTILINE)
    assert len(verdicts) == 3 and "## Audit: Krum, distillation" in said
    for name in ("curves-mnist", "figure2-femnist"):
        assert out / f"{name}.png" in written and (out / f"{name}.png").stat().st_size > 5000


def test_fats_audits_are_made_once(fat_regenerated, monkeypatch):
    out, _, regenerate = fat_regenerated
    before = (out / "table3-mnist-audit.md").read_text()
    kept = list((out / "runs" / "cells").rglob("audit-*.json"))
    assert len(kept) == 3
    assert sum("mnist_table1-federated" in path.name for path in kept) == 2  # transferred from it
    monkeypatch.setattr(audit, "audit", lambda *args, **kwargs: pytest.fail("made again"))
    regenerate(["table1", "table3"])  # as above: a cell is named after the first item that has it
    assert (out / "table3-mnist-audit.md").read_text() == before


def test_fats_second_table_and_first_figure(tmp_path):
    def run(cells, folder):
        results, numbers = [], {}
        for cell in cells:  # each item's rows, numbered
            item = cell.labels["run"].split()[0]
            number = numbers[item] = numbers.get(item, -1) + 1
            values = np.array([0.0, 0.1 * number])
            metrics = {"round": np.array([0, 9]), "local_accuracy": values + 0.5}
            metrics |= {f"local_{fat.ROBUST}": values, "loss": np.ones(2)}
            results.append(Result(cell.experiment, metrics, {"data": {"label": "x"}}, None))
        return results

    items = ["table2", "figure1"]
    engine.regenerate(FAT, FAT.plan(users="femnist"), items, tmp_path, run=run)
    table = pd.read_csv(tmp_path / "table2-femnist.csv").set_index("method")
    assert table.loc["FAT-0.8", "robust: paper"] == 33.69 and len(table) == 4
    np.testing.assert_allclose(table["robust: ours"], [0, 10, 20, 30], atol=1e-6)
    np.testing.assert_allclose(table["accuracy: ours"], [50, 60, 70, 80], atol=1e-6)
    assert (tmp_path / "figure1-femnist.png").stat().st_size > 5000


def test_fats_best_evaluation_is_the_most_robust_one():
    experiment = config.from_mapping({"rounds": 1})
    metrics = {fat.ROBUST: np.array([0.1, 0.7, 0.3]), "accuracy": np.array([0.2, 0.8, 0.9])}
    result = Result(experiment, metrics, {}, None)
    assert fat.best_robust(result) == 1
    assert percent([result], "accuracy", fat.best_robust) == pytest.approx(80)
    assert percent([result], "accuracy") == pytest.approx(90)


# --- One order of settings: file < scale < row < --set ------------------------------------------


SOME = {
    "alie": (["table1", "table3"], {"dataset": "mnist"}),
    "fat": (["table1", "table2", "table3"], {"dataset": ("mnist",)}),
    "fedsecurity": (["exp1", "exp2", "exp7"], {}),
    "fltrust": (["table3", "malicious"], {"dataset": "har_windows"}),
    "rlr": (["table1-iid", "removal"], {}),
}


def some_cells(paper, overrides):
    """The cells of some items of a paper, one seed, with these overrides."""
    items, options = SOME[paper.name]
    return cells_of(paper, items, scale="smoke", seeds=1, overrides=overrides, **options)


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.name)
def test_what_is_set_wins_over_every_row(paper):
    before = some_cells(paper, ())
    rules = {str(cells[0].experiment.defense) for cells in before.values()}
    assert len(rules) > 1, "the rows do not differ"
    got = some_cells(paper, ("defense=median", "rounds=7"))
    assert len(got) == len(before)
    for (cell,) in got.values():
        assert [stage.registered_name for stage in cell.experiment.defense.stages] == ["median"]
        assert cell.experiment.rounds == 7
    # Rows that are alike now are one cell.
    assert len({cell.name for (cell,) in got.values()}) < len(
        {cell.name for (cell,) in before.values()}
    )


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.name)
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=3", r"--set seed=3: seeds are 0 to --seeds - 1; give --seeds instead\."),
        ("rounds=soon", r"with --set rounds=soon, .*: .*rounds.*'soon'"),
        ("data.num_clients=many", r"with --set data\.num_clients=many, .*: .*num_clients.*'many'"),
        ("defence=median", r"with --set defence=median, .*: .*Did you mean 'defense'"),
        ("rounds", "must look like key.path=value"),
    ],
)
def test_overrides_that_cannot_be_say_why(paper, override, message):
    with pytest.raises(ConfigError, match=message) as error:
        some_cells(paper, (override,))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("paper", "override", "need"),
    [
        (ALIE, "attack=sign_flip", "table3, No Defense: its numbers need an attack with a b"),
        (FAT, "evaluation.evasions=[fgsm]", "table1, centralised: its numbers need pgd as the"),
        (RLR, "evaluation.backdoor=null", "FedAvg-No Attack: its numbers need a backdoor"),
    ],
)
def test_what_an_item_needs_is_not_set_away(paper, override, need):
    with pytest.raises(ConfigError, match=need) as error:
        some_cells(paper, (override,))
    assert "do not --set that away" in str(error.value)


def test_figures_that_need_more_say_so_before_they_run():
    for item, override, need in (
        ("figure4-iid", "evaluation.influence=null", "need evaluation.influence"),
        ("figure5-iid", "checkpoint.keep_params=false", "need checkpoint.keep_params"),
    ):
        with pytest.raises(ConfigError, match=need):
            cells_of(RLR, [item], scale="smoke", overrides=(override,))
    with pytest.raises(ConfigError, match="norms, No attack / FedAvg: .* evaluation.diagnostics"):
        given = {"dataset": "cifar10", "overrides": ("evaluation.diagnostics=false",)}
        cells_of(FLTRUST, ["norms"], scale="smoke", seeds=1, **given)


def test_alies_rows_lose_to_what_is_set():
    given = {"scale": "smoke", "seeds": 3}
    got = cells_of(ALIE, ["table1", "table2"], overrides=("threat.num_malicious=5",), **given)
    assert {c.experiment.threat.num_malicious for cells in got.values() for c in cells} == {5}
    both = {"name": "alie_backdoor", "backdoor": {"name": "sample", "index": 2}}
    for cells in cells_of(ALIE, ["table2"], overrides=(f"attack={both}",), **given).values():
        assert [cell.experiment.attack.backdoor.index for cell in cells] == [2, 2, 2]


def test_each_seed_of_alies_second_table_has_a_sample_of_its_training_set():
    got = cells_of(ALIE, ["table2"], scale="smoke", seeds=4)
    cells = got["table2", "Krum"]
    assert [cell.experiment.attack.backdoor.index for cell in cells] == [0, 1, 2, 0]


def fake_run(diverged=()):
    """Stands in for `sweeps.run_cells`: made-up metrics; runs of seeds in `diverged` have none."""

    def run(cells, folder):
        got = []
        for number, cell in enumerate(cells):
            values = np.array([0.2, 0.3, 0.3 + 0.001 * number])
            metrics = {"round": np.array([0.0, 1.0, 2.0]), "loss": np.ones(3)}
            names = ("accuracy", "attack_success_rate", "base_class_accuracy", fat.ROBUST)
            for name in (*names, "robust_accuracy/pgd_2"):
                metrics[name] = metrics[f"local_{name}"] = values
                metrics[f"per_client_{name}"] = np.tile(values[:, None], 4)
            failed = cell.experiment.seed in diverged
            if failed:
                metrics["loss"] = np.array([1.0, np.nan, np.nan])
            for whose in ("honest", "malicious"):
                metrics[f"kept_{whose}"] = values
            data = {"label": "digits (subset)", "train": 90, "unused_train": 60}
            summary = {"data": data, "diverged": failed}
            got.append(Result(cell.experiment, metrics, summary, None))
        return got

    return run


WRITTEN = {
    "alie": [
        ({"dataset": "mnist"}, ["table1", "table2", "figure2"]),
        ({"dataset": "cifar10"}, ["figure4"]),
    ],
    "fat": [({"dataset": ("mnist",)}, ["table1", "table2", "curves", "figure1", "figure2"])],
    "fedsecurity": [({}, ["exp1", "exp3", "exp7"])],
    "fltrust": [
        ({"dataset": "har_windows"}, ["table3", "malicious"]),
        ({"dataset": "cifar10"}, ["norms"]),
    ],
    "rlr": [({}, ["table1-iid", "removal"])],
}


def written_by(paper, out, monkeypatch, overrides=(), seeds=1, diverged=()):
    """The Markdown tables, and the titles of the figures, of one paper's items."""
    titles, save = [], plotting.save
    monkeypatch.setattr(
        plotting,
        "save",
        lambda figure, path: titles.append(figure.get_suptitle()) or save(figure, path),
    )
    for options, items in WRITTEN[paper.name]:
        plan = paper.plan("smoke", seeds, overrides, **options)
        engine.regenerate(paper, plan, items, out, run=fake_run(diverged))
    texts = {path.name: path.read_text() for path in sorted(out.glob("*.md"))}
    return texts, [" ".join(title.split()) for title in titles]


@pytest.mark.slow
@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.name)
def test_captions_say_what_was_set(paper, tmp_path, monkeypatch):
    texts, titles = written_by(paper, tmp_path, monkeypatch, ("defense=median",))
    said = re.compile(
        r"--set defense=median replaces (every row's|the file's and the scale's)\. "
        r"Published numbers are of the paper's settings\."
    )
    whose = [said.search(text.replace("`", ""))[1] for text in (*texts.values(), *titles)]
    assert texts and titles
    # Of these items of FAT only the curves of Table 3 have rows with rules of their own.
    assert whose.count("every row's") == (1 if paper is FAT else len(whose))


@pytest.mark.slow
@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.name)
def test_captions_tell_rows_from_what_all_share(paper, tmp_path, monkeypatch):
    texts, titles = written_by(paper, tmp_path, monkeypatch, ("checkpoint.every=3",))
    said = "--set checkpoint.every=3{} replaces the file's and the scale's. Published numbers"
    assert all(said.format("`") in text for text in texts.values())
    assert all(said.format("") in title for title in titles)


@pytest.mark.slow
@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.name)
@pytest.mark.parametrize("seeds", [1, 3])
def test_captions_say_over_how_many_seeds(paper, seeds, tmp_path, monkeypatch):
    texts, titles = written_by(paper, tmp_path, monkeypatch, seeds=seeds)
    table = "one seed" if seeds == 1 else "mean and standard deviation over 3 seeds"
    assert all(table in text for text in texts.values())
    assert all(("±" in text or "spread" in text) == (seeds > 1) for text in texts.values())
    assert all("--set" not in text for text in (*texts.values(), *titles))
    for title in titles:
        assert "digits (subset)" in title
        if seeds > 1 and "One point a user" not in title:
            assert "standard deviation" in title and "3 seeds" in title
        else:
            assert "one seed" in title or "seed 0" in title


@pytest.mark.slow
@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.name)
def test_tables_and_figures_mark_what_diverged(paper, tmp_path, monkeypatch):
    legends = []
    cross = plotting.crosses
    monkeypatch.setattr(
        plotting, "crosses", lambda *args: legends.append(args[1:3]) or cross(*args)
    )
    texts, _ = written_by(paper, tmp_path, monkeypatch, seeds=2, diverged={1})
    assert all("diverged" in text and "1 of 2 seeds" in text for text in texts.values())
    assert legends, "no line is marked"
    texts, _ = written_by(paper, tmp_path, monkeypatch, seeds=2)
    assert not any("diverged" in text for text in texts.values())


def test_a_figures_band_is_the_standard_deviation(tmp_path):
    experiment, values = config.from_mapping({"rounds": 1}), np.array([[0.1, 0.2], [0.3, 0.8]])
    results = [
        Result(experiment, {"round": np.array([0, 1]), "accuracy": one, "loss": one}, {}, None)
        for one in values
    ]
    _, axes = plotting.subplots(figsize=(3, 3))
    plotting.curves(axes, {"krum": results})
    (band,) = axes.collections
    drawn = band.get_paths()[0].vertices
    spread = 100 * values.std(0, ddof=1)
    assert drawn[:, 1].max() == pytest.approx(50 + spread[1])
    assert drawn[:, 1].min() == pytest.approx(min(20 - spread[0], 50 - spread[1]))
    (line,) = axes.lines
    assert line.get_alpha() == 1.0 and "diverged" not in str(axes.get_legend_handles_labels()[1])


def test_alies_title_has_the_settings_that_were_run():
    got = cells_of(ALIE, ["figure2"], overrides=("threat.num_malicious=5",))
    attacked = got["figure2", "Krum"][0].experiment
    assert alie.setting("figure2", attacked) == "m = 10%, z = 1.5"
    before = cells_of(ALIE, ["figure2"])
    assert alie.setting("figure2", before["figure2", "Krum"][0].experiment) == "m = 24%, z = 1.5"


def test_the_best_evaluation_is_a_finite_one():
    nan = np.nan
    metrics = {"accuracy": np.array([0.1, 0.5, 0.9]), "loss": np.array([2.0, 1.0, nan])}
    assert best_evaluation(metrics, "accuracy") == 1
    assert best_evaluation(metrics, "accuracy", among=np.array([True, False, True])) == 0
    metrics["robust"] = np.full(3, nan)
    assert best_evaluation(metrics, "robust") == 0
    assert best_evaluation({"accuracy": np.array([nan, 0.2])}, "accuracy") == 1


# --- FedSecurity: orderings in place of numbers -------------------------------------------------


@pytest.mark.parametrize("scale", engine.SCALES)
@pytest.mark.parametrize("statement", ["text", "config"])
def test_every_experiment_of_fedsecurity_is_a_set_of_valid_experiments(scale, statement):
    plan = FEDSECURITY.plan(scale, 2, statement=statement)
    sheets = engine.make_cells(FEDSECURITY, plan, list(FEDSECURITY.items))
    numbers = {}
    for name, part, rows in sheets:
        for row, cells in rows:
            assert [cell.experiment.seed for cell in cells] == [0, 1]
            numbers.setdefault(name, []).append(row.label)
            one = cells[0].experiment
            known = fedsecurity.ATTACKS.get(row.column, {"name": "byzantine"})["name"]
            attacks = [stage.registered_name for stage in one.attack.stages]
            if row.row == fedsecurity.BENIGN or name == "exp2":
                assert one.threat.num_malicious == 0 and not attacks
            elif name != "exp1":
                assert one.threat.num_malicious > 0
                assert attacks == [known]
        if name == "exp6" and part.file == "femnist":
            users = {"text": 10, "config": 3400 if scale == "paper" else 200}[statement]
            assert one.data.num_clients == users and one.clients_per_round == 10
            threat = rows[-1][1][0].experiment.threat
            assert (threat.num_malicious, threat.redraw) == (1, True)
        if name == "exp10":
            krum = rows[-1][1][0].experiment
            (rule,) = krum.defense.stages
            assert (rule.num_byzantine, rule.num_selected, rule.weighted) == (7, 35, True)
            assert (krum.data.num_clients, krum.threat.num_malicious) == (70, 7)
    assert {name: len(rows) for name, rows in numbers.items()} == {
        "exp1": 5,
        "exp2": 6,
        "exp3": 14,
        "exp4": 7,
        "exp5": 7,
        "exp6": 21,
        "exp7": 4,
        "exp10": 3,
    }


@pytest.mark.parametrize("statement", ["text", "config"])
def test_exp5_and_exp7_select_as_the_text_or_the_configurations_do(statement):
    got = cells_of(FEDSECURITY, ["exp5", "exp7"], statement=statement, seeds=1)
    five, seven = {"text": (5, 5), "config": (50, 1)}[statement]

    def rule(*key):
        (stage,) = got[key][0].experiment.defense.stages
        return stage.num_selected, stage.num_byzantine

    assert rule("exp5", "m-Krum") == (five, 10)
    assert [rule("exp7", f"{f} malicious") for f in (1, 2, 3)] == [(seven, f) for f in (1, 2, 3)]


@pytest.mark.parametrize(
    ("kind", "accuracy", "margin", "verdict"),
    [
        ("above", {"a": [60, 62, 61], "b": [50, 51, 52]}, 10, "holds"),
        ("above", {"a": [50, 51, 52], "b": [60, 62, 61]}, -10, "does not hold"),
        ("above", {"a": [60, 40, 50], "b": [51, 49, 48]}, 2 / 3, "within the spread"),
        ("nearer", {"a": [58, 59], "b": [60, 60], "c": [10, 11]}, 46.5, "holds"),
        ("nearer", {"a": [12, 12], "b": [60, 60], "c": [10, 10]}, -46, "does not hold"),
        ("alike", {"a": [50, 53, 47], "b": [50, 50, 50]}, 0, "holds"),
        ("alike", {"a": [60, 61, 59], "b": [50, 50, 50]}, 10, "does not hold"),
        ("alike", {"a": [60], "b": [50]}, 10, "undecided: one seed"),
        ("above", {"a": [60], "b": [50]}, 10, "holds (one seed)"),
        ("above", {"a": [np.nan, 60], "b": [50, 50]}, np.nan, "undecided: not measured"),
    ],
)
def test_verdicts_on_orderings(kind, accuracy, margin, verdict):
    claim = fedsecurity.Claim("", kind, tuple(accuracy))
    by = claim.margin({row: np.array(values, float) for row, values in accuracy.items()})
    assert by.mean() == pytest.approx(margin, nan_ok=True) and claim.verdict(by) == verdict


@pytest.mark.parametrize("item", FEDSECURITY.items)
def test_every_ordering_names_rows_of_its_experiment(item):
    for _, part, rows in engine.make_cells(FEDSECURITY, FEDSECURITY.plan(seeds=1), [item]):
        labels = {row.label for row, _ in rows}
        claims = fedsecurity.CLAIMS[item](part)
        assert claims and all(set(claim.rows) <= labels for claim in claims)


def test_orderings_are_written_with_the_mean_of_the_last_evaluations(tmp_path):
    experiment = config.from_mapping({"rounds": 1})
    curve = {"accuracy": np.array([0.1, 0.9, 0.9, 0.2, 0.2, 0.2, 0.2, 0.3])}
    assert fedsecurity.accuracy_of([Result(experiment, curve, {}, None)]) == pytest.approx([70 / 3])
    engine.regenerate(FEDSECURITY, FEDSECURITY.plan("smoke", 2), ["exp7"], tmp_path, run=fake_run())
    table = pd.read_csv(tmp_path / "exp7_orderings.csv")
    assert list(table.here) == ["does not hold"] * 2 and list(table.columns) == [
        "ordering",
        "margin",
        "spread",
        "here",
    ]
    for name in ("exp7.md", "exp7_orderings.md"):
        said = "digits (subset), 30 training examples with the clients, "
        assert said in (tmp_path / name).read_text()


def test_orderings_of_rows_that_are_left_out_do_not_stay(tmp_path):
    def write(*only):
        plan = FEDSECURITY.plan("smoke", 1, only=only)
        engine.regenerate(FEDSECURITY, plan, ["exp7"], tmp_path, run=fake_run())
        assert "Percent, the last evaluation. " in (tmp_path / "exp7.md").read_text()
        return {path.name for path in tmp_path.glob("exp7_orderings*")}

    assert write() == {"exp7_orderings.md", "exp7_orderings.csv"}
    assert write("1 malicious") == set()


def test_each_data_set_of_experiment_6_is_headed_by_its_figure(tmp_path):
    """A file's heading names its figure, not all figures of the experiment."""
    engine.regenerate(FEDSECURITY, FEDSECURITY.plan("smoke", 1), ["exp6"], tmp_path, run=fake_run())
    for file, figure in (("cifar100", 9), ("shakespeare", 10), ("femnist", 11)):
        for name in (f"exp6_{file}.md", f"exp6_{file}_orderings.md"):
            head = f"# FedSecurity, Exp 6, Figure {figure}: digits (subset)"
            assert (tmp_path / name).read_text().startswith(head)


@pytest.mark.parametrize(("scale", "top"), [(1, 101), (0.1, 1.01 * 1.1 * 3.03)])
def test_low_curves_fill_their_axis(tmp_path, monkeypatch, scale, top):
    limits = []
    legend = plotting.legend_below
    monkeypatch.setattr(
        plotting,
        "legend_below",
        lambda figure: limits.append(figure.axes[0].get_ylim()) or legend(figure),
    )

    def low(cells, folder):
        results = fake_run()(cells, folder)
        for one in results:
            one.metrics["accuracy"] = scale * np.array([0.1, 0.2, 0.303])
        return results

    engine.regenerate(FEDSECURITY, FEDSECURITY.plan("smoke", 1), ["exp7"], tmp_path, run=low)
    assert limits == [pytest.approx((-top / 101, top), rel=1e-3)]

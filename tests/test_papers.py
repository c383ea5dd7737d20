"""The papers' tables and figures: their cells, the published numbers, and what is written."""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fedjax_sec import config
from fedjax_sec.papers import rlr

CONFIGS = Path(__file__).parents[1] / "configs" / "rlr"
BASES = {
    setting: config.read_yaml(CONFIGS / f"{rlr.Plan().config(setting)}.yaml")
    for setting in rlr.SETTINGS
}


@pytest.mark.parametrize("scale", rlr.SCALES)
def test_every_item_is_a_set_of_valid_experiments(scale):
    found = rlr.make_cells(rlr.Plan(scale, seeds=2), list(rlr.ITEMS), BASES)
    assert {item for item, _ in found} == set(rlr.ITEMS)
    for cells in found.values():
        assert [cell.experiment.seed for cell in cells] == [0, 1]
        assert cells[0].experiment.backdoor is not None


def test_rows_are_the_published_ones():
    for item in ("table1-iid", "table1-noniid", "table2-trojan", "table2-distributed"):
        rows = rlr.ITEMS[item].rows(rlr.ITEMS[item].setting, 200)
        assert {row for row, _ in rlr.published(item)} == set(rows)
        assert {metric for _, metric in rlr.published(item)} == set(rlr._METRICS)
    assert rlr.published("table1-noniid")["FedAvg with RLR", "backdoor"] == 3.4
    assert rlr.published("table2-distributed")["FedAvg", "base"] == 78.2


def test_shared_rows_are_run_once():
    found = rlr.make_cells(rlr.Plan(), ["table1-iid", "figure2", "figure5-iid", "removal"], BASES)
    for item, row in (("figure2", "FedAvg"), ("figure5-iid", "FedAvg"), ("removal", "FedAvg")):
        assert found[item, row][0] is found["table1-iid", "FedAvg"][0]
    assert len({id(cells[0]) for cells in found.values()}) == 11 + 1  # and RLR from a round on


def test_what_a_row_defends_with():
    """Equation 2 with Equation 5's learning rate: clip, aggregate, noise, reverse; projection."""
    found = rlr.make_cells(rlr.Plan(), ["table1-noniid"], BASES)
    last = found["table1-noniid", "FedAvg with RLR, clipping and noise"][0].experiment
    clip, mean, noise, reverse = last.defense.stages
    assert (clip.max_norm, noise.max_norm, noise.std) == (0.5, 0.5, 1e-3)
    assert (mean.registered_name, reverse.threshold, last.client.max_norm) == ("mean", 8, 0.5)
    sign = found["table1-noniid", "Sign"][0].experiment
    assert sign.server.optimizer.dump_spec()["learning_rate"] == rlr.SIGN_LEARNING_RATE
    clean = found["table1-noniid", "FedAvg-No Attack"][0].experiment
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
    bases = {setting: {**base, **changes} for setting, base in BASES.items()}
    bases["cifar10"] |= {"threat": {"num_malicious": 4}}
    plan = dataclasses.replace(rlr.Plan("smoke"), overrides=("client.batch_size=20",))
    out = tmp_path_factory.mktemp("rlr")
    items = ["table2-distributed", "figure4-iid", "figure5-iid", "removal"]
    return out, rlr.regenerate(plan, items, bases, out)


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
    rounds = BASES["iid"]["rounds"]
    found = rlr.make_cells(rlr.Plan(), ["removal"], BASES)
    scheduled = found["removal", f"RLR from round {rounds // 2}"][0].experiment
    spec = scheduled.to_dict()["defense"][1]["threshold"]
    assert spec["values"] == {0: 0.0, rounds // 2: 4.0}

"""Statements about all rounds are counted in all rounds, and nothing is left out silently."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CLIENT_OF_TWENTY, same_bits, small

import fedjax_sec
from fedjax_sec.ops.moments import differs_in_rows
from fedjax_sec.runs import experiment as experiment_lib


def federation(**changes):
    base = small(
        data={"num_clients": 20}, client=CLIENT_OF_TWENTY, rounds=8, evaluation={"every": 4}
    )
    for key, value in changes.items():
        base[key] = base[key] | value if key in ("data", "evaluation") else value
    return base


def warnings_of(result):
    return [text for text in result.summary["warnings"] if not text.startswith("data:")]


def test_an_attack_between_evaluations_is_counted():
    """Nobody malicious is drawn in the last round, and still the attack is no silent one."""
    spec = federation(
        server={"clients_per_round": 5},
        threat={"num_malicious": 2},
        attack={"name": "boost", "factor": 30.0},
        evaluation={"every": 8},
    )
    attacked = fedjax_sec.run(spec)
    clean = fedjax_sec.run(spec | {"attack": None})
    assert np.isnan(attacked.metrics["attack_shift"][-1])  # nobody to shift in the last round
    assert not np.allclose(attacked.metrics["loss"][-1], clean.metrics["loss"][-1], rtol=1e-3)
    assert 0 < attacked.summary["attack_rounds"] < 8
    assert not any("changed no update" in text for text in warnings_of(attacked))


def test_an_attack_that_drove_the_loss_to_nan_is_counted():
    spec = federation(threat={"num_malicious": 2}, attack={"name": "boost", "factor": 1e38})
    result = fedjax_sec.run(spec)
    assert result.summary["attack_rounds"] >= 1
    assert not any("changed no update" in text for text in warnings_of(result))


def test_an_attack_that_does_nothing_is_named():
    spec = federation(threat={"num_malicious": 2}, attack={"name": "boost", "factor": 1.0000001})
    spec["attack"]["factor"] = {"schedule": "steps", "values": {0: 1.00000001, 100: 2.0}}
    result = fedjax_sec.run(spec)
    assert "the attack changed no update in any of the 8 rounds" in warnings_of(result)
    assert result.summary["attack_rounds"] == 0


def test_a_scheduled_attack_is_counted_where_it_acts():
    factor = {"schedule": "steps", "values": {0: 1.00000001, 1: 5.0, 3: 1.00000001}}
    spec = federation(threat={"num_malicious": 2}, attack={"name": "boost", "factor": factor})
    result = fedjax_sec.run(spec)
    same_bits(result.metrics["attack_rounds"], np.array([np.nan, 2.0, 0.0]))
    assert result.summary["attack_rounds"] == 2
    assert not any("changed no update" in text for text in warnings_of(result))


def test_updates_that_are_left_out_are_counted():
    optimizer = {"name": "sgd", "learning_rate": 1e38}
    result = fedjax_sec.run(
        federation(client=CLIENT_OF_TWENTY | {"optimizer": optimizer}, rounds=6)
    )
    summary = result.summary
    assert summary["excluded_updates"] == summary["excluded_honest_updates"] == 5 * 20
    assert summary["zero_aggregate_rounds"] == 5
    assert warnings_of(result) == [
        "the global model's loss is not finite at 2 of 3 evaluations, first after round 4",
        "100 updates were left out since they held NaN or infinity, 100 of them honest clients', "
        "first in rounds 1 to 4",
        "the aggregate was zero in 5 of 6 rounds, first in rounds 1 to 4",
    ]


def test_a_server_that_trusts_nobody_is_named():
    """Every client sends the opposite of what the server learns."""
    spec = federation(
        data={"max_train": 1400},
        client=CLIENT_OF_TWENTY | {"batch_size": 60},
        server={"root": {"size": 100}},
        threat={"num_malicious": 20},
        attack={"name": "sign_flip", "scale": 3.0},
        defense="fltrust",
        rounds=1,
    )
    result = fedjax_sec.run(spec)
    assert (result.metrics["kept"][-1] == 0).all()
    assert "the aggregate was zero in 1 of 1 rounds, first in round 1" in warnings_of(result)


def test_the_second_backdoor_is_named():
    attack = [{"name": "pattern", "size": 2}, {"name": "label_flip", "base": 1, "target": 7}]
    result = fedjax_sec.run(federation(threat={"num_malicious": 20}, attack=attack, rounds=1))
    assert warnings_of(result) == [
        "success is measured for the first of 2 backdoors, 'pattern'; evaluation.backdoor names "
        "another"
    ]


@pytest.mark.slow
def test_counts_do_not_depend_on_when_the_model_is_evaluated():
    spec = federation(
        server={"clients_per_round": 5}, threat={"num_malicious": 4}, attack="sign_flip"
    )
    totals = [
        [fedjax_sec.run(spec | {"evaluation": {"every": every}}).summary[name] for every in (1, 8)]
        for name in ("attack_rounds", "absent_clients", "excluded_updates", "zero_aggregate_rounds")
    ]
    assert all(one == other for one, other in totals) and 0 < totals[0][0] < 8


@pytest.mark.parametrize("counts", [[np.nan, 0, 3], [np.nan, 0, 1]])
def test_the_first_rounds_are_those_between_two_evaluations(counts):
    metrics = {"round": np.array([0, 4, 8]), "excluded": np.array(counts)}
    assert experiment_lib._first(metrics, "excluded") == "rounds 5 to 8"


def test_nan_differs_from_everything():
    stack, rows = jnp.zeros((3, 4)), jnp.array([False, True, False])
    bad = stack.at[1, 2].set(jnp.nan)
    assert bool(differs_in_rows(bad, bad, rows)) and bool(differs_in_rows(stack, bad, rows))
    assert not bool(differs_in_rows(stack, bad, ~rows))
    assert not bool(differs_in_rows(stack, stack + 1, rows & False))

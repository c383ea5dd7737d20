"""Participation in a round: fixed numbers of attackers, attackers drawn anew, drop-out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CLIENT_OF_TWENTY, same_bits, small
from programs import program_of, replicas_of, task_on

import fedjax_sec
from fedjax_sec import core
from fedjax_sec.core import ConfigError
from fedjax_sec.round import run_round
from fedjax_sec.round.pipeline import Defense
from fedjax_sec.runs import config

BOOST = {"name": "boost", "factor": 1000.0}


@core.pytree
class Watcher(core.Stage):
    """An unweighted mean of the valid rows that keeps the last round's rows."""

    stage = "aggregate"
    registered_name = "watcher"

    def init(self, num_clients, dim):
        return ()

    def apply(self, key, updates, state, view):
        seen = {"ids": view.client_ids, "valid": view.valid, "updates": updates}
        kept = view.valid.astype(updates.dtype)
        return kept @ updates / jnp.maximum(kept.sum(), 1.0), seen, {"kept": kept}


def federation(**changes):
    """20 clients with two examples each, 6 in a round, of whom 5 of all are malicious."""
    base = small(
        data={"num_clients": 20},
        client=CLIENT_OF_TWENTY,
        server={"clients_per_round": 6},
        threat={"num_malicious": 5},
        attack=BOOST,
        evaluation={"every": 4},
    )
    for key, value in changes.items():
        base[key] = base[key] | value if key in ("threat", "server", "data") else value
    return base


def rounds_of(spec, indices, empty=None):
    """The server's view in the given rounds, each from the initial state: a list of records."""
    experiment = config.from_mapping(spec)
    experiment = dataclasses.replace(experiment, defense=Defense((Watcher(),)))
    program = program_of(experiment)
    replicas = replicas_of([experiment])
    replica, start = jax.tree.map(lambda a: a[0], (replicas, program.init(replicas)))
    if empty is not None:
        mask = jnp.isin(jnp.arange(20), jnp.asarray(empty))
        population = replica.population
        counts = jnp.where(mask, 0, population.counts)
        replica = replica._replace(population=population._replace(counts=counts, empty=mask))

    @jax.jit
    def step(index):
        task = task_on(program)
        return run_round(program.problem, task, program.pool, replica, start, index)

    records = []
    for index in indices:
        state, metrics = step(index)
        records.append((jax.tree.map(np.asarray, state.defense[0]), metrics))
    return records, np.asarray(replica.population.malicious)


def attackers(record):
    """Rows that were multiplied by the attack's factor."""
    return np.linalg.norm(record["updates"], axis=1) > 20


@pytest.mark.parametrize("number", [1, 2, 5])
def test_a_fixed_number_of_malicious_clients_takes_part(number):
    records, malicious = rounds_of(federation(threat={"per_round": number}), range(100))
    chosen = [tuple(record["ids"]) for record, _ in records]
    assert all(len(set(ids)) == 6 and malicious[list(ids)].sum() == number for ids in chosen)
    assert all(attackers(record).sum() == number for record, _ in records)
    assert len(set(chosen)) > 6
    # Neither the clients nor the rows of the malicious ones are always the same.
    honest = {i for ids in chosen for i in ids if not malicious[i]}
    assert honest == set(np.flatnonzero(~malicious))
    rows = [tuple(malicious[list(ids)]) for ids in chosen]
    assert len(set(rows)) > 3


def test_the_attack_takes_place_in_every_third_round():
    spec = federation(threat={"per_round": 2, "every": 3, "start": 1})
    records, malicious = rounds_of(spec, range(8))
    assert [int(attackers(record).sum()) for record, _ in records] == [0, 2, 0, 0, 2, 0, 0, 2]
    # In the other rounds clients are drawn as without an attack, and malicious ones are honest.
    clean, _ = rounds_of(federation(threat={"num_malicious": 0}, attack=None), range(8))
    for index in (0, 2, 3, 5, 6):
        same_bits(records[index][0]["ids"], clean[index][0]["ids"])
        np.testing.assert_allclose(
            records[index][0]["updates"], clean[index][0]["updates"], rtol=1e-5, atol=1e-7
        )
    assert any(malicious[records[i][0]["ids"]].any() for i in (0, 2, 3, 5, 6))


def test_attackers_are_drawn_anew_in_every_round():
    spec = federation(threat={"redraw": True}, server={"clients_per_round": None})
    records, _ = rounds_of(spec, range(40))
    sets = [frozenset(record["ids"][attackers(record)]) for record, _ in records]
    assert all(len(one) == 5 for one in sets) and len(set(sets)) > 30
    assert len(frozenset.union(*sets)) == 20
    fixed, malicious = rounds_of(federation(server={"clients_per_round": None}), range(3))
    assert {frozenset(r["ids"][attackers(r)]) for r, _ in fixed} == {
        frozenset(np.flatnonzero(malicious))
    }


def test_redrawn_attackers_are_marked_in_each_evaluated_round():
    spec = federation(threat={"redraw": True}, server={"clients_per_round": None}, rounds=8)
    result = fedjax_sec.run(spec)
    marks, norms = (result.metrics[name][1:] for name in ("malicious", "update_norm"))
    same_bits(marks == 1, norms > 20)
    assert result.summary["malicious_clients"] is None and not (marks[0] == marks[1]).all()
    assert len(fedjax_sec.run(federation()).summary["malicious_clients"]) == 5


def test_clients_drop_out_with_their_probability():
    spec = federation(server={"clients_per_round": None, "dropout": 0.3})
    records, malicious = rounds_of(spec, range(40))
    present = np.array([record["valid"] for record, _ in records])
    assert abs(present.mean() - 0.7) < 0.05 and (present.mean(0) > 0.3).all()
    for record, metrics in records:
        assert int(metrics["absent"]) == (~record["valid"]).sum()
        assert (record["updates"][~record["valid"]] == 0).all()
        same_bits(attackers(record), malicious & record["valid"])
        assert int(metrics["excluded"]) == 0


def test_a_client_that_drops_out_learns_nothing():
    optimizer = {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9}
    client = CLIENT_OF_TWENTY | {"keep_optimizer_state": True, "optimizer": optimizer}
    spec = federation(server={"clients_per_round": None, "dropout": 0.5}, client=client)
    experiment = config.from_mapping(spec)
    program = program_of(experiment)
    replicas = replicas_of([experiment])
    replica, start = jax.tree.map(lambda a: a[0], (replicas, program.init(replicas)))
    task = task_on(program)
    state, metrics = jax.jit(
        lambda: run_round(program.problem, task, program.pool, replica, start, jnp.int32(0))
    )()
    moments = np.linalg.norm(np.asarray(jax.tree.leaves(state.client)[0]), axis=1)
    assert 0 < (moments == 0).sum() == int(metrics["absent"]) < 20


def test_seeds_and_probabilities_share_a_program():
    cells = [
        config.from_mapping(federation(server={"dropout": share}), {"seed": seed})
        for share, seed in ((0.1, 0), (0.6, 1))
    ]
    assert cells[0].structure() == cells[1].structure()
    assert cells[0].structure() != config.from_mapping(federation()).structure()
    every = [config.from_mapping(federation(threat={"every": k})).structure() for k in (1, 2, 3)]
    assert every[1] == every[2] != every[0]


@pytest.mark.parametrize("threat", [{}, {"per_round": 2}])
def test_clients_without_examples_are_never_drawn(threat):
    records, malicious = rounds_of(federation(threat=threat), range(20), empty=[0, 3, 4, 11])
    drawn = {int(i) for record, _ in records for i in record["ids"]}
    assert drawn == set(range(20)) - {0, 3, 4, 11}
    assert all(record["valid"].all() for record, _ in records)
    if threat:
        assert all(malicious[record["ids"]].sum() == 2 for record, _ in records)


def test_clients_without_examples_do_not_vote():
    spec = federation(server={"clients_per_round": None}, threat={"num_malicious": 0}, attack=None)
    [(record, metrics)], _ = rounds_of(spec, [0], empty=[2, 7])
    same_bits(record["valid"], ~np.isin(np.arange(20), [2, 7]))
    assert int(metrics["absent"]) == 2 and metrics["detection/false_positive_rate"] == 0


def test_replicas_with_empty_clients_are_marked():
    experiment = config.from_mapping(federation())
    replicas = replicas_of([experiment])
    assert replicas.population.empty is None and (replicas.population.counts > 0).all()


def test_detection_rates_are_those_of_what_krum_removes():
    spec = federation(
        server={"clients_per_round": None},
        threat={"num_malicious": 3},
        defense="multi_krum",
        rounds=1,
    )
    metrics = fedjax_sec.run(spec).metrics
    kept = metrics["kept"][-1]
    _, malicious = rounds_of(spec, [])
    assert metrics["detection/true_positive_rate"][-1] == (kept[malicious] == 0).mean() == 1.0
    assert metrics["detection/false_positive_rate"][-1] == (kept[~malicious] == 0).mean() == 0.0
    krum = fedjax_sec.run(spec | {"defense": "krum"}).metrics
    np.testing.assert_allclose(krum["detection/false_positive_rate"][-1], 16 / 17)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"threat": {"per_round": 6}}, r"threat.per_round: .* 1..5 is possible, got 6"),
        ({"threat": {"num_malicious": 18, "per_round": 3}}, r"4..6 is possible, got 3"),
        (
            {"threat": {"per_round": 2}, "server": {"clients_per_round": None}},
            "threat.per_round = 2 needs server.clients_per_round < data.num_clients = 20",
        ),
        (
            {"threat": {"redraw": True, "placement": "first"}},
            "threat.redraw .* needs .* threat.placement 'random', got 'first'",
        ),
        (
            {"threat": {"num_malicious": 0, "every": 2}, "attack": None},
            "threat.every = 2 does nothing without malicious clients",
        ),
        (
            {"threat": {"per_round": 1}, "attack": {"name": "alie", "z": 1.0}},
            "attack: alie would send its client's own update",
        ),
        ({"server": {"dropout": 1.0}}, "server.dropout must be >= 0 and < 1, got 1.0"),
    ],
)
def test_what_cannot_take_part_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        config.from_mapping(federation(**changes))


def test_the_fixed_number_fills_the_bound():
    spec = federation(threat={"per_round": 1}, defense="krum")
    assert config.from_mapping(spec).defense.stages[0].num_byzantine == 1

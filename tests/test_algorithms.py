"""Algorithms: FedProx and SCAFFOLD against loops by hand, messages, local models."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import NumpyMlp, same_bits, small
from jax.flatten_util import ravel_pytree
from programs import Apart, program_of, replicas_of

import fedjax_sec
from fedjax_sec import core
from fedjax_sec.algorithms import Averaging
from fedjax_sec.core import ConfigError, registry
from fedjax_sec.core.types import Message
from fedjax_sec.round.pipeline import Attack
from fedjax_sec.runs import config
from fedjax_sec.runs.prepare import prepare

RATE, STEPS, ROUNDS = 0.2, 3, 3
#: Every batch is all of a client's examples, so that their order does not matter.
LOCAL = {
    "client": {
        "name": "sgd",
        "steps": STEPS,
        "batch_size": 9,
        "optimizer": {"name": "sgd", "learning_rate": RATE},
    },
    "rounds": ROUNDS,
    "defense": {"name": "mean", "weighted": False},
}


def flat(result):
    return np.asarray(ravel_pytree(result.params)[0])


def by_hand(local, **changes):
    """(parameters at the end, the variates) of a loop over rounds and clients in NumPy.

    `local(gradient, params, start, state, mean)` is what a local step descends.
    """
    experiment = config.from_mapping(small(**(LOCAL | changes)))
    prepared = prepare(experiment)
    source, population = prepared.source, prepared.population
    mlp = NumpyMlp(64, 6, 10, source.mean[0], source.std[0])
    start = program_of(experiment).init(replicas_of([experiment])).server
    params = np.asarray(jax.tree.leaves(start)[0][0], np.float64)
    n = len(population.counts)
    variates, mean = np.zeros((n, params.size)), np.zeros(params.size)
    for _ in range(ROUNDS):
        updates, new = [], variates.copy()
        for i, (row, count) in enumerate(zip(population.index, population.counts, strict=True)):
            x, y = source.x_train[row[:count]] / source.scale, source.y_train[row[:count]]
            w, gradients = params.copy(), []
            for _ in range(STEPS):
                gradients.append(mlp.gradient(w, x, y))
                w = w - RATE * local(gradients[-1], w, params, variates[i], mean)
            updates.append(w - params)
            # Option II of the paper; the product keeps the mean of the gradients instead.
            new[i] = variates[i] - mean + (params - w) / (STEPS * RATE)
            if local is scaffold_step:
                np.testing.assert_allclose(new[i], np.mean(gradients, axis=0), atol=1e-9)
        params = params + np.mean(updates, axis=0)
        mean = mean + (new - variates).mean(axis=0)
        variates = new
    return params, mean


def fedprox_step(gradient, params, start, state, mean):
    return gradient + 0.5 * (params - start)


def scaffold_step(gradient, params, start, state, mean):
    return gradient - state + mean


def test_fedprox_equals_a_loop_by_hand():
    result = fedjax_sec.run(small(**LOCAL, algorithm={"name": "fedprox", "mu": 0.5}))
    expected, _ = by_hand(fedprox_step)
    np.testing.assert_allclose(flat(result), expected, rtol=1e-3, atol=1e-5)
    plain = fedjax_sec.run(small(**LOCAL))
    assert np.abs(flat(plain) - flat(result)).max() > 1e-3
    nothing = fedjax_sec.run(small(**LOCAL, algorithm={"name": "fedprox", "mu": 0.0}))
    same_bits(flat(nothing), flat(plain))


@pytest.mark.parametrize("joint", [False, True])
def test_scaffold_equals_a_loop_by_hand(joint):
    result = fedjax_sec.run(small(**LOCAL, algorithm={"name": "scaffold", "joint": joint}))
    expected, mean = by_hand(scaffold_step)
    np.testing.assert_allclose(flat(result), expected, rtol=1e-3, atol=1e-5)
    norm = result.metrics["scaffold/variate_norm"][-1]
    assert norm == pytest.approx(np.linalg.norm(mean), rel=1e-3)
    plain = fedjax_sec.run(small(**LOCAL))
    assert np.abs(flat(plain) - flat(result)).max() > 1e-3


def test_scaffold_composes_with_adversarial_training_and_kept_states():
    client = LOCAL["client"] | {"name": "adversarial", "pgd_steps": 2}
    client["keep_optimizer_state"] = True
    client["optimizer"] = {"name": "sgd", "learning_rate": RATE, "momentum": 0.5}
    runs = [
        fedjax_sec.run(small(**LOCAL | {"client": client}, algorithm=name))
        for name in ("fedavg", "scaffold")
    ]
    assert all(np.isfinite(one.metrics["loss"]).all() for one in runs)
    assert np.abs(flat(runs[0]) - flat(runs[1])).max() > 1e-4


@core.pytree
class Lies(core.UpdateAttack):
    """Reports a weight and an extra of its own, and leaves the vector."""

    weight: float = 1.0
    extra: float | None = None
    broken: bool = core.static(False, "Send no number, which no field takes.")
    registered_name = "lies"
    rewrites = "message"

    def tamper(self, key, message, state, view):
        extra, factor = message.extra, jnp.nan if self.broken else 1.0
        if self.extra is not None:
            extra = jax.tree.map(lambda leaf: jnp.full_like(leaf, factor * self.extra), extra)
            return message._replace(extra=extra), state, {}
        weight = jnp.full_like(message.weight, factor * self.weight)
        return Message(message.vector, weight, extra), state, {}


def attacked(attack, **changes):
    spec = (
        LOCAL | {"threat": {"num_malicious": 2, "placement": "first"}, "attack": "zero"} | changes
    )
    experiment = config.from_mapping(small(**spec))
    return dataclasses.replace(experiment, attack=Attack((attack,)))


def run_experiment(experiment):
    from fedjax_sec.runs.experiment import train

    return train([prepare(experiment)])[0]


def test_a_client_that_lies_about_its_examples_weighs_more():
    weighted = {"defense": "mean"}
    honest = fedjax_sec.run(small(**LOCAL | weighted))
    lied = run_experiment(attacked(Lies(weight=1e6), **weighted))
    alone = run_experiment(attacked(Lies(weight=0.0), **weighted))
    assert lied.summary["attack_rounds"] == alone.summary["attack_rounds"] == ROUNDS
    for one in (lied, alone):
        assert np.abs(flat(one) - flat(honest)).max() > 1e-3
    # A weight that is no number excludes the message, so the others decide.
    broken = run_experiment(attacked(Lies(broken=True), **weighted))
    np.testing.assert_allclose(flat(broken), flat(alone), rtol=1e-4, atol=1e-6)


def test_extras_that_are_no_numbers_never_reach_the_server():
    lied = run_experiment(attacked(Lies(extra=1.0, broken=True), algorithm="scaffold"))
    assert np.isfinite(flat(lied)).all()
    assert np.isfinite(lied.metrics["scaffold/variate_norm"][1:]).all()
    # And those that are move the variates under a rule that never sees them.
    moved = run_experiment(
        attacked(Lies(extra=50.0), algorithm="scaffold", defense="median", rounds=1)
    )
    clean = fedjax_sec.run(
        small(**LOCAL | {"defense": "median", "rounds": 1}, algorithm="scaffold")
    )
    norms = [one.metrics["scaffold/variate_norm"][-1] for one in (moved, clean)]
    assert norms[0] > 10 * norms[1]


def test_models_of_the_clients_are_measured_on_their_own_test_data():
    data = {"num_clients": 4, "max_train": None, "partition": "by_label", "local_test": True}
    experiment = config.from_mapping(small(**LOCAL | {"data": data, "rounds": 30}))
    experiment = dataclasses.replace(experiment, algorithm=Apart())
    result = run_experiment(experiment)
    local = result.metrics["local_accuracy"]
    assert local[-1] > 0.9 > 0.5 > local[0]  # each client knows its few classes
    same_bits(result.metrics["accuracy"][0], result.metrics["accuracy"][-1])  # nobody sent


def test_what_clients_send_decides_which_components_apply():
    @core.pytree
    class Features(Averaging):
        registered_name = "features"
        sends = "features"
        client: Any = core.given("How a client trains.")
        optimizer: Any = core.given("The server's optimizer.")

    experiment = dataclasses.replace(
        config.from_mapping(small(defense={"name": "krum", "num_byzantine": 1})),
        algorithm=Features(),
    )
    with pytest.raises(ConfigError, match="'krum' works where clients send updates, .*features"):
        experiment.check()


def test_given_parts_are_no_keys_of_a_configuration():
    with pytest.raises(ConfigError, match="algorithm: unknown key 'client'"):
        config.from_mapping({"algorithm": {"name": "fedprox", "client": "sgd"}})
    spec = config.from_mapping({"algorithm": "fedprox"}).to_dict()["algorithm"]
    assert spec == {"name": "fedprox", "mu": 0.01}
    assert registry.algorithms.names() >= ("fedavg",)

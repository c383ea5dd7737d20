"""Attacks inside `hybrid`: their needs, their backdoors, and whose data they poison."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CLIENT_OF_TWENTY, same_bits, small

import fedjax_sec
from fedjax_sec import core
from fedjax_sec.attacks.update.hybrid import Hybrid
from fedjax_sec.core import ConfigError, Message, Setting, check_components, registry
from fedjax_sec.round import make_task, train_clients
from fedjax_sec.round.pipeline import Attack
from fedjax_sec.runs import config
from fedjax_sec.runs.prepare import make_replicas, prepare
from fedjax_sec.runs.program import Program

SQUARE = {"name": "pattern", "size": 3, "fraction": 1.0}
SCALING = {"name": "scaling", "backdoor": SQUARE, "copies": False}


def federation(**changes):
    return (
        small(data={"num_clients": 20}, client=CLIENT_OF_TWENTY, threat={"num_malicious": 4})
        | changes
    )


def local_updates(attack):
    """Every client's update before the attack rewrites it, and the malicious clients."""
    prepared = prepare(config.from_mapping(federation(attack=attack, seed=3)))
    program = Program(prepared)
    replicas = make_replicas([prepared])
    replica, start = jax.tree.map(lambda a: a[0], (replicas, program.init(replicas)))
    task = make_task(program.problem, program.pool, replica.components.task)
    messages, _, _ = jax.jit(
        lambda: train_clients(
            program.problem,
            task,
            program.pool,
            replica,
            start.server,
            start.attack,
            start.client,
            jnp.arange(20),
            jnp.int32(0),
        )
    )()
    return np.asarray(messages.vector), prepared.population.malicious


@pytest.mark.parametrize("field", ["main", "solo"])
def test_the_clients_of_the_attack_inside_poison_their_data(field):
    other = {"main": "solo", "solo": "main"}[field]
    hybrid = {"name": "hybrid", field: SCALING, other: "zero", "num_solo": 1}
    inside, malicious = local_updates(hybrid)
    alone, _ = local_updates(SCALING)
    honest, _ = local_updates("zero")
    differs = np.abs(inside - honest).max(axis=1) > 1e-6
    first = np.flatnonzero(malicious)[:1]
    solo = np.isin(np.arange(20), first)
    same_bits(differs, malicious & (solo if field == "solo" else ~solo))
    np.testing.assert_allclose(inside[differs], alone[differs], rtol=1e-5, atol=1e-7)


def test_a_trojan_inside_is_learned():
    """A success was reported for a backdoor that nobody taught."""
    spec = federation(attack={"name": "hybrid", "main": SCALING}, rounds=12)
    attacked = fedjax_sec.run(spec).metrics["attack_success_rate"]
    assert attacked[-1] > 0.9 > 0.5 > attacked[0]


def test_the_backdoor_of_either_is_measured():
    backdoor = {"name": "alie_backdoor", "backdoor": SQUARE}
    for field in ("main", "solo"):
        attack = {"name": "hybrid", "main": "zero", "solo": "sign_flip", field: backdoor}
        experiment = config.from_mapping(federation(attack=attack))
        assert experiment.backdoor == registry.attacks.build(SQUARE)
    metrics = fedjax_sec.run(federation(attack=attack, rounds=1)).metrics
    assert np.isfinite(metrics["attack_success_rate"]).all()


@pytest.mark.parametrize(
    "attack",
    [
        {"name": "hybrid", "main": "fltrust_adaptive"},
        {"name": "hybrid", "solo": "fltrust_adaptive"},
        {"name": "hybrid", "main": {"name": "hybrid", "main": "fltrust_adaptive"}},
    ],
)
def test_the_root_data_set_that_is_needed_inside_is_demanded(attack):
    threat = {"num_malicious": 4, "knowledge": "omniscient"}
    with pytest.raises(ConfigError, match="'fltrust_adaptive' needs examples that the server"):
        config.from_mapping(federation(threat=threat, attack=attack))


def test_the_defense_that_is_needed_inside_is_demanded():
    updates = np.random.default_rng(0).normal(1.0, 1.0, (8, 5)).astype(np.float32)
    attack, mask = {"name": "hybrid", "main": "gradient_adaptive"}, np.arange(8) < 3
    with pytest.raises(ConfigError, match="defense is missing: 'gradient_adaptive' adapts"):
        fedjax_sec.attack(updates, attack, malicious=mask)
    sent = fedjax_sec.attack(updates, attack, malicious=mask, defense="median")
    assert np.isfinite(sent).all() and not np.array_equal(sent[:3], updates[:3])


def test_the_model_that_is_needed_inside_is_demanded():
    with pytest.raises(ConfigError, match="'alie_backdoor' needs a model and data"):
        fedjax_sec.attack(
            np.ones((8, 5)), {"name": "hybrid", "main": "alie_backdoor"}, malicious=np.arange(8) < 3
        )


def test_checks_run_on_what_is_nested_with_its_path():
    trigger = {"name": "trojan", "target": 99}
    attack = {"name": "hybrid", "main": {"name": "scaling", "backdoor": trigger}}
    part = registry.attacks.build(attack)
    with pytest.raises(ConfigError, match="attack.main.backdoor.target must be < 10"):
        check_components((part,), "attack", Setting(20, 4, num_classes=10))
    with pytest.raises(ConfigError, match="defense.selection.num_byzantine: krum needs"):
        selection = {"name": "krum", "num_byzantine": 9}
        fedjax_sec.aggregate(
            np.ones((11, 3)), {"name": "bulyan", "num_byzantine": 2, "selection": selection}
        )


def test_dedicated_clients_are_the_same_in_every_round():
    """With a part of the clients in a round the first of the malicious ones stays the first."""
    hybrid = registry.attacks.build({"name": "hybrid", "main": "sign_flip", "solo": "zero"})
    updates, malicious = jnp.ones((3, 2)), jnp.array([True, True, False])

    def sent(ranks):
        view = fedjax_sec.core.types.AttackerView(
            malicious, malicious, jnp.zeros(2), jnp.arange(3), jnp.array(0), ranks=ranks
        )
        attack = Attack((hybrid,))
        message = Message(updates, jnp.ones(3))
        sent, _, _ = attack.apply(jax.random.key(0), message, attack.init(3, 2), view)
        return sent.vector[:, 0].tolist()

    assert sent(None) == [0.0, -1.0, 1.0]
    assert sent(jnp.array([2, 0, 1])) == [-1.0, 0.0, 1.0]
    assert sent(jnp.array([1, 3, 2])) == [-1.0, -1.0, 1.0]


def test_hybrids_inside_hybrids_share_their_clients():
    inner = Hybrid(main=registry.attacks.build(SCALING), solo=registry.attacks.build("zero"))
    attack = Attack((Hybrid(main=inner, solo=registry.attacks.build("sign_flip")),))
    who = attack.poisoned_by(jnp.array([True, False, True, True, True]))
    assert np.asarray(who).tolist() == [[False, False, False, True, True]]
    assert [name for name, _, _ in core.walk(attack.stages[0], "attack")] == [
        "attack",
        "attack.main",
        "attack.main.main",
        "attack.main.main.backdoor",
        "attack.main.solo",
        "attack.solo",
    ]


@core.pytree
class Inflates(core.UpdateAttack):
    """Reports more examples than it has."""

    registered_name = "inflates"
    rewrites = "message"

    def tamper(self, key, message, state, view):
        return message._replace(weight=10 * message.weight), state, {}


@pytest.mark.parametrize("field", ["main", "solo"])
def test_an_attack_on_messages_inside_one_on_vectors_is_refused(field):
    """Nothing would call it: a wrapper hands on the updates alone."""
    plain = registry.attacks.build("hybrid")
    hybrid = dataclasses.replace(plain, **{field: Inflates()})
    words = f"attack.{field}: 'inflates' rewrites whole messages, and 'hybrid' around it only"
    with pytest.raises(ConfigError, match=words):
        check_components((hybrid,), "attack", Setting(10, 5))
    check_components((Inflates(), plain), "attack", Setting(10, 5))  # in a list it is called

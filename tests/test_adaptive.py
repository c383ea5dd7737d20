"""Attacks that adapt to the defence: their objective, what they know, and what they are held to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_sec
from fedjax_sec.core import ConfigError
from fedjax_sec.core.types import AttackerView, Message, ServerData, ServerView
from fedjax_sec.round import known_defense
from fedjax_sec.round.pipeline import Attack, Defense
from fedjax_sec.runs import config

CLIENTS, BAD, DIM = 12, 3, 9
MASK = np.arange(CLIENTS) < BAD


def stack(seed=0, shift=0.5):
    rng = np.random.default_rng(seed)
    return rng.normal(shift, 1.0, (CLIENTS, DIM)).astype(np.float32)


OWN = np.random.default_rng(9).normal(0.5, 0.3, DIM).astype(np.float32)


def assail(attack, updates, rule="mean", full=True, mine=OWN, seed=0):
    """(updates, metrics) of an attack that knows the rule and, with full knowledge, all else."""
    pipeline, defense = Attack.build(attack), Defense.build(rule)
    view = ServerView(
        jnp.zeros(DIM),
        jnp.ones(CLIENTS),
        jnp.arange(CLIENTS),
        jnp.ones(CLIENTS, bool),
        jnp.array(0),
        ServerData(lambda: jnp.asarray(mine), None),
    )
    state = defense.init(CLIENTS, DIM)
    known = known_defense(defense, jax.random.key(1), view, state if full else None, CLIENTS)
    visible = jnp.ones(CLIENTS, bool) if full else jnp.asarray(MASK)
    seen = AttackerView(
        jnp.asarray(MASK),
        visible,
        jnp.zeros(DIM),
        jnp.arange(CLIENTS),
        jnp.array(0),
        None,
        None,
        *known,
    )
    init = pipeline.init(CLIENTS, DIM)
    message = Message(jnp.asarray(updates), jnp.ones(CLIENTS))
    sent, _, metrics = pipeline.apply(jax.random.key(seed), message, init, seen)
    return np.asarray(sent.vector), {name.split("/")[1]: float(v) for name, v in metrics.items()}


def objective(updates, sent, rule, mine=OWN):
    """h by its definition, from two aggregations."""
    needs = {"server_update": mine} if rule == "fltrust" else {}
    before, after = (np.asarray(fedjax_sec.aggregate(u, rule, **needs)) for u in (updates, sent))
    return float(np.where(before < 0, -1, 1) @ (before - after))


# --- FLTrust's adaptive attack ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_fltrust_adaptive_reports_the_objective_that_it_raises(seed):
    updates = stack(seed)
    values = []
    for rounds in (0, 2, 10):
        attack = {"name": "fltrust_adaptive", "rounds": rounds, "begin": "own"}
        sent, metrics = assail(attack, updates, "fltrust")
        assert metrics["objective"] == pytest.approx(
            objective(updates, sent, "fltrust"), rel=1e-3, abs=1e-4
        )
        lengths = np.linalg.norm(sent[:BAD], axis=1)
        np.testing.assert_allclose(lengths, np.linalg.norm(OWN), rtol=1e-4)
        np.testing.assert_array_equal(sent[BAD:], updates[BAD:])
        values.append(metrics["objective"])
    assert values == sorted(values) and values[-1] > values[0] + 0.1


def test_fltrust_adaptive_steps_are_along_the_sphere_and_proportional_to_eta():
    updates = stack()
    fields = {"name": "fltrust_adaptive", "rounds": 1, "steps": 1, "begin": "own"}
    start, _ = assail(fields | {"rounds": 0}, updates, "fltrust")
    moved, _ = assail(fields | {"step_size": 1e-3}, updates, "fltrust")
    twice, _ = assail(fields | {"step_size": 2e-3}, updates, "fltrust")
    length = np.linalg.norm(OWN)
    first, second = ((u[:BAD] - start[:BAD]) / length for u in (moved, twice))
    # Small steps on the sphere are proportional to eta, and at right angles to the direction.
    np.testing.assert_allclose(second, 2 * first, atol=2e-4)
    assert np.abs(first).max() > 1e-4
    assert np.abs((first * start[:BAD] / length).sum(1)).max() < 1e-4


def test_fltrust_adaptive_stays_where_nobody_is_trusted():
    """The Trim attack's directions, if their cosines are negative, are a plateau of h."""
    updates = stack()
    start, _ = assail({"name": "fltrust_adaptive", "rounds": 0}, updates, "fltrust")
    assert (start[:BAD] @ OWN < 0).all()
    sent, metrics = assail("fltrust_adaptive", updates, "fltrust")
    np.testing.assert_allclose(sent, start, atol=1e-5)
    assert metrics["objective"] == pytest.approx(metrics["objective_before"], abs=1e-6)


def test_fltrust_adaptive_does_not_look_at_hidden_rows():
    updates = stack()
    hidden = np.where(MASK[:, None], updates, 100.0)
    one, _ = assail("fltrust_adaptive", updates, "fltrust", full=False)
    other, _ = assail("fltrust_adaptive", hidden, "fltrust", full=False, mine=-OWN)
    np.testing.assert_array_equal(one[:BAD], other[:BAD])


# --- The gradient adaptive attack ---------------------------------------------------------------

RULES = {
    "median": "median",
    "trimmed_mean": {"name": "trimmed_mean", "num_byzantine": 3},
    "fltrust": "fltrust",
    "geometric_median": "geometric_median",
    "clipped mean": [{"name": "clip_norm", "max_norm": 2.0}, "mean"],
}


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_gradient_adaptive_never_lowers_the_objective(rule):
    updates, values = stack(), []
    longest = np.linalg.norm(updates[BAD:], axis=1).max()
    for steps in (1, 10):
        sent, metrics = assail({"name": "gradient_adaptive", "steps": steps}, updates, rule)
        assert metrics["objective"] >= metrics["objective_before"]
        assert metrics["objective"] == pytest.approx(
            objective(updates, sent, rule), rel=1e-3, abs=1e-4
        )
        assert np.linalg.norm(sent[:BAD], axis=1).max() <= longest * (1 + 1e-5)
        np.testing.assert_array_equal(sent[BAD:], updates[BAD:])
        values.append(metrics["objective"])
    assert values == sorted(values)


def test_gradient_adaptive_finds_the_best_against_the_mean():
    """Within a ball, the farthest against s is -s times the radius: h is known."""
    updates = stack()
    sent, metrics = assail({"name": "gradient_adaptive", "steps": 200}, updates, "mean")
    longest = np.linalg.norm(updates[BAD:], axis=1).max()
    s = np.where(updates.mean(0) < 0, -1, 1)
    np.testing.assert_allclose(sent[:BAD], np.tile(-s * longest / 3, (BAD, 1)), atol=0.02)
    best = s @ updates[:BAD].sum(0) / CLIENTS + BAD * longest * 3 / CLIENTS  # |s| = sqrt(9)
    assert metrics["objective"] == pytest.approx(best, rel=1e-3)


def test_gradient_adaptive_gains_on_zeroth_order_against_fltrust():
    gains = []
    for seed in range(3):
        updates = stack(seed)
        _, random = assail({"name": "fltrust_adaptive", "begin": "own"}, updates, "fltrust")
        _, gradient = assail("gradient_adaptive", updates, "fltrust")
        gains.append(gradient["objective"] - random["objective"])
    assert np.median(gains) > 0


def test_gradient_adaptive_sends_its_start_where_there_is_no_gradient():
    updates = stack()
    rule = {"name": "rlr", "threshold": 4}
    sent, metrics = assail("gradient_adaptive", updates, ["sign", rule])
    assert np.isfinite(sent).all() and metrics["objective"] >= metrics["objective_before"]


def test_gradient_adaptive_does_not_look_at_hidden_rows():
    updates = stack()
    hidden = np.where(MASK[:, None], updates, 100.0)
    one, _ = assail("gradient_adaptive", updates, "fltrust", full=False)
    other, _ = assail("gradient_adaptive", hidden, "fltrust", full=False, mine=-OWN)
    np.testing.assert_array_equal(one[:BAD], other[:BAD])


# --- What they need -----------------------------------------------------------------------------

THREAT = {"num_malicious": 2, "knowledge": "omniscient"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attack("gradient_adaptive"), "defense is missing"),
        (lambda: attack("alie", defense="mean"), "defense would be ignored"),
        (lambda: attack("fltrust_adaptive", knowledge="omniscient"), "server_update is missing"),
        (lambda: attack("fltrust_adaptive", server_update=OWN), "knowledge='omniscient' only"),
        (
            lambda: attack("alie", server_update=OWN, knowledge="omniscient"),
            "server_update would be ignored",
        ),
        (
            lambda: config.from_mapping({"attack": "fltrust_adaptive", "threat": THREAT}),
            "'fltrust_adaptive' needs examples that the server holds",
        ),
    ],
)
def test_what_is_missing_or_unused_is_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def attack(name, **kwargs):
    return fedjax_sec.attack(stack(), name, malicious=MASK, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fltrust_adaptive", "gradient_adaptive"])
@pytest.mark.parametrize("knowledge", ["omniscient", "corrupted"])
def test_they_run_in_a_round_against_fltrust(name, knowledge):
    result = fedjax_sec.run(
        {
            "data": {"name": "digits", "num_clients": 8},
            "model": "logistic_regression",
            "client": {"name": "sgd", "steps": 1, "batch_size": 32},
            "server": {"root": {"size": 60}},
            "threat": {"num_malicious": 2, "knowledge": knowledge},
            "attack": name,
            "defense": "fltrust",
            "rounds": 4,
            "evaluation": {"every": 2},
        }
    )
    after = result.metrics[f"{name}/objective"][1:]
    assert (after >= result.metrics[f"{name}/objective_before"][1:]).all()
    assert np.isfinite(result.metrics["accuracy"]).all()

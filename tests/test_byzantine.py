"""FedSecurity's Byzantine attack, which acts on models, against plain NumPy."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attacked import rounds_of
from helpers import same_bits, small

import fedjax_sec
from fedjax_sec.core import ConfigError, Message, make_space, registry
from fedjax_sec.core.types import AttackerView
from fedjax_sec.round.pipeline import Attack
from fedjax_sec.runs.config import from_mapping

RNG = np.random.default_rng(0)
UPDATES = RNG.normal(size=(6, 50)).astype(np.float32)
MODEL = RNG.normal(1.0, 2.0, size=50).astype(np.float32)
BAD = np.arange(6) % 2 == 0


def attack(mode, updates=UPDATES, **options):
    options = {"malicious": BAD, "params": MODEL} | options
    return np.asarray(fedjax_sec.attack(updates, {"name": "byzantine", "mode": mode}, **options))


# --- A stack ------------------------------------------------------------------------------------


def test_each_mode_sends_its_model():
    """The server adds an update to the global model."""
    for mode in ("zero", "random", "flip"):
        sent = attack(mode)
        same_bits(sent[~BAD], UPDATES[~BAD])
        for i in np.flatnonzero(BAD):
            model = MODEL.astype(np.float64) + sent[i]
            trained = MODEL.astype(np.float64) + UPDATES[i]
            for j in range(50):
                if mode == "zero":
                    assert model[j] == 0
                elif mode == "flip":
                    np.testing.assert_allclose(model[j], 2 * MODEL[j] - trained[j], rtol=1e-6)
                else:
                    assert -1 - 1e-6 <= model[j] < 1 + 1e-6


def test_random_models_are_uniform_each_by_itself_and_as_wide_as_the_scale():
    updates = np.zeros((6, 4000), np.float32)
    params = np.full(4000, 7.0, np.float32)
    spec = {"name": "byzantine", "mode": "random", "scale": 0.5}
    sent = np.asarray(fedjax_sec.attack(updates, spec, malicious=BAD, params=params))
    models = sent[BAD] + params
    assert -0.5 <= models.min() < -0.49 and 0.49 < models.max() < 0.5 + 1e-6
    np.testing.assert_allclose(models.mean(axis=1), 0.0, atol=0.02)
    np.testing.assert_allclose(models.std(axis=1), 0.5 / np.sqrt(3), rtol=0.03)
    assert abs(np.corrcoef(models[:2])[0, 1]) < 0.06
    other = fedjax_sec.attack(updates, spec, malicious=BAD, params=params, key=1)
    assert not np.array_equal(sent[0], other[0])


def test_zero_on_models_is_not_zero_on_updates():
    same_bits(attack("zero")[BAD], np.broadcast_to(-MODEL, (3, 50)))
    same_bits(attack("zero", params=None)[BAD], np.zeros((3, 50), np.float32))
    on_updates = fedjax_sec.attack(UPDATES, "zero", malicious=BAD, params=MODEL)
    same_bits(np.asarray(on_updates)[BAD], np.zeros((3, 50), np.float32))


def test_flip_is_sign_flip_of_scale_one():
    same_bits(attack("flip"), np.asarray(fedjax_sec.attack(UPDATES, "sign_flip", malicious=BAD)))


def test_trees_and_half_precision():
    clients = [{"w": np.full((2, 2), float(i)), "b": np.full(2, -float(i))} for i in (1, 2, 3)]
    params = {"w": np.array([[1.0, 2.0], [3.0, 4.0]]), "b": np.array([5.0, 6.0])}
    sent = fedjax_sec.attack(clients, "byzantine", malicious=[False, True, False], params=params)
    same_bits(np.asarray(sent[1]["w"]), -params["w"].astype(np.float32))
    same_bits(np.asarray(sent[1]["b"]), -params["b"].astype(np.float32))
    half = UPDATES.astype(np.float16)
    for mode in ("zero", "random", "flip"):
        sent = attack(mode, half, params=MODEL.astype(np.float16))
        assert sent.dtype == np.float16 and np.isfinite(sent).all()
    assert (np.abs(attack("random", half, params=None))[BAD] <= 1).all()


@pytest.mark.parametrize("name", ["sign_flip", "alie", "boost", "random", "byzantine"])
def test_the_global_model_is_taken_by_every_attack(name):
    """Those that act on updates do not read it."""
    given = fedjax_sec.attack(UPDATES, name, malicious=BAD, params=MODEL)
    without = fedjax_sec.attack(UPDATES, name, malicious=BAD)
    assert np.array_equal(given, without) == (name != "byzantine")
    with pytest.raises(ConfigError, match="params must"):
        fedjax_sec.attack(UPDATES, name, malicious=BAD, params=MODEL[:3])


# --- Running statistics, and what is sent beside a model ------------------------------------------


def view_of(task, params, count):
    malicious = jnp.arange(count) < count - 1
    return AttackerView(
        malicious, malicious, jnp.asarray(params), jnp.arange(count), jnp.array(0), task
    )


def sent_by(spec, updates, view, weights=None):
    pipeline = Attack.build(spec)
    weights = jnp.ones(len(updates)) if weights is None else weights
    message = Message(jnp.asarray(updates), weights)
    state = pipeline.init(*updates.shape)
    return pipeline.apply(jax.random.key(0), message, state, view)[0]


@pytest.mark.parametrize("mode", ["zero", "random", "flip"])
def test_running_statistics_stay_as_the_client_trained_them(mode):
    """Of a real residual network: FedML's `is_weight_param` leaves them out."""
    model = registry.models.build({"name": "resnet", "depth": 8}).make((8, 8, 1), 4)
    space = make_space(model)
    names = [name for name in space.slices if name.startswith("batch_stats/")]
    statistics = np.zeros(space.dim, bool)
    for name in names:
        statistics[space.slices[name]] = True
    assert statistics.sum() == 2 * (16 + 2 * (16 + 32 + 64)) and len(names) > 10
    updates = np.random.default_rng(1).normal(size=(3, space.dim)).astype(np.float32)
    params = np.random.default_rng(2).normal(size=space.dim).astype(np.float32)
    view = view_of(types.SimpleNamespace(space=space), params, 3)
    sent = np.asarray(sent_by({"name": "byzantine", "mode": mode}, updates, view).vector)
    same_bits(sent[:, statistics], updates[:, statistics])
    same_bits(sent[2], updates[2])
    model_sent = params + sent[:2]
    if mode == "zero":
        assert (model_sent[:, ~statistics] == 0).all()
    elif mode == "random":
        assert (np.abs(model_sent[:, ~statistics]) <= 1 + 1e-6).all()
    else:
        same_bits(sent[:2, ~statistics], -updates[:2, ~statistics])


def test_what_is_sent_behind_the_model_stays_and_weights_do_too():
    """SCAFFOLD's `joint` variates lie behind the model's update."""
    space = types.SimpleNamespace(dim=5, observed=slice(0, 2), trained=slice(2, 5))
    updates = np.random.default_rng(1).normal(size=(3, 8)).astype(np.float32)
    params = np.arange(1.0, 6.0, dtype=np.float32)
    view = view_of(types.SimpleNamespace(space=space), params, 3)
    weights = jnp.array([3.0, 5.0, 7.0])
    message = sent_by("byzantine", updates, view, weights)
    expected = updates.copy()
    expected[:2, 2:5] = -params[2:5]
    same_bits(np.asarray(message.vector), expected)
    same_bits(message.weight, weights)


def test_messages_that_hold_no_model_are_refused():
    view = view_of(None, np.zeros(9), 3)
    with pytest.raises(ConfigError, match="needs messages with all 9 parameters, .* send 4 num"):
        sent_by("byzantine", np.ones((3, 4), np.float32), view)


def test_joint_scaffold_sends_its_variates_honestly():
    algorithm = {"name": "scaffold", "joint": True}
    spec = small(algorithm=algorithm, attack="byzantine", threat={"num_malicious": 5}, rounds=1)
    record = rounds_of(spec, 1)[0][0]
    np.testing.assert_allclose(record["after"], 0.0, atol=1e-6)
    dim = len(record["before"])
    assert record["sent"].shape == (5, 2 * dim) and np.abs(record["honest"][:, dim:]).max() > 1e-3
    same_bits(record["sent"][:, dim:], record["honest"][:, dim:])


# --- Rounds -------------------------------------------------------------------------------------


def everybody(mode, **fields):
    """One round in which all clients attack."""
    attack = {"name": "byzantine", "mode": mode} | fields
    return rounds_of(small(attack=attack, threat={"num_malicious": 5}, rounds=1), 1)[0][0]


def test_a_round_of_attackers_alone_makes_the_model_that_they_send():
    np.testing.assert_allclose(everybody("zero")["after"], 0.0, atol=1e-7)
    drawn = everybody("random", scale=0.1)["after"]
    assert np.abs(drawn).max() <= 0.1 and 0.02 < drawn.std() < 0.04  # the mean of five
    record = everybody("flip")
    counts = record["weights"][0].astype(np.float64)
    clean = record["before"] + counts @ record["honest"] / counts.sum()
    assert np.abs(clean - record["before"]).max() > 1e-3
    np.testing.assert_allclose(record["after"], 2 * record["before"] - clean, atol=1e-6)


@pytest.mark.slow
def test_a_round_leaves_trained_statistics():
    """A zero model with the statistics that the clients saw."""
    model = {"name": "resnet", "depth": 8, "convolution": "xla"}
    spec = small(
        attack="byzantine",
        threat={"num_malicious": 5},
        rounds=1,
        model=model,
        execution={"clients": "map"},
    )
    records, task = rounds_of(spec, 1)
    record, statistics, weights = records[0], task.space.observed, task.space.trained
    counts = record["weights"][0].astype(np.float64)
    moved = counts @ record["honest"][:, statistics] / counts.sum()
    assert np.abs(moved).max() > 1e-3
    np.testing.assert_allclose(record["after"][weights], 0.0, atol=1e-6)
    np.testing.assert_allclose(
        record["after"][statistics], record["before"][statistics] + moved, atol=1e-5
    )


def test_attackers_are_drawn_anew_in_every_round():
    """As FedML does; each row keeps its number of examples, and honest rows every bit."""
    threat = {"num_malicious": 2, "redraw": True}
    spec = small(attack="byzantine", threat=threat, rounds=8)
    records, _ = rounds_of(spec, 8)
    sets = set()
    for record in records:
        bad = record["malicious"]
        assert bad.sum() == 2
        sets.add(tuple(record["ids"][bad].tolist()))
        same_bits(
            record["sent"][bad], np.broadcast_to(-record["before"], record["sent"][bad].shape)
        )
        same_bits(record["sent"][~bad], record["honest"][~bad])
        same_bits(record["weights"][1], record["weights"][0])
        assert set(record["weights"][0]) == {9.0, 8.0}
    assert len(sets) > 4
    assert all(record["attack_rounds"] == 1 for record in records)


def test_wrong_fields_are_refused():
    threat = {"num_malicious": 1}
    for fields, message in (
        ({"mode": "gauss"}, "attack.mode must be one of 'zero', 'random', 'flip', got 'gauss'"),
        ({"mode": "random", "scale": 0}, "attack.scale must be > 0, got 0"),
        (
            {"mode": "flip", "scale": 2.0},
            "attack.scale is read by mode 'random' only, got mode='flip', scale=2",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            from_mapping(small(attack={"name": "byzantine", **fields}, threat=threat))

"""Lazy workers and free-riders, against plain NumPy, and what attacks remember of a round."""

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attacked import rounds_of
from helpers import CLIENT_OF_TWENTY, same_bits, small

import fedjax_sec
from fedjax_sec import core
from fedjax_sec.core import ConfigError, Message, registry
from fedjax_sec.core.types import AttackerView
from fedjax_sec.round.pipeline import Attack
from fedjax_sec.runs.config import from_mapping
from fedjax_sec.testing import update_attacks

D, K = 400, 4
BAD = np.array([True, False, True, False])
RNG = np.random.default_rng(0)
#: Global models and honest updates of seven rounds.
MODELS = np.cumsum(0.1 * RNG.normal(size=(7, D)), axis=0).astype(np.float32)
HONEST = RNG.normal(size=(7, K, D)).astype(np.float32)


def play(spec, count=6, malicious=None, ids=None, clients=K, task=None, key=0, models=MODELS):
    """The rows sent in each round [count, K, D]; the keys of the rounds are equal."""
    pipeline = Attack.build(spec)
    state = pipeline.init(clients, models.shape[1])
    malicious = np.broadcast_to(BAD, (count, K)) if malicious is None else malicious
    ids = np.broadcast_to(np.arange(K), (count, K)) if ids is None else ids

    @jax.jit
    def step(state, updates, params, bad, who, index):
        view = AttackerView(bad, bad, params, who, index, task)
        message = Message(updates, jnp.ones(K))
        sent, state, _ = pipeline.apply(jax.random.key(key), message, state, view)
        return sent.vector, pipeline.remember(state, message, jnp.ones(K, bool), view)

    rounds = []
    for t in range(count):
        args = HONEST[t][:, : models.shape[1]], models[t], malicious[t], ids[t]
        sent, state = step(state, *map(jnp.asarray, args), jnp.int32(t))
        same_bits(np.asarray(sent)[~malicious[t]], args[0][~malicious[t]])
        rounds.append(np.asarray(sent))
    return np.stack(rounds)


def statistics_first(count):
    """A task of whose D parameters the first ones are running statistics."""
    space = types.SimpleNamespace(observed=slice(0, count), trained=slice(count, D))
    return types.SimpleNamespace(space=space)


# --- Free-riders --------------------------------------------------------------------------------


def test_plain_free_riders_send_nothing_new():
    same_bits(play("free_rider")[:, BAD], np.zeros((6, 2, D), np.float32))


def test_random_weights_are_uniform_up_to_r():
    sent = play({"name": "free_rider", "mode": "random", "half_width": 0.25})[0, BAD]
    assert -0.25 <= sent.min() < -0.24 and 0.24 < sent.max() <= 0.25
    np.testing.assert_allclose(sent.std(axis=1), 0.25 / np.sqrt(3), rtol=0.1)
    assert not np.array_equal(sent[0], sent[1])


@pytest.mark.parametrize(("c", "gamma"), [(1.0, 1.0), (3.0, 0.5), (1.0, 2.0)])
def test_disguised_noise_has_the_deviation_of_the_paper(c, gamma):
    """All rounds share a key, so that the noise of two rounds is in the ratio of its deviations."""
    spec = {"name": "free_rider", "mode": "disguised", "multiplier": c, "decay": gamma}
    sent = play(spec)[:, BAD].astype(np.float64)
    sigma = sum(abs(float(MODELS[1][j]) - float(MODELS[0][j])) for j in range(D)) / D
    expected = [c * 1e-3] + [c * sigma * t**-gamma for t in range(1, 6)]
    np.testing.assert_allclose(sent[0].std(), expected[0], rtol=0.06)
    for t in range(6):
        np.testing.assert_allclose(sent[t] / sent[0], expected[t] / expected[0], rtol=1e-4)
    first = play(spec | {"initial_std": 0.5})[0, BAD]
    np.testing.assert_allclose(first, 500 * sent[0], rtol=1e-4)


def test_statistics_are_no_parameters_of_the_noise():
    models = MODELS.copy()
    models[1:, :100] += 1000.0  # not in the mean of the parameters' moves
    spec = {"name": "free_rider", "mode": "disguised"}
    sent = play(spec, task=statistics_first(100), models=models)[:, BAD]
    sigma = np.abs(models[1, 100:] - models[0, 100:]).mean()
    assert (sent[:, :, :100] == 0).all()
    ratio = sent[1, :, 100:] / sent[0, :, 100:]
    np.testing.assert_allclose(ratio, sigma / 1e-3, rtol=1e-4)
    for mode in ("random", "delta_weights", "advanced_delta_weights"):
        sent = play({"name": "free_rider", "mode": mode}, task=statistics_first(100))
        assert (sent[1:, BAD, :100] == 0).all() and (sent[1:, BAD, 100:] != 0).any()


def test_delta_weights_are_the_last_global_step():
    sent = play({"name": "free_rider", "mode": "delta_weights"})[:, BAD]
    same_bits(sent[0], np.zeros((2, D), np.float32))
    for t in range(1, 6):
        same_bits(sent[t], np.stack(2 * [MODELS[t] - MODELS[t - 1]]))


def test_advanced_delta_weights_add_noise():
    plain = play({"name": "free_rider", "mode": "delta_weights"})[:, BAD].astype(np.float64)
    spec = {"name": "free_rider", "mode": "advanced_delta_weights"}
    noise = play(spec)[:, BAD] - plain
    np.testing.assert_allclose(noise.std(axis=(1, 2)), 1e-3, rtol=0.06)
    np.testing.assert_allclose(noise.mean(axis=(1, 2)), 0.0, atol=1.5e-4)
    assert np.abs(np.corrcoef(noise[0])[0, 1]) < 0.2
    wide = play(spec | {"noise_std": 2.0})[:, BAD] - plain
    np.testing.assert_allclose(wide, 2000 * noise, rtol=1e-2, atol=1e-3)


def test_rounds_without_a_free_rider_show_it_nothing():
    malicious = np.array([BAD, BAD, ~BAD & False, ~BAD & False, BAD, BAD])
    sent = play({"name": "free_rider", "mode": "delta_weights"}, malicious=malicious)
    same_bits(sent[4, BAD], np.stack(2 * [MODELS[4] - MODELS[1]]))
    sent = play({"name": "free_rider", "mode": "disguised"}, malicious=malicious)
    ratio = sent[5, BAD] / sent[1, BAD]
    np.testing.assert_allclose(ratio, 1 / 3, rtol=1e-4)  # its rounds 3 and 1


def test_free_riders_in_rounds_follow_the_server():
    """The first round's zeros are no reason to refuse the attack, nor to warn."""
    attack = {"name": "free_rider", "mode": "delta_weights"}
    spec = small(attack=attack, threat={"num_malicious": 2}, rounds=4)
    records, _ = rounds_of(spec, 4)
    before = None
    for record in records:
        step = 0 * record["before"] if before is None else record["before"] - before
        same_bits(record["sent"][record["malicious"]], np.stack(2 * [step]))
        counts = record["weights"][1].astype(np.float64)
        moved = counts @ record["sent"].astype(np.float64) / counts.sum()
        np.testing.assert_allclose(record["after"], record["before"] + moved, atol=1e-6)
        assert record["attack_rounds"] == 1
        before = record["before"]


def test_a_run_that_begins_later_counts_from_there():
    attack = {"name": "free_rider", "mode": "delta_weights"}
    spec = small(attack=attack, threat={"num_malicious": 2, "start": 2}, rounds=4)
    records, _ = rounds_of(spec, 4)
    assert [record["malicious"].sum() for record in records] == [0, 0, 2, 2]
    bad = records[3]["malicious"]
    same_bits(records[2]["sent"][bad], 0 * records[2]["sent"][bad])
    step = records[3]["before"] - records[2]["before"]
    same_bits(records[3]["sent"][bad], np.stack(2 * [step]))


def test_a_stack_is_the_first_round():
    stack = HONEST[0]
    for mode in ("plain", "delta_weights"):
        with_params = {"malicious": BAD, "params": MODELS[0]}
        sent = np.asarray(fedjax_sec.attack(stack, "free_rider", mode=mode, **with_params))
        same_bits(sent[BAD], np.zeros((2, D), np.float32))
        same_bits(sent[~BAD], stack[~BAD])
    half = fedjax_sec.attack(
        stack.astype(np.float16), "free_rider", mode="disguised", malicious=BAD
    )
    assert half.dtype == np.float16 and 0 < np.abs(half[BAD]).max() < 0.01


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "lazy"}, "attack.mode must be one of 'plain', 'disguised', .* got 'lazy'"),
        (
            {"decay": 2.0},
            "attack.decay is read by mode 'disguised' only, got .* decay=2",
        ),
        (
            {"mode": "random", "noise_std": 1.0},
            "noise_std is read by mode 'advanced_delta_weights'",
        ),
        ({"mode": "random", "half_width": 0.0}, "attack.half_width must be > 0"),
        ({"mode": "disguised", "decay": -1.0}, "attack.decay must be >= 0"),
    ],
)
def test_wrong_fields_of_free_riders_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(small(attack={"name": "free_rider", **fields}, threat={"num_malicious": 1}))


# --- Lazy workers -------------------------------------------------------------------------------


def lazy(**fields):
    return {"name": "lazy_worker", **fields}


def test_lazy_with_the_global_model_sends_the_mask_alone():
    same_bits(play(lazy())[:, BAD], np.zeros((6, 2, D), np.float32))
    uniform = play(lazy(mask="uniform", scale=2.0))[:, BAD]
    assert (uniform == uniform[:, :, :1]).all()  # one number for all weights
    assert np.abs(uniform).max() <= 2 and (uniform[:, 0, 0] != uniform[:, 1, 0]).all()
    random = play(lazy(mask="random", scale=2.0))[0, BAD]
    assert -2 <= random.min() < -1.97 and 1.97 < random.max() < 2
    np.testing.assert_allclose(random.std(), 2 / np.sqrt(3), rtol=0.06)
    gaussian = play(lazy(mask="gaussian", mean=3.0, scale=0.5))[0, BAD]
    np.testing.assert_allclose(gaussian.mean(), 3.0, atol=0.06)
    np.testing.assert_allclose(gaussian.std(), 0.5, rtol=0.06)
    masked = play(lazy(mask="gaussian"), task=statistics_first(100))[:, BAD]
    assert (masked[:, :, :100] == 0).all() and (masked[:, :, 100:] != 0).all()


def previous_models(malicious, ids, clients, by_position=False):
    """Each lazy row without a mask, by loops: the model that it sent when it trained last."""
    kept, expected = [None] * clients, []
    for t in range(len(malicious)):
        rows = []
        for k in range(K):
            slot = k if by_position else ids[t][k]
            honest = HONEST[t][k].astype(np.float64)
            if malicious[t][k] and kept[slot] is not None:
                rows.append(kept[slot] - MODELS[t])
            else:
                kept[slot] = MODELS[t] + honest
                rows.append(honest)
        expected.append(rows)
    return np.array(expected)


@pytest.mark.parametrize("convention", ["paper", "fedsecurity"])
def test_lazy_clients_send_the_model_that_they_trained_last(convention):
    """Fixed ones that of the first round for ever, redrawn ones that of their last honest round."""
    everybody = np.broadcast_to(np.arange(K), (6, K))
    redrawn = np.array([[1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [1, 1, 1, 1]]) == 1
    redrawn = np.vstack([redrawn, BAD[None]])
    for malicious in (np.broadcast_to(BAD, (6, K)), redrawn):
        sent = play(lazy(base="client", convention=convention), malicious=malicious)
        expected = previous_models(malicious, everybody, K)
        np.testing.assert_allclose(sent, expected, atol=1e-5)
    same_bits(sent[0], HONEST[0])  # nobody has a previous model
    assert np.abs(sent[1:] - HONEST[1:6])[redrawn[1:]].min(axis=1).max() > 0


@pytest.mark.parametrize("convention", ["paper", "fedsecurity"])
def test_whose_previous_model_it_is_where_few_clients_take_part(convention):
    """FedML keeps models by position in the round, so that a client sends another one's."""
    ids = np.array(
        [[0, 1, 2, 3], [4, 0, 5, 6], [0, 4, 6, 5], [1, 2, 0, 7], [7, 6, 5, 0], [0, 2, 1, 4]]
    )
    malicious = np.isin(ids, [0, 4, 5])
    spec = lazy(base="client", convention=convention)
    sent = play(spec, malicious=malicious, ids=ids, clients=8)
    by_position = convention == "fedsecurity"
    expected = previous_models(malicious, ids, 8, by_position)
    np.testing.assert_allclose(sent, expected, atol=1e-5)
    other = previous_models(malicious, ids, 8, not by_position)
    assert np.abs(sent - other)[malicious].max() > 1


def test_masks_of_the_code_add_up_and_ours_do_not():
    """It writes them into the model that they hide: the cached one, or the round's global one."""
    mask = {"mask": "gaussian", "mean": 1.0, "scale": 1e-6}
    ours, theirs = (
        play(lazy(base="client", convention=c, **mask)) for c in ("paper", "fedsecurity")
    )
    trained = MODELS[0] + HONEST[0][BAD].astype(np.float64)
    for t in range(1, 6):
        np.testing.assert_allclose(ours[t, BAD], trained - MODELS[t] + 1, atol=1e-4)
        np.testing.assert_allclose(theirs[t, BAD], trained - MODELS[t] + t, atol=1e-4)
    ours, theirs = (
        play(lazy(convention=c, mask="gaussian", mean=1.0, scale=0.1))
        for c in ("paper", "fedsecurity")
    )
    assert (ours[:, 0] != ours[:, 2]).any()
    same_bits(theirs[0], HONEST[0])  # in its first round nobody is lazy
    for t in range(1, 6):
        same_bits(theirs[t, 0], theirs[t, 2])
        np.testing.assert_allclose(theirs[t, 0], ours[t, 0] + ours[t, 2], atol=1e-5)


def test_a_previous_model_has_its_own_statistics():
    sent = play(lazy(base="client", mask="random"), task=statistics_first(100))
    trained = MODELS[0] + HONEST[0][BAD].astype(np.float64)
    off = sent[1, BAD] - (trained - MODELS[1])
    np.testing.assert_allclose(off[:, :100], 0.0, atol=1e-5)
    assert 0.9 < np.abs(off[:, 100:]).max() < 1


def test_lazy_rounds_with_redrawn_attackers():
    """The honest models of clients that are lazy later are remembered though nobody sees them."""
    spec = small(attack=lazy(base="client"), threat={"num_malicious": 2, "redraw": True}, rounds=6)
    records, _ = rounds_of(spec, 6)
    kept, resent = [None] * 5, 0
    for record in records:
        model = record["before"].astype(np.float64)
        for k in range(5):
            if record["malicious"][k] and kept[k] is not None:
                np.testing.assert_allclose(record["sent"][k], kept[k] - model, atol=1e-6)
                resent += 1
            else:
                same_bits(record["sent"][k], record["honest"][k])
                kept[k] = model + record["honest"][k]
    assert resent >= 8
    assert records[0]["attack_rounds"] == 0 and records[1]["attack_rounds"] == 1


def test_rounds_without_an_attack_are_remembered():
    threat = {"num_malicious": 2, "start": 2, "every": 3}
    records, _ = rounds_of(small(attack=lazy(base="client"), threat=threat, rounds=6), 6)
    assert [int(r["malicious"].sum()) for r in records] == [0, 0, 2, 0, 0, 2]
    for attacked, honest in ((2, 1), (5, 4)):
        bad, last = records[attacked]["malicious"], records[honest]
        previous = last["before"] + last["honest"][bad] - records[attacked]["before"]
        np.testing.assert_allclose(records[attacked]["sent"][bad], previous, atol=1e-6)


def test_a_client_that_drops_out_is_not_remembered():
    spec = small(
        data={"num_clients": 20},
        client=CLIENT_OF_TWENTY,
        attack=lazy(base="client"),
        threat={"num_malicious": 20},
        server={"dropout": 0.5},
        rounds=4,
    )
    records, _ = rounds_of(spec, 4)
    seen = np.zeros(20, bool)
    for record in records:
        there = np.abs(record["sent"]).max(axis=1) > 0
        honest = (record["sent"] == record["honest"]).all(axis=1) & there
        same_bits(honest, there & ~seen)
        seen |= there
        same_bits(record["state"][0]["held"], seen)


def test_a_run_without_a_second_round_is_refused():
    message = "'lazy_worker' would do nothing: it begins in round 2, and round 1 is the last"
    for attack in (lazy(base="client"), lazy(convention="fedsecurity")):
        for threat in ({}, {"every": 3}):
            threat = {"num_malicious": 2} | threat
            spec = small(attack=attack, threat=threat, rounds=3 if "every" in threat else 1)
            with pytest.raises(ConfigError, match=message):
                from_mapping(spec)
        assert from_mapping(small(attack=attack, threat={"num_malicious": 2}, rounds=2))
        with pytest.raises(ConfigError, match="attack: " + message):
            fedjax_sec.attack(HONEST[0], attack, malicious=BAD)
    inside = {"name": "hybrid", "main": lazy(base="client"), "solo": "zero"}
    with pytest.raises(ConfigError, match="attack.main: " + message):
        fedjax_sec.attack(HONEST[0], inside, malicious=BAD)
    same_bits(np.asarray(fedjax_sec.attack(HONEST[0], lazy(), malicious=BAD))[0], np.zeros(D, "f4"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base": "local"}, "attack.base must be one of 'global', 'client', got 'local'"),
        (
            {"scale": 2.0},
            "scale is read by mask 'uniform' or 'random' or 'gaussian' only",
        ),
        (
            {"mask": "random", "mean": 1.0},
            "mean is read by mask 'gaussian' only, got mask='ran",
        ),
        ({"mask": "random", "scale": -1.0}, "attack.scale must be > 0"),
        ({"mask": "blur"}, "attack.mask must be one of 'none', "),
    ],
)
def test_wrong_fields_of_lazy_workers_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(small(attack=lazy(**fields), threat={"num_malicious": 1}))


# --- What attacks remember ----------------------------------------------------------------------


def component(cls):
    cls.registered_name = "tested"
    return core.pytree(cls)


@component
class Gossips(core.UpdateAttack):
    """Sends the mean of what all clients sent in the round before, which it never saw."""

    def init(self, num_clients, dim):
        return jnp.zeros(dim)

    def apply(self, key, updates, state, view):
        return jnp.broadcast_to(state[None] - 1.0, updates.shape), state, {}

    def remember(self, state, message, rows, view):
        return jnp.where(rows[:, None], message.vector, 0.0).mean(axis=0)


@component
class RemembersEverything(core.UpdateAttack):
    """Of its own client, but also what is not finite."""

    def init(self, num_clients, dim):
        return jnp.zeros((num_clients, dim))

    def apply(self, key, updates, state, view):
        return -state[view.client_ids] - 1.0, state, {}

    def remember(self, state, message, rows, view):
        return state.at[view.client_ids].set(message.vector)


@component
class Forgets(core.UpdateAttack):
    """Holds another attack and does not tell it what to remember."""

    inner: Any = core.component("attack", "sign_flip", "An attack.")

    def shares(self, ranks):
        return {"inner": ranks >= 0}

    def init(self, num_clients, dim):
        return self.inner.init(num_clients, dim)

    def apply(self, key, updates, state, view):
        return self.inner.apply(key, updates, state, view)


def test_the_contract_notices_a_memory_of_other_clients():
    with pytest.raises(AssertionError):
        update_attacks.check_remembers_own_rows_only(Gossips())
    with pytest.raises(AssertionError, match="nan of an earlier round reaches what the attack"):
        update_attacks.check_remembers_own_rows_only(RemembersEverything())
    for name in ("lazy_worker", "sign_flip"):
        part = registry.attacks.build(name)
        assert update_attacks.check_remembers_own_rows_only(part) is None
    part = registry.attacks.build(lazy(base="client"))
    assert update_attacks.check_remembers_own_rows_only(part) is None


def test_the_contract_notices_a_wrapper_that_forgets():
    part = registry.attacks.build(lazy(base="client"))
    with pytest.raises(AssertionError, match="what the attack inside is to remember is lost"):
        update_attacks.check_wrapped(Forgets(), "inner", part)
    assert update_attacks.check_wrapped(Forgets(), "inner", registry.attacks.build("zero")) is None


def test_a_lazy_worker_inside_a_hybrid():
    inside = {"name": "hybrid", "main": lazy(base="client"), "solo": "zero"}
    sent = play(inside)
    same_bits(sent[:, 0], np.zeros((6, D), np.float32))
    expected = previous_models(np.broadcast_to(BAD, (6, K)), np.broadcast_to(range(K), (6, K)), K)
    np.testing.assert_allclose(sent[:, 2], expected[:, 2], atol=1e-5)

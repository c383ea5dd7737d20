"""The defences of the RLR paper against NumPy in float64, cases by hand, and runs by client id."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import same_bits, small
from programs import program_of, replicas_of

import fedjax_sec
from fedjax_sec.core import ConfigError, registry
from fedjax_sec.core.types import ServerView
from fedjax_sec.runs import config


def aggregate(updates, *stages, **kwargs):
    return np.asarray(fedjax_sec.aggregate(np.asarray(updates, np.float32), list(stages), **kwargs))


def rlr(threshold):
    return {"name": "rlr", "threshold": threshold}


def random_updates(clients, seed, dim=7):
    return np.random.default_rng(seed).normal(size=(clients, dim)).astype(np.float32)


# --- Oracles, written from the papers' equations ------------------------------------------------


def rates(updates, threshold):
    """eta_theta / eta of the RLR paper's Equation 5."""
    return np.where(np.abs(np.sign(updates).sum(0)) >= threshold, 1.0, -1.0)


def foolsgold_weights(history, convention="paper", kappa=1.0):
    """alpha of Fung et al.'s Algorithm 1, client by client."""
    n = len(history)
    cs = np.zeros((n, n))
    for i, j in itertools.permutations(range(n), 2):
        size = np.linalg.norm(history[i]) * np.linalg.norm(history[j])
        cs[i, j] = history[i] @ history[j] / size if size else 0.0
    added = 1e-5 if convention == "author" else 0.0
    v = cs.max(1) + added
    for i, j in itertools.permutations(range(n), 2):
        if v[j] > v[i]:
            cs[i, j] *= v[i] / v[j]
    alpha = np.clip(1 - cs.max(1), 0, 1)
    alpha[alpha < 1e-7] = 1e-15 if convention == "fedsecurity" else 0.0
    alpha = alpha / alpha.max()
    ceiling = {"paper": 1.0, "author": 0.99, "fedsecurity": 0.999999}[convention]
    alpha[alpha == 1] = ceiling
    with np.errstate(divide="ignore"):
        alpha = kappa * (np.log(alpha / (1 - alpha) + added) + 0.5)
    return np.clip(alpha, 0, 1)


def foolsgold(updates, history, counts, combine="weighted", **options):
    alpha = foolsgold_weights(history, **options)
    if combine == "sum":
        return alpha @ updates
    total = counts.sum() if combine == "weighted" else (alpha * counts).sum()
    return (alpha * counts) @ updates / total


# --- RLR and sign -------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0, 1, 3, 4, 10])
@pytest.mark.parametrize("rule", ["mean", "median", "sign"])
def test_rlr_behind_any_aggregator(rule, threshold):
    updates = random_updates(10, 3, dim=40)
    plain = {"mean": updates.mean(0), "median": np.median(updates, 0)}
    plain["sign"] = np.sign(np.sign(updates).sum(0))
    expected = rates(updates, threshold) * plain[rule]
    np.testing.assert_allclose(aggregate(updates, rule, rlr(threshold)), expected, rtol=1e-4)
    flipped = (rates(updates, threshold) < 0).mean()
    assert threshold in (0, 1) or flipped > 0


def test_ties_at_the_threshold_are_trusted():
    """Sums of signs 4, 2, -2, 0, -4 and, with zeros, 3 and 1."""
    updates = np.array(
        [
            [1, 1, 1, 1, -1, 1, 1],
            [2, 2, -1, 1, -1, 1, 0],
            [3, 3, -1, -1, -1, 1, 0],
            [4, -1, -9, -3, -1, 0, 0],
        ]
    )
    signs = {0: [1] * 7, 2: [1, 1, 1, -1, 1, 1, -1], 2.5: [1, -1, -1, -1, 1, 1, -1]}
    signs |= {3: [1, -1, -1, -1, 1, 1, -1], 4: [1, -1, -1, -1, 1, -1, -1]}
    for threshold, expected in signs.items():
        got = aggregate(updates, "mean", rlr(threshold))
        np.testing.assert_array_equal(got, np.array(expected) * updates.mean(0))


def test_bad_rows_do_not_vote():
    updates = random_updates(6, 0)
    updates[4, 2] = np.inf
    rest = np.delete(updates, 4, axis=0)
    np.testing.assert_allclose(
        aggregate(updates, "mean", rlr(3)), rates(rest, 3) * rest.mean(0), rtol=1e-5
    )
    np.testing.assert_array_equal(aggregate(updates, "sign"), np.sign(np.sign(rest).sum(0)))


def test_clipping_comes_before_the_votes_and_noise_before_or_after_the_flip():
    updates, key = 9 * random_updates(5, 1), jax.random.key(3)
    clip = {"name": "clip_norm", "max_norm": 0.5}
    noise = {"name": "gaussian_noise", "std": 0.2, "max_norm": 0.5}
    norms = np.linalg.norm(updates, axis=1, keepdims=True)
    clipped = (updates * np.minimum(1, 0.5 / norms)).mean(0)
    for stages in (["mean", noise, rlr(4)], ["mean", rlr(4), noise]):
        got = aggregate(updates, clip, *stages, key=key)
        index = 1 + stages.index(noise)
        drawn = 0.1 * jax.random.normal(jax.random.fold_in(key, index), (7,))
        flips = rates(updates, 4)
        late = stages[-1] is noise
        expected = flips * clipped + drawn if late else flips * (clipped + drawn)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
        assert (flips < 0).any() and (flips > 0).any()


def test_noise_is_sigma_times_m():
    noisy = aggregate(
        np.zeros((2, 20_000)), "mean", {"name": "gaussian_noise", "std": 0.5, "max_norm": 4.0}
    )
    assert abs(noisy.std() - 2.0) < 0.03


def test_threshold_beyond_the_clients():
    for threshold in (5.5, {"schedule": "steps", "values": {0: 0, 9: 5.5}}):
        with pytest.raises(ConfigError, match=r"defense\[1\].threshold must be <= K = 5.*got 5.5"):
            config.from_mapping(small(defense=["mean", rlr(threshold)]))
    with pytest.raises(ConfigError, match="threshold must be >= 0"):
        config.from_mapping(small(defense=["mean", rlr(-1)]))


def test_sign_and_what_it_kept():
    updates = random_updates(6, 4)
    updates[0, 0] = 0.0
    expected = np.sign(np.sign(updates).sum(0))
    assert (expected == 0).any() and {-1.0, 1.0} <= set(expected)
    np.testing.assert_array_equal(aggregate(updates, "sign"), expected)
    updates[3] = 9 * expected  # agrees with the majority, but does not take part
    updates[3, 0] = np.nan
    kept = apply("sign", updates)[1]["kept"]
    rest = np.delete(updates, 3, axis=0)
    winner = np.sign(np.sign(rest).sum(0))
    np.testing.assert_allclose(np.delete(kept, 3), (np.sign(rest) == winner).mean(1), rtol=1e-6)
    assert kept[3] == 0


def test_share_of_flipped_coordinates_is_recorded():
    metrics = fedjax_sec.run(small(defense=["mean", rlr(5)])).metrics
    assert 0 < metrics["rlr/flipped"][-1] < 1
    metrics = fedjax_sec.run(
        small(defense=["mean", rlr({"schedule": "steps", "values": {0: 0, 2: 5}})])
    ).metrics
    assert metrics["rlr/flipped"][1:3].tolist() == [0, 0] and metrics["rlr/flipped"][3] > 0


# --- FoolsGold ----------------------------------------------------------------------------------


def apply(spec, updates, ids=None, state=None, clients=None, weights=None):
    """(aggregate, metrics, state) of one aggregator on one round."""
    part = registry.defenses.build(spec)
    ids = np.arange(len(updates)) if ids is None else np.asarray(ids)
    updates = jnp.asarray(updates, jnp.float32)
    state = part.init(clients or len(updates), updates.shape[1]) if state is None else state
    view = ServerView(
        params=jnp.zeros(updates.shape[1]),
        weights=jnp.ones(len(updates)) if weights is None else jnp.asarray(weights, jnp.float32),
        client_ids=jnp.asarray(ids),
        valid=jnp.isfinite(updates).all(1),
        round=jnp.array(0),
    )
    out, state, metrics = part.apply(jax.random.key(0), updates, state, view)
    return np.asarray(out), {k: np.asarray(v) for k, v in metrics.items()}, state


def alike_updates(seed, clients=8, dim=12):
    """Honest clients with something in common, and three that push in nearly one direction."""
    rng = np.random.default_rng(seed)
    updates = rng.normal(size=(clients, dim)) + 0.6 * rng.normal(size=dim)
    updates[:3] = rng.normal(size=dim) + 0.1 * rng.normal(size=(3, dim))
    return updates


@pytest.mark.slow
@pytest.mark.parametrize("combine", ["weighted", "sum", "normalised"])
@pytest.mark.parametrize("convention", ["paper", "author", "fedsecurity"])
def test_foolsgold_against_numpy(convention, combine):
    counts = np.arange(1.0, 9.0)
    spec = {"name": "foolsgold", "convention": convention, "combine": combine}
    between = 0
    for seed, kappa in ((0, 1.0), (1, 1.0), (2, 0.4)):
        updates = alike_updates(seed)
        out, metrics, _ = apply(spec | {"confidence": kappa}, updates, weights=counts)
        alpha = foolsgold_weights(updates, convention, kappa)
        np.testing.assert_allclose(metrics["kept"], alpha, rtol=1e-3, atol=1e-4)
        expected = foolsgold(updates, updates, counts, combine, convention=convention, kappa=kappa)
        np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-4)
        assert alpha[:3].max() < 0.05 and alpha[3:].max() == 1
        between += ((alpha > 0.05) & (alpha < 0.95)).sum()
    assert between  # not only zeros and ones


def test_conventions_differ_where_they_are_said_to():
    """The author's epsilon pardons a client without any resemblance a little less."""
    updates = [[1.0, 0.0, 0.0], [1.0, 0.2, 0.0], [0.3, 0.0, 1.0], [0.0, 0.0, -1.0]]
    kept = [
        apply({"name": "foolsgold", "convention": c, "confidence": 0.04}, updates)[1]["kept"]
        for c in ("paper", "author", "fedsecurity")
    ]
    # ln(0.99 / 0.01) + 0.5 = 5.1 and ln(0.999999 / 1e-6) + 0.5 = 14.3, times kappa.
    np.testing.assert_allclose([k.max() for k in kept], [1.0, 0.2038, 0.5726], rtol=2e-3)


@pytest.mark.slow
def test_identical_updates_lose_everything_and_zero_is_like_nothing():
    updates = [[2.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
    out, metrics, _ = apply("foolsgold", updates)
    assert metrics["kept"].tolist() == [0, 0, 1, 1]
    np.testing.assert_allclose(out, [0.0, 0.25])
    for convention in ("paper", "author", "fedsecurity"):
        spec = {"name": "foolsgold", "convention": convention}
        same = np.tile(alike_updates(0)[:1], (6, 1))
        out, metrics, _ = apply(spec, same)
        assert metrics["kept"].tolist() == [1] * 6  # nobody can be told from the others
        np.testing.assert_allclose(out, same[0], rtol=1e-5)


@pytest.mark.slow
def test_a_single_client_is_kept():
    out, metrics, _ = apply("foolsgold", [[3.0, 4.0]])
    assert metrics["kept"].tolist() == [1] and out.tolist() == [3, 4]


@pytest.mark.slow
def test_histories_follow_the_client_not_the_row():
    """Sampled clients in changing order: similarity is that of the sums of what each one sent."""
    rng, clients, dim = np.random.default_rng(5), 9, 6
    history, state = np.zeros((clients, dim)), None
    for _ in range(6):
        ids = rng.permutation(clients)[:5]
        updates = rng.normal(size=(5, dim))
        counts = rng.integers(1, 9, 5).astype(float)
        bad = rng.integers(5)
        sent = updates.copy()
        sent[bad, 0] = np.nan
        out, metrics, state = apply("foolsgold", sent, ids, state, clients=clients, weights=counts)
        rest = np.delete(np.arange(5), bad)
        history[ids[rest]] += updates[rest]
        np.testing.assert_allclose(state, history, rtol=1e-5, atol=1e-6)
        alpha = foolsgold_weights(history[ids[rest]])
        np.testing.assert_allclose(metrics["kept"][rest], alpha, rtol=1e-3, atol=1e-4)
        assert metrics["kept"][bad] == 0
        expected = foolsgold(updates[rest], history[ids[rest]], counts[rest])
        np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-4)


def test_history_and_features_in_a_run_with_sampled_clients():
    spec = small(server={"clients_per_round": 3}, defense={"name": "foolsgold", "num_features": 70})
    one = config.from_mapping(spec)
    program = program_of(one)
    replicas = replicas_of([one])
    state, metrics = program.advance(program.init(replicas), replicas, 0, 1)
    (history,) = state.defense
    assert history.shape == (1, 5, 70) and metrics["kept"].shape == (1, 3)
    seen = np.abs(history[0]).sum(1) > 0
    assert seen.sum() == 3
    # The output layer: what it is compared on, and nothing else.
    updates = random_updates(4, 0, dim=20)
    tail = apply({"name": "foolsgold", "num_features": 6}, updates)[1]["kept"]
    np.testing.assert_allclose(tail, foolsgold_weights(updates[:, -6:]), rtol=1e-3, atol=1e-4)
    with pytest.raises(ConfigError, match="num_features must be <= D = 20, got 21"):
        apply({"name": "foolsgold", "num_features": 21}, updates)


def test_a_history_that_overflows_counts_for_nothing():
    updates = np.array([[3e38, 0.0], [0.0, 1.0], [1.0, 0.1]])
    _, _, state = apply("foolsgold", updates)
    out, metrics, _ = apply("foolsgold", updates, state=state)
    assert metrics["kept"][0] == 0 and np.isfinite(out).all()
    np.testing.assert_allclose(metrics["kept"][1:], foolsgold_weights(updates[1:]), rtol=1e-3)


# --- The rows of Table 1 ------------------------------------------------------------------------

AGGREGATORS = ["mean", "median", "sign", "foolsgold"]
NOISE = {"name": "gaussian_noise", "std": 0.001, "max_norm": 4.0}


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("threshold", [0, 4])
@pytest.mark.parametrize("name", AGGREGATORS)
def test_every_row_is_a_configuration(name, threshold, noise):
    stages = [name, *([NOISE] if noise else []), *([rlr(threshold)] if threshold else [])]
    client = {"name": "sgd", "epochs": 2, "batch_size": 4, "max_norm": 4.0 if noise else None}
    for before in ([], [{"name": "clip_norm", "max_norm": 4.0}]):
        outcome = config.from_mapping(small(defense=before + stages, client=client))
        again = config.from_mapping(outcome.to_dict())
        assert again == outcome and again.client.max_norm == (4.0 if noise else None)


@pytest.mark.slow
def test_the_longest_row_runs():
    clip = {"name": "clip_norm", "max_norm": 4.0}
    result = fedjax_sec.run(small(defense=[clip, "foolsgold", NOISE, rlr(4)]))
    assert np.isfinite(result.metrics["loss"]).all()
    same_bits(result.params, fedjax_sec.run(result.experiment).params)

"""FedSecurity's defences against NumPy in float64, and hand-made cases for their traps."""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small
from scipy import optimize

import fedjax_sec
from fedjax_sec import core
from fedjax_sec.core import (
    ConfigError,
    Setting,
    Stage,
    check_components,
    numeric,
    registry,
    static,
    tree_space,
)
from fedjax_sec.core.types import ServerView
from fedjax_sec.defenses import _anomaly, _fedsecurity, _foolsgold, three_sigma
from fedjax_sec.ops.moments import weighted_mean
from fedjax_sec.testing import defenses as testing

#: A statistic, a hidden bias, and the last layer: a bias [2] and a kernel [2, 2].
TREE = {
    "batch_stats": {"mean": np.zeros(2)},
    "params": {"hidden": np.zeros(3), "output": {"bias": np.zeros(2), "kernel": np.zeros((2, 2))}},
}
SPACE = tree_space(TREE, {"batch_stats": TREE["batch_stats"], "params": TREE["params"]})
DIM, KERNEL = SPACE.dim, slice(7, 11)
PLACES = [slice(0, 2), slice(2, 5), slice(5, 7), slice(7, 11)]


def aggregate(updates, spec, **options):
    return np.asarray(fedjax_sec.aggregate(np.asarray(updates, np.float32), spec, **options))


class Rule:
    """A rule that keeps its state over the rounds in which it is called; compiled once a shape."""

    def __init__(self, spec, clients, dim=DIM, space=SPACE):
        self.part = registry.defenses.build(spec)
        given = (space,) if "space" in self.part.needs else ()
        self.state, self.space = self.part.init(clients, dim, *given), space
        self.step = jax.jit(self._step)

    def _step(self, key, updates, ids, counts, params, state):
        view = ServerView(
            params, counts, ids, jnp.isfinite(updates).all(axis=1), jnp.array(0), space=self.space
        )
        return self.part.apply(key, updates, state, view)

    def __call__(self, updates, ids=None, counts=None, params=None, seed=0):
        updates = jnp.asarray(updates, jnp.float32)
        clients, dim = updates.shape
        ids = jnp.arange(clients) if ids is None else jnp.asarray(ids)
        counts = jnp.ones(clients) if counts is None else jnp.asarray(counts, jnp.float32)
        params = jnp.zeros(dim) if params is None else jnp.asarray(params, jnp.float32)
        args = jax.random.key(seed), updates, ids, counts, params, self.state
        out, self.state, metrics = self.step(*args)
        return np.asarray(out), {name: np.asarray(value) for name, value in metrics.items()}


def weighted(updates, counts, kept):
    """The mean by numbers of examples of the clients that were kept."""
    rows = np.flatnonzero(kept)
    return sum(counts[i] * updates[i] for i in rows) / sum(counts[i] for i in rows)


# --- SLSGD --------------------------------------------------------------------------------------


def slsgd(updates, alpha, b):
    out = []
    for column in updates.T:
        kept = sorted(column)[b : len(column) - b]
        out.append(alpha * sum(kept) / len(kept))
    return np.array(out)


def fedml_slsgd(updates, counts, alpha, b):
    """`trimmed_mean` of `common/utils.py`: whole clients, sorted by their numbers of examples."""
    clients = sorted(zip(counts, updates, strict=True), key=lambda pair: pair[0])
    clients = clients[b : len(clients) - b]
    total = sum(count for count, _ in clients)
    return alpha * sum(count / total * row for count, row in clients)


@pytest.mark.parametrize("b", [0, 2])
def test_slsgd(b):
    updates = np.random.default_rng(0).normal(size=(7, 5))
    counts = np.array([5, 1, 7, 7, 2, 1, 9])
    spec = {"name": "slsgd", "alpha": 0.3, "num_byzantine": b}
    got = aggregate(updates, spec, weights=counts)
    np.testing.assert_allclose(got, slsgd(updates, 0.3, b), rtol=1e-5, atol=1e-6)
    got = aggregate(updates, spec | {"convention": "fedsecurity"}, weights=counts)
    expected = fedml_slsgd(updates, counts, 0.3, b)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_fedml_trims_by_examples_whatever_clients_send():
    updates, counts = [[1.0], [2.0], [3.0], [1e6]], [10, 1, 90, 20]
    spec = {"name": "slsgd", "num_byzantine": 1}
    assert aggregate(updates, spec, weights=counts).tolist() == [2.5]
    spec["convention"] = "fedsecurity"
    np.testing.assert_allclose(
        aggregate(updates, spec, weights=counts), [(10 * 1 + 20 * 1e6) / 30], rtol=1e-5
    )
    # Of equal numbers the first in the round counts as the smaller: rows 0 and 3 are trimmed.
    assert aggregate(updates, spec, weights=[5, 5, 5, 5]).tolist() == [2.5]
    assert aggregate([[1.0], [2.0], [3.0], [4.0]], spec, weights=[1, 1, 5, 5]) == (2 + 3 * 5) / 6


def test_alpha_is_the_weight_of_the_new_model_and_follows_a_schedule():
    schedule = {"schedule": "steps", "values": {0: 0.5, 1: 0.25}}
    norms = []
    for alpha in (schedule, 1.0):
        rule = {"name": "slsgd", "num_byzantine": 1, "alpha": alpha}
        norms.append(fedjax_sec.run(small(defense=rule, rounds=1)).metrics["aggregate_norm"][-1])
    np.testing.assert_allclose(norms[0], 0.5 * norms[1], rtol=1e-5)
    with pytest.raises(ConfigError, match="alpha = 0 never moves the model"):
        aggregate([[1.0], [2.0], [3.0]], {"name": "slsgd", "num_byzantine": 0, "alpha": 0.0})
    with pytest.raises(ConfigError, match="slsgd needs 2 f < K; with K = 4 .* <= 1, got 2"):
        aggregate(np.ones((4, 2)), {"name": "slsgd", "num_byzantine": 2})


# --- Residual reweighting -----------------------------------------------------------------------


def residual_reweighting(updates, lam=2.0, delta=0.1, line="repeated_median", gaussian=False):
    """(aggregate, weights) coordinate by coordinate, from the author code's formulas."""
    n, dim = updates.shape
    corrected, scores = np.zeros((n, dim)), np.zeros(n)
    for d in range(dim):
        y = updates[:, d]
        rank = np.empty(n)
        for place, client in enumerate(sorted(range(n), key=lambda i: (y[i], i))):
            rank[client] = place
        ordered = np.sort(y)
        slope = 0.0
        if line == "repeated_median":
            inner = [
                np.median([(ordered[i] - ordered[j]) / (i - j) for j in range(n) if j != i])
                for i in range(n)
            ]
            slope = np.median(inner)
        elif line == "theil_sen":
            pairs = [(i, j) for j in range(n) for i in range(j + 1, n)]
            slope = np.median([(ordered[i] - ordered[j]) / (i - j) for i, j in pairs])
        intercept = np.median(y) - slope * (n - 1) / 2
        design = np.stack([np.ones(n), rank], axis=1)
        hat = design @ np.linalg.inv(design.T @ design) @ design.T
        h = np.sqrt(np.maximum(1 - np.diag(hat), 0))
        fit = intercept + slope * rank
        residual = y - fit
        tau = 1.4826 * (1 + 5 / (n - 1)) * np.median(np.sort(np.abs(residual))[1:]) + 1e-7
        e, w = residual / tau, np.ones(n)
        for i in range(n):
            limit = lam * math.sqrt(2 / n)
            if gaussian:
                w[i] = math.exp(-(e[i] ** 2) / (2 * lam**2))
            elif e[i] != 0:
                w[i] = h[i] / e[i] * max(-limit, min(limit, e[i] / h[i]))
        scores += w * np.std(w, ddof=1)
        corrected[:, d] = np.where(w >= delta, y, fit)
    share = (scores / scores.max()) ** 2
    return share @ corrected / share.sum(), share


def clustered(clients, dim, seed=0):
    """A quarter of the clients lie elsewhere, in some coordinates only."""
    rng = np.random.default_rng([seed, clients])
    updates = rng.normal(size=(clients, dim))
    updates[: clients // 4, ::2] += 6
    return updates


@pytest.mark.parametrize("clients", [3, 4, 8, 11])
def test_residual_reweighting(clients):
    updates = clustered(clients, 7)
    rule = Rule("residual_reweighting", clients, 7)
    out, metrics = rule(updates, counts=np.arange(clients) + 1)
    expected, share = residual_reweighting(updates)
    np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(metrics["kept"], share, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize("line", ["repeated_median", "theil_sen", "median"])
def test_lines_and_weights_of_residual_reweighting(line, gaussian):
    updates = clustered(9, 6, seed=1)
    spec = {"name": "residual_reweighting", "line": line, "width": 1.3, "threshold": 0.4}
    out, metrics = Rule(spec | {"weights": "gaussian" if gaussian else "clipped"}, 9, 6)(updates)
    expected, share = residual_reweighting(updates, 1.3, 0.4, line, gaussian)
    np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(metrics["kept"], share, rtol=2e-3, atol=1e-4)


def test_blocks_of_columns_join_to_the_same_result():
    """40 clients are worked out 1,310 columns at a time: the second block overlaps the first."""
    updates = clustered(40, 1400)
    out, metrics = Rule("residual_reweighting", 40, 1400)(updates)
    expected, share = residual_reweighting(updates)
    np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(metrics["kept"], share, rtol=2e-3)


@pytest.mark.slow
def test_residual_reweighting_of_many_clients():
    """More than a sorting network is written out for, and n^3 beyond 31 bits."""
    updates = clustered(1400, 2)
    out, metrics = Rule("residual_reweighting", 1400, 2)(updates)
    expected, share = residual_reweighting(updates)
    np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(metrics["kept"], share, rtol=5e-3, atol=1e-4)


def test_ties_and_equal_updates_in_residual_reweighting():
    updates = np.array([[1.0, 2.0], [1.0, 3.0], [2.0, 2.0], [2.0, 7.0], [9.0, 2.0], [0.5, 1.0]])
    rule = Rule("residual_reweighting", 6, 2)
    expected, share = residual_reweighting(updates)
    out, metrics = rule(updates)
    np.testing.assert_allclose(out, expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["kept"], share, rtol=1e-3)
    # Without any residual the author code divides zero by zero.
    out, metrics = rule(np.tile([[3.0, -1.0]], (6, 1)))
    assert out.tolist() == [3.0, -1.0] and metrics["kept"].tolist() == [1.0] * 6


def test_residual_reweighting_without_some_clients():
    updates = clustered(9, 5, seed=2)
    sent = updates.copy()
    sent[4, 1], sent[7, 0] = np.nan, np.inf
    rest = np.delete(updates, [4, 7], axis=0)
    rule = Rule("residual_reweighting", 9, 5)
    np.testing.assert_allclose(rule(sent)[0], residual_reweighting(rest)[0], rtol=1e-3, atol=1e-4)
    sent[:7] = np.nan  # two are left: a line passes through them
    sent[7] = 1.0
    np.testing.assert_allclose(rule(sent)[0], (1.0 + updates[8]) / 2, rtol=1e-5)
    sent[:] = np.nan
    assert rule(sent)[0].tolist() == [0.0] * 5


def test_a_huge_value_is_replaced_by_the_line():
    updates = np.linspace(0, 1, 8)[:, None] * np.ones((1, 3))
    huge = updates.copy()
    huge[3] = 3e38
    out = Rule("residual_reweighting", 8, 3)(huge)[0]
    assert np.all((out > 0) & (out < 1.2))


@pytest.mark.slow
def test_residual_reweighting_holds_two_stacks_and_a_block():
    """Slopes of 50 clients and 100,000 parameters at once would be 1 GB."""
    part = registry.defenses.build("residual_reweighting")

    def apply(updates):
        view = ServerView(
            jnp.zeros(100_000), jnp.ones(50), jnp.arange(50), jnp.ones(50, bool), jnp.array(0)
        )
        return part.apply(None, updates, (), view)[0]

    shape = jax.ShapeDtypeStruct((50, 100_000), jnp.float32)
    memory = jax.jit(apply).lower(shape).compile().memory_analysis()
    stack = 4 * 50 * 100_000
    assert memory.argument_size_in_bytes == stack and memory.temp_size_in_bytes < 3 * stack


# --- Weak differential privacy ------------------------------------------------------------------


def test_weak_dp_clips_and_adds_absolute_noise_to_the_mean():
    rng, counts = np.random.default_rng(0), np.array([1, 2, 3, 4])
    updates = rng.normal(size=(4, 20_000)) * np.array([[0.001], [0.1], [1.0], [9.0]])
    expected = np.zeros(20_000)
    for count, row in zip(counts, updates, strict=True):
        expected += count * row * min(1, 3.0 / np.linalg.norm(row)) / counts.sum()
    spec = {"name": "weak_dp", "max_norm": 3.0, "std": 0.5}
    noise = aggregate(updates, spec, weights=counts) - expected
    assert abs(noise.std() - 0.5) < 0.01 and abs(noise.mean()) < 0.02
    assert np.linalg.norm(expected) > 0.5
    silent = aggregate(updates, spec | {"std": 0.0}, weights=counts)
    np.testing.assert_allclose(silent, expected, rtol=1e-4, atol=1e-6)
    other = aggregate(updates, spec, weights=counts, key=1) - expected
    assert abs(np.corrcoef(noise, other)[0, 1]) < 0.03


def test_fedml_adds_noise_to_every_model_and_clips_nothing():
    counts = np.array([1, 1, 2])
    updates = np.ones((3, 20_000)) * np.array([[1.0], [1.0], [500.0]])
    spec = {"name": "weak_dp", "std": 0.5, "convention": "fedsecurity"}
    noise = aggregate(updates, spec, weights=counts) - 250.5
    expected = 0.5 * math.sqrt(2 * 0.25**2 + 0.5**2)  # of the mean of three independent draws
    assert abs(noise.std() - expected) < 0.01


def test_weak_dp_refuses_a_norm_that_fedml_does_not_clip_to():
    rule = {"name": "weak_dp", "max_norm": 2.0, "convention": "fedsecurity"}
    with pytest.raises(ConfigError, match=r"max_norm is not read with convention 'fedsecurity'"):
        aggregate(np.ones((3, 2)), rule)


def test_weak_dp_is_clipping_the_mean_and_noise_in_units_of_the_norm():
    updates = np.random.default_rng(3).normal(size=(5, 4))
    stages = [{"name": "clip_norm", "max_norm": 0.7}, "mean"]
    rule = {"name": "weak_dp", "max_norm": 0.7, "std": 0.0}
    np.testing.assert_allclose(aggregate(updates, rule), aggregate(updates, stages), rtol=1e-5)


# --- The geometric median as FedML computes it --------------------------------------------------


def fedml_geometric_median(weights, tensors):
    """`compute_geometric_median` of `common/utils.py`, with NumPy arrays in float64."""
    eps, ftol = 1e-5, 1e-10

    def middle(alphas):
        total = np.zeros_like(tensors[0])
        for alpha, tensor in zip(alphas, tensors, strict=False):
            total = total + alpha * tensor
        return total

    point = middle(weights)
    value = sum(a * np.linalg.norm(point - t) for a, t in zip(weights, tensors, strict=False))
    for _ in range(100):
        before = value
        weights = np.array(
            [
                max(eps, a / max(eps, np.linalg.norm(point - t)))
                for a, t in zip(weights, tensors, strict=False)
            ]
        )
        weights = weights / weights.sum()
        point = middle(weights)
        value = sum(a * np.linalg.norm(point - t) for a, t in zip(weights, tensors, strict=False))
        if abs(before - value) < ftol * value:
            break
    return point


def fedml_rfa(updates, counts, places=PLACES):
    """`RFA_defense.py`: a set of counts, a set of their shares, and each tensor by itself."""
    weights = {int(count) for count in counts}
    weights = {weight / sum(weights, 0.0) for weight in weights}
    parts = [fedml_geometric_median(weights, [u[place] for u in updates]) for place in places]
    return np.concatenate(parts)


@pytest.mark.parametrize("clients", [1, 2, 3, 5, 6, 10, 19, 20, 78])
def test_the_order_of_python_s_sets(clients):
    """Hashes of floats scatter; tables of 8, 32, 128 and 512 places, with collisions."""
    weights_of = jax.jit(_fedsecurity.set_weights)
    rng = np.random.default_rng(clients)
    for largest in (3, 30, 6000, 200_000) if clients < 78 else (6000,):
        for _ in range(8):
            counts = rng.integers(1, largest + 1, clients)
            expected = {int(count) for count in counts}
            expected = list({count / sum(expected, 0.0) for count in expected})
            alpha, used = weights_of(jnp.asarray(counts, jnp.float32), jnp.ones(clients, bool))
            assert used.tolist() == [i < len(expected) for i in range(clients)]
            np.testing.assert_allclose(alpha[: len(expected)], expected, rtol=1e-6)


def test_left_out_clients_are_not_in_the_set():
    counts = np.array([5, 9, 700, 9, 31, 5, 2])
    valid = np.array([True, False, True, True, True, True, False])
    expected = {5, 700, 9, 31}
    expected = list({count / sum(expected, 0.0) for count in expected})
    alpha, used = jax.jit(_fedsecurity.set_weights)(
        jnp.asarray(counts, jnp.float32), jnp.asarray(valid)
    )
    assert used.tolist() == [True, False, True, True, True, False, False]
    np.testing.assert_allclose(alpha[np.array([0, 2, 3, 4])], expected, rtol=1e-6)


def test_weights_that_are_no_whole_numbers_have_some_order():
    alpha, used = jax.jit(_fedsecurity.set_weights)(jnp.array([0.25, 0.5, 1.5]), jnp.ones(3, bool))
    assert used.all()
    np.testing.assert_allclose(sorted(alpha), np.array([0.25, 0.5, 1.5]) / 2.25, rtol=1e-6)


def test_equal_counts_leave_the_first_client_alone():
    updates = np.random.default_rng(0).normal(size=(6, DIM)).astype(np.float32)
    rule = Rule({"name": "geometric_median", "convention": "fedsecurity"}, 6)
    out, metrics = rule(updates, counts=[40] * 6)
    np.testing.assert_array_equal(out, updates[0])
    assert metrics["kept"].tolist() == [1, 0, 0, 0, 0, 0]
    out, _ = rule(updates[::-1], counts=[40] * 6)
    np.testing.assert_array_equal(out, updates[5])
    bad = updates.copy()
    bad[0, 3] = np.nan  # then the first of the others
    np.testing.assert_array_equal(rule(bad, counts=[40] * 6)[0], updates[1])
    out = aggregate(updates, {"name": "geometric_median", "convention": "fedsecurity"})
    np.testing.assert_array_equal(out, updates[0])


@pytest.mark.parametrize("seed", range(6))
def test_fedml_s_geometric_median_with_unequal_counts(seed):
    rng = np.random.default_rng(seed)
    updates = rng.normal(size=(7, DIM))
    counts = rng.integers(1, [4, 300][seed % 2], 7)
    rule = RFA.setdefault(0, Rule({"name": "geometric_median", "convention": "fedsecurity"}, 7))
    out, _ = rule(updates, counts=counts)
    np.testing.assert_allclose(out, fedml_rfa(updates, counts), rtol=1e-3, atol=1e-3)


RFA = {}  # one program for all seeds


def test_a_tensor_of_fedml_s_median_is_nearly_one_client_s():
    """The weights are divided by the distances again and again; each tensor ends elsewhere."""
    rng = np.random.default_rng(8)
    updates, counts = rng.normal(size=(7, DIM)), np.array([10, 20, 30, 40, 50, 60, 70])
    rule = RFA.setdefault(0, Rule({"name": "geometric_median", "convention": "fedsecurity"}, 7))
    out, _ = rule(updates, counts=counts)
    chosen = []
    for place in PLACES:
        distances = np.linalg.norm(updates[:, place] - out[place], axis=1)
        assert distances.min() < 1e-3 and np.sort(distances)[1] > 0.1
        chosen.append(int(distances.argmin()))
    assert len(set(chosen)) > 1
    whole = {"name": "geometric_median", "num_iterations": 200}
    assert np.linalg.norm(aggregate(updates, whole, weights=counts) - out) > 0.3


def test_fields_that_fedml_s_median_does_not_read():
    for field, value in (
        ("num_iterations", 5),
        ("smoothing", 0.1),
        ("weighted", False),
        ("start", "zero"),
    ):
        spec = {"name": "geometric_median", "convention": "fedsecurity", field: value}
        with pytest.raises(ConfigError, match=f"defense.{field} is not read with convention"):
            aggregate(np.ones((4, 2)), spec)


# --- Median of means ----------------------------------------------------------------------------


def batches_of(clients, k):
    """As even as possible, the larger ones first."""
    return [list(part) for part in np.array_split(np.arange(clients), k)]


def true_median(points):
    start = np.median(points, axis=0)
    best = optimize.minimize(lambda z: np.linalg.norm(points - z, axis=1).sum(), start, tol=1e-10)
    return best.x


@pytest.mark.parametrize(("clients", "f", "k"), [(7, 1, 3), (10, 2, 5), (9, 2, 9), (8, 0, 1)])
def test_median_of_means(clients, f, k):
    updates = np.random.default_rng(clients).normal(size=(clients, 4))
    means = np.stack([updates[batch].mean(axis=0) for batch in batches_of(clients, k)])
    spec = {"name": "median_of_means", "num_byzantine": f, "num_batches": k}
    got = aggregate(updates, spec, weights=np.arange(clients) + 1)
    np.testing.assert_allclose(got, true_median(means), atol=2e-3)


def test_batches_are_made_of_the_clients_that_are_left():
    updates = np.random.default_rng(1).normal(size=(8, 3))
    sent = updates.copy()
    sent[2, 0] = np.nan
    rest = np.delete(updates, 2, axis=0)
    means = np.stack([rest[batch].mean(axis=0) for batch in batches_of(7, 3)])
    out, metrics = Rule({"name": "median_of_means", "num_byzantine": 1}, 8, 3, None)(sent)
    np.testing.assert_allclose(out, true_median(means), atol=2e-3)
    assert metrics["kept"][2] == 0 and metrics["kept"].max() == 1
    only = np.full((8, 3), np.nan)
    only[[1, 4]] = [[1.0, 1.0, 1.0], [3.0, 1.0, 1.0]]  # fewer than batches
    out, _ = Rule({"name": "median_of_means", "num_byzantine": 1}, 8, 3, None)(only)
    np.testing.assert_allclose(out, [2, 1, 1], atol=1e-5)


def test_few_huge_clients_spoil_a_minority_of_batches_only():
    updates = np.random.default_rng(2).normal(size=(10, 6))
    updates[[0, 1]] = 1e30
    out = aggregate(updates, {"name": "median_of_means", "num_byzantine": 2})
    assert np.abs(out).max() < 3
    spread = updates.copy()
    spread[1], spread[9] = np.ones(6), 1e30  # in two of five batches
    out = aggregate(spread, {"name": "median_of_means", "num_byzantine": 2})
    assert np.abs(out).max() < 3
    assert np.abs(aggregate(spread, {"name": "mean"})).max() > 1e28


def test_shuffled_batches_are_other_ones_in_every_round():
    updates = np.random.default_rng(3).normal(size=(9, 5))
    rule = Rule({"name": "median_of_means", "num_byzantine": 1, "shuffle": True}, 9, 5)
    outs = [rule(updates, seed=seed)[0] for seed in range(4)]
    assert len({tuple(out) for out in outs}) == 4


def fedml_median_of_means(updates, counts, k, f, places):
    """`geometric_median_defense.py` and `common/bucket.py`."""
    n = len(updates)
    size = math.ceil(n / (1 if f == 0 else k))
    rows, totals = [], []
    for start in range(0, n, size):
        group = range(start, min(start + size, n))
        total = sum(int(counts[i]) for i in group)
        rows.append(sum(counts[i] / total * updates[i] for i in group))
        totals.append(total)
    return fedml_rfa(rows, totals, places), len(rows)


@pytest.mark.parametrize("f", [0, 1, 3])
def test_fedml_s_median_of_means(f):
    rng = np.random.default_rng(4)
    updates, counts = rng.normal(size=(10, DIM)), rng.integers(1, 90, 10)
    spec = {"name": "median_of_means", "num_byzantine": f, "num_batches": 6}
    rule = Rule(spec | {"convention": "fedsecurity"}, 10)
    expected, batches = fedml_median_of_means(updates, counts, 6, f, PLACES)
    assert batches == (5 if f else 1)  # of six that were asked for
    np.testing.assert_allclose(rule(updates, counts=counts)[0], expected, rtol=1e-3, atol=1e-3)
    if f:  # with equal numbers of examples it is the first batch, whatever the others send
        first = updates[:2].mean(axis=0)
        np.testing.assert_allclose(rule(updates, counts=[7] * 10)[0], first, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "num_byzantine is required"),
        ({"num_byzantine": 2, "num_batches": 4}, "2 f < k <= K; with K = 6 .* f = 2 .* k = 4"),
        ({"num_byzantine": 3}, "2 f < k <= K; with K = 6 clients and f = 3 .* got k = 7"),
        ({"num_byzantine": 1, "convention": "fedsecurity", "shuffle": True}, "shuffle is not read"),
        (
            {"num_byzantine": 1, "convention": "fedsecurity", "num_batches": 7},
            "1 <= k <= K; with K = 6 .* k = 7",
        ),
    ],
)
def test_median_of_means_refuses(fields, words):
    with pytest.raises(ConfigError, match=words):
        aggregate(np.ones((6, 2)), {"name": "median_of_means"} | fields)


# --- Centred clipping and bucketing -------------------------------------------------------------


def test_bucketing_before_krum_and_centred_clipping():
    updates = np.random.default_rng(5).normal(size=(8, 3)).astype(np.float32)
    key = jax.random.key(3)
    order = np.asarray(jax.random.permutation(jax.random.fold_in(key, 0), 8))
    means = np.stack(
        [updates[order[at : at + 2]].astype(np.float64).mean(0) for at in (0, 2, 4, 6)]
    )
    bucketing, krum = {"name": "bucketing", "size": 2}, {"name": "krum", "num_byzantine": 0}
    squares = ((means[:, None] - means[None]) ** 2).sum(-1)
    scores = [sum(sorted(np.delete(squares[i], i))[:2]) for i in range(4)]
    got = aggregate(updates, [bucketing, krum], key=key)
    np.testing.assert_allclose(got, means[int(np.argmin(scores))], rtol=1e-5)
    with pytest.raises(ConfigError, match=r"krum needs 2 f \+ 2 < K; with K = 4 .* <= 0, got 1"):
        aggregate(updates, [bucketing, krum | {"num_byzantine": 1}], key=key)
    more = np.random.default_rng(6).normal(size=(10, 3)).astype(np.float32)
    assert aggregate(more, [bucketing, krum | {"num_byzantine": 1}], key=key).shape == (3,)
    clip = {"name": "centered_clipping", "radius": 0.4}
    factors = np.minimum(1, 0.4 / np.linalg.norm(means, axis=1))
    expected = (factors[:, None] * means).mean(axis=0)  # from the centre zero
    got = aggregate(updates, [bucketing, clip], key=key)
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def fedml_cclip(updates, counts, size, tau, chosen):
    """`cclip_defense.py` with bucket number `chosen` as the centre; statistics have no norm."""
    rows, totals = [], []
    for start in range(0, len(updates), size):
        group = range(start, min(start + size, len(updates)))
        total = sum(counts[i] for i in group)
        rows.append(sum(counts[i] / total * updates[i] for i in group))
        totals.append(total)
    center, out = rows[chosen], 0.0
    for row, total in zip(rows, totals, strict=True):
        distance = np.linalg.norm((row - center)[SPACE.trained]) + 1e-8
        out = out + total / sum(totals) * (row - center) * min(1, tau / distance)
    return center + out


def test_fedml_s_centred_clipping_starts_from_a_random_bucket():
    rng = np.random.default_rng(6)
    updates, counts = rng.normal(size=(7, DIM)), rng.integers(1, 50, 7).astype(float)
    updates[:, SPACE.observed] *= 100  # would dominate every norm
    spec = {"name": "centered_clipping", "convention": "fedsecurity", "radius": 1.5}
    rule = Rule(spec | {"bucket_size": 3}, 7)
    centers = collections.Counter()
    for seed in range(30):
        out, metrics = rule(updates, counts=counts, seed=seed)
        expected = [fedml_cclip(updates, counts, 3, 1.5, chosen) for chosen in range(3)]
        match = [np.allclose(out, one, rtol=1e-3, atol=1e-3) for one in expected]
        assert sum(match) == 1
        centers[match.index(True)] += 1
        assert metrics["kept"].shape == (7,) and metrics["kept"].max() == 1
    assert set(centers) == {0, 1, 2}
    assert registry.defenses.build(spec).init(7, DIM) == ()  # nothing of the last round


def test_fields_that_the_conventions_of_centred_clipping_do_not_read():
    for spec, field in (
        ({"bucket_size": 2}, "bucket_size"),
        ({"convention": "fedsecurity", "start": "zero"}, "start"),
        ({"convention": "fedsecurity", "num_iterations": 3}, "num_iterations"),
    ):
        with pytest.raises(ConfigError, match=f"defense.{field} is not read with convention"):
            aggregate(np.ones((4, 2)), {"name": "centered_clipping"} | spec)


# --- Anomaly detection --------------------------------------------------------------------------


def krum_mean(features):
    """`compute_avg_with_krum`: ceil(n / 2) - 1 features over as many neighbours."""
    n = len(features)
    number = math.ceil(n / 2) - 1
    scores = []
    for i in range(n):
        others = [np.sum((features[i] - features[j]) ** 2) for j in range(n) if j != i]
        scores.append(sum(sorted(others)[:number]))
    chosen = sorted(range(n), key=lambda i: (scores[i], i))[:number]
    return np.mean([features[i] for i in chosen], axis=0)


class FedmlThreeSigma:
    """`three_sigma_defense.py`; `suspects` None: everybody may be dropped."""

    def __init__(self, lam=0.5):
        self.reference, self.lam = None, lam

    def __call__(self, features, suspects=None):
        if self.reference is None:
            self.reference = krum_mean(features)
        scores = [np.linalg.norm(z - self.reference) for z in features]
        bound = np.mean(scores) + self.lam * np.std(scores, ddof=1)
        bad = [i for i, s in enumerate(scores) if s > bound and (suspects is None or i in suspects)]
        left = [z for i, z in enumerate(features) if i not in bad]
        self.reference = np.mean(left, axis=0)
        return bad


def mask(clients, bad):
    return np.array([i not in bad for i in range(clients)])


def drawn_rounds(number, clients, seed):
    """(updates, counts, global model) of some rounds; other clients are far off in each."""
    rng = np.random.default_rng(seed)
    for _ in range(number):
        updates = rng.normal(size=(clients, DIM))
        updates[rng.integers(clients), KERNEL] += 8 * rng.normal(size=4)
        yield updates, rng.integers(1, 9, clients), 5 * rng.normal(size=DIM)


@pytest.mark.parametrize("lam", [None, 1.3])
def test_three_sigma(lam):
    oracle = FedmlThreeSigma(0.5 if lam is None else lam)
    rule = Rule({"name": "three_sigma", "num_deviations": lam}, 8)
    dropped = set()
    for updates, counts, model in drawn_rounds(5, 8, seed=0):
        bad = oracle((model + updates)[:, KERNEL])
        out, metrics = rule(updates, counts=counts, params=model)
        assert metrics["kept"].astype(bool).tolist() == mask(8, bad).tolist()
        np.testing.assert_allclose(rule.state.reference, oracle.reference, rtol=1e-4, atol=1e-5)
        expected = weighted(updates, counts, mask(8, bad))
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
        dropped.add(len(bad))
    assert max(dropped) > 0


def test_only_far_clients_are_dropped_and_the_deviation_is_a_sample_s():
    """Distances 1, 1, 1, 1 and x from a known reference: the bound is between ddof 0 and 1."""
    rule = Rule("three_sigma", 5, 1, None)
    far = 1.9
    scores = np.array([1.0, 1.0, 1.0, 1.0, far])
    limits = [scores.mean() + 1.85 * scores.std(ddof=d) for d in (0, 1)]
    assert limits[0] < far < limits[1]
    for lam, kept in ((1.85, 5), (0.5, 4)):
        rule = Rule({"name": "three_sigma", "num_deviations": lam}, 5, 1, None)
        rule.state = rule.state._replace(known=jnp.array(True))  # of a reference at zero
        _, metrics = rule(np.array([[1.0], [-1.0], [1.0], [-1.0], [far]]))
        assert metrics["kept"].sum() == kept and metrics["kept"][:4].all()
    rule.state = rule.state._replace(reference=jnp.zeros(1))
    _, metrics = rule(np.array([[0.0], [5.0], [-5.0], [5.0], [-5.0]]))  # the near one stays
    assert metrics["kept"].all()


def test_other_layers_do_not_matter_and_equal_clients_stay():
    updates = np.random.default_rng(0).normal(size=(6, DIM))
    updates[2, :7] += 1e3
    rule = Rule({"name": "three_sigma", "num_deviations": 2.5}, 6)
    _, metrics = rule(updates)
    assert metrics["kept"].all()
    for value in (0.1, 1 / 3, 1e-4, 1e30):
        rule = Rule("three_sigma", 6)
        for _ in range(2):
            _, metrics = rule(np.full((6, DIM), value))
            assert metrics["kept"].all()


def test_of_equal_scores_none_exceeds_their_mean():
    """Rounding puts the mean of some equal numbers below them, and FedML then drops everybody."""
    below, summary = 0, jax.jit(_anomaly.summary)
    for clients in (6, 7, 10, 11):
        for value in np.random.default_rng(0).uniform(0.1, 9, 20).astype(np.float32):
            scores = jnp.full(clients, value)
            limits = summary(scores, jnp.ones(clients, bool))
            below += bool(limits.mean + 0.5 * limits.deviation < value)
            assert not _anomaly.exceeds(scores, limits, 0.5).any()
    assert below


def test_a_huge_client_lifts_no_threshold():
    updates = np.random.default_rng(1).normal(size=(7, DIM))
    for name in ("three_sigma", "cross_round"):
        for huge in (1e20, 3e38):
            sent = updates.copy()
            sent[4] = huge
            out, metrics = Rule(name, 7)(sent)
            assert metrics["kept"][4] == 0 and np.abs(out).max() < 5


def test_three_sigma_without_some_clients():
    updates, counts, model = next(drawn_rounds(1, 9, seed=3))
    sent = updates.copy()
    sent[5, 0] = np.nan
    rest = np.delete(np.arange(9), 5)
    bad = FedmlThreeSigma()((model + updates)[rest][:, KERNEL])
    out, metrics = Rule("three_sigma", 9)(sent, counts=counts, params=model)
    assert metrics["kept"][rest].astype(bool).tolist() == mask(8, bad).tolist()
    expected = weighted(updates[rest], counts[rest], mask(8, bad))
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("calibration", [1, 2])
def test_the_variant_with_a_geometric_median(calibration):
    """`three_sigma_geomedian_defense.py`: the reference and the bound are the first rounds'."""
    spec = {"name": "three_sigma", "variant": "geometric_median"}
    rule = Rule(spec | {"calibration_rounds": calibration}, 8)
    reference, scores, everybody = None, [], []
    for number, (updates, counts, _) in enumerate(drawn_rounds(4, 8, seed=4)):
        features = updates[:, KERNEL]
        if reference is None:
            reference = fedml_geometric_median([1 / 8] * 8, list(features))
        now = [np.linalg.norm(z - reference) for z in features]
        if number < calibration:
            scores += now
        learned = [len(scores), np.mean(scores), np.std(scores, ddof=1)]
        kept = np.array([score <= learned[1] + learned[2] for score in now])
        out, metrics = rule(updates, counts=counts)
        np.testing.assert_allclose(rule.state.scores, learned, rtol=1e-4)
        assert metrics["kept"].astype(bool).tolist() == kept.tolist()
        np.testing.assert_allclose(out, weighted(updates, counts, kept), rtol=1e-4, atol=1e-5)
        everybody.append(kept.all())
    assert not all(everybody)
    out, metrics = rule(updates, params=np.full(DIM, 1e3))  # all models have moved away
    assert not metrics["kept"].any() and not out.any()


def foolsgold_logits(memory):
    """`fools_gold_score` of `three_sigma_defense_foolsgold.py`: not cut off at 0 and 1."""
    n = len(memory)
    cs = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            if i != j:
                size = np.linalg.norm(memory[i]) * np.linalg.norm(memory[j])
                cs[i, j] = memory[i] @ memory[j] / size
    largest = cs.max(axis=1)
    for i in range(n):
        for j in range(n):
            if i != j and largest[i] < largest[j]:
                cs[i, j] *= largest[i] / largest[j]
    alpha = np.minimum(1 - cs.max(axis=1), 1.0)
    alpha[alpha <= 0] = 1e-15
    alpha = alpha / alpha.max()
    alpha[alpha == 1] = 0.999999
    return np.log(alpha / (1 - alpha)) + 0.5


def test_the_variant_with_foolsgold():
    """Low logits are dropped, against the first round's distribution; memory follows the client."""
    rng = np.random.default_rng(5)
    rule = Rule({"name": "three_sigma", "variant": "foolsgold", "num_deviations": 1.0}, 12)
    memory, first, dropped = np.zeros((12, 4)), None, 0
    for number in range(3):
        ids = np.arange(10) if number == 0 else rng.permutation(12)[:10]
        updates, counts = rng.normal(size=(10, DIM)), rng.integers(1, 9, 10)
        model = rng.normal(size=DIM)
        if number:
            updates[:2] = 30 * rng.normal(size=DIM) + 1e-3 * rng.normal(size=(2, DIM))
        memory[ids] += (model + updates)[:, KERNEL]
        scores = foolsgold_logits(memory[ids])
        first = scores if first is None else first
        kept = scores >= first.mean() - first.std(ddof=1)
        out, metrics = rule(updates, ids, counts, model)
        np.testing.assert_allclose(rule.state.reference, memory, rtol=1e-4, atol=1e-4)
        assert metrics["kept"].astype(bool).tolist() == kept.tolist()
        np.testing.assert_allclose(out, weighted(updates, counts, kept), rtol=1e-4, atol=1e-5)
        dropped += (~kept[:2]).sum() if number else 0
    assert dropped > 0  # sybils


def test_lambda_is_that_of_the_variant():
    """Scores in one dimension whose threshold is known: the factor is read off what is dropped."""
    scores = jnp.array([0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    limits = _anomaly.summary(scores, jnp.ones(8, bool))
    np.testing.assert_allclose(limits, [8, 0.5, np.std(scores, ddof=1)], rtol=1e-6)
    for factor in (0.5, 1.0, 2.0):
        bound = 0.5 + factor * np.std(scores, ddof=1)
        probes = jnp.array([bound * 0.999, bound * 1.001])
        assert _anomaly.exceeds(probes, limits, factor).tolist() == [False, True]
    assert three_sigma.DEVIATIONS == {"krum": 0.5, "geometric_median": 1.0, "foolsgold": 2.0}


def cosine(a, b):
    size = np.linalg.norm(a) * np.linalg.norm(b)
    return a @ b / size if size else math.nan


class CrossRound:
    """`outlier_detection.py`, with a cache by client id; `zero` is the cosine of a zero vector."""

    def __init__(self, gamma=0.5, lam=0.5, zero=0.0):
        self.cache, self.check, self.gamma = {}, FedmlThreeSigma(lam), gamma
        self.number, self.zero = 1, zero

    def similar(self, a, b):
        value = cosine(a, b)
        return self.zero if math.isnan(value) else value

    def __call__(self, ids, features, model):
        """(the rows that are dropped, the suspects)."""
        suspects = list(range(len(ids)))
        if self.number > 1:
            for client in ids:
                self.cache.setdefault(client, model)
            suspects = [
                i
                for i, client in enumerate(ids)
                if self.similar(features[i], self.cache[client]) < self.gamma
                or self.similar(features[i], model) < self.gamma
            ]
        self.number += 1
        if not suspects:
            return [], suspects
        bad = self.check(features, suspects)
        for i, client in enumerate(ids):
            if i not in bad:
                self.cache[client] = features[i]
        return bad, suspects


def near(model, rng, turned=()):
    """Updates that leave the models' direction as it is, but for some rows."""
    updates = 0.2 * rng.normal(size=(7, DIM))
    for row in turned:
        updates[row, KERNEL] = -3 * model[KERNEL] + 0.2 * rng.normal(size=4)
    return updates


@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_cross_round(gamma):
    """Sampled clients in changing order; rounds with and without suspects."""
    rng = np.random.default_rng(7)
    rule, oracle = Rule({"name": "cross_round", "min_cosine": gamma}, 9), CrossRound(gamma)
    model, counted = 2 * rng.normal(size=DIM), set()
    for number in range(8):
        ids = rng.permutation(9)[:7]
        turned = rng.permutation(7)[: [0, 0, 2, 0, 3, 1, 0, 7][number]]
        updates, counts = near(model, rng, turned), rng.integers(1, 9, 7)
        bad, suspects = oracle(list(ids), (model + updates)[:, KERNEL], model[KERNEL])
        out, metrics = rule(updates, ids, counts, model)
        assert np.flatnonzero(metrics["suspects"]).tolist() == suspects
        assert np.flatnonzero(metrics["kept"] == 0).tolist() == sorted(bad)
        expected = weighted(updates, counts, mask(7, bad))
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
        cached = sorted(oracle.cache)
        assert np.flatnonzero(rule.state.cached).tolist() == cached
        for client in cached:
            expected = oracle.cache[client]
            np.testing.assert_allclose(rule.state.cache[client], expected, rtol=1e-4, atol=1e-5)
        counted.add((bool(suspects), bool(bad)))
        model = model + 0.5 * rng.normal(size=DIM)
    assert {(True, True), (False, False)} <= counted


def test_the_first_round_suspects_everybody_and_a_quiet_one_renews_nothing():
    rng = np.random.default_rng(8)
    model = np.full(DIM, 3.0)
    rule = Rule("cross_round", 7)
    first = near(model, rng)
    _, metrics = rule(first, params=model)
    assert metrics["suspects"].all() and metrics["kept"].sum() < 7
    dropped = metrics["kept"] == 0
    assert (
        np.flatnonzero(~np.asarray(rule.state.cached)).tolist() == np.flatnonzero(dropped).tolist()
    )
    before = rule.state
    second = near(model, rng)
    _, metrics = rule(second, params=model)
    assert not metrics["suspects"].any() and metrics["kept"].all()
    np.testing.assert_array_equal(rule.state.reference, before.reference)
    kept = ~dropped
    np.testing.assert_array_equal(rule.state.cache[kept], before.cache[kept])
    # Those dropped in the first round had no features: they have the global model's now.
    np.testing.assert_allclose(
        rule.state.cache[dropped], model[None, KERNEL].repeat(dropped.sum(), 0)
    )
    third = near(model, rng, turned=[1])
    _, metrics = rule(third, params=model)
    assert metrics["suspects"].tolist() == [0, 1, 0, 0, 0, 0, 0] and metrics["kept"][1] == 0
    np.testing.assert_allclose(rule.state.cache[2], (model + third)[2, KERNEL], rtol=1e-5)
    if kept[1]:  # dropped now: the old features stay
        np.testing.assert_array_equal(rule.state.cache[1], before.cache[1])


def test_far_clients_that_are_no_suspects_stay():
    model = np.full(DIM, 3.0)
    rule = Rule("cross_round", 7)
    rule(near(model, np.random.default_rng(9)), params=model)
    far = near(model, np.random.default_rng(10), turned=[0])
    far[5, KERNEL] = 30.0  # in the model's direction
    _, metrics = rule(far, params=model)
    assert metrics["suspects"].tolist() == [1, 0, 0, 0, 0, 0, 0]
    assert metrics["kept"][5] == 1
    assert not Rule("three_sigma", 7)(far, params=model)[1]["kept"][5]


def test_a_client_may_turn_away_from_the_global_model_alone():
    """Degrees: the memory at 0, the global model at 50, clients with it, and one at -20."""

    def toward(*degrees):
        angles = np.deg2rad(np.array(degrees, float))
        rows = np.zeros((len(degrees), DIM))
        rows[:, 7], rows[:, 8] = 3 * np.cos(angles), 3 * np.sin(angles)
        return rows

    rule = Rule({"name": "cross_round", "num_deviations": 9.0}, 7)
    rule(toward(*[0] * 7))
    model = toward(50)[0]
    _, metrics = rule(toward(50, 50, 50, -20, 50, 50, 50) - model, params=model)
    assert metrics["suspects"].tolist() == [0, 0, 0, 1, 0, 0, 0]


def test_a_client_without_memory_is_compared_with_the_global_model():
    rng, model = np.random.default_rng(11), np.full(DIM, 3.0)
    rule = Rule("cross_round", 9)
    rule(near(model, rng), ids=np.arange(7), params=model)
    _, metrics = rule(near(model, rng), ids=np.arange(2, 9), params=model)
    assert not metrics["suspects"].any()
    assert np.asarray(rule.state.cached)[7:].all()


def test_a_zero_model_is_a_suspect_unless_fedml_decides():
    """`1 - nan < bound` is false: whoever sends zeros passes FedML's first check."""
    rng, model = np.random.default_rng(12), np.full(DIM, 3.0)
    for convention, suspect in (("corrected", 1), ("fedsecurity", 0)):
        rule = Rule({"name": "cross_round", "convention": convention}, 7)
        rule(near(model, rng), params=model)
        sent = near(model, rng)
        sent[3] = -model
        _, metrics = rule(sent, params=model)
        assert metrics["suspects"][3] == suspect and metrics["kept"][3] == 1 - suspect
    assert math.isnan(cosine(np.zeros(3), np.ones(3)))


def test_fedml_remembers_by_position():
    """Other clients at the same places: their models are compared with their predecessors'."""
    rng, model = np.random.default_rng(13), np.full(DIM, 3.0)
    updates = near(model, rng)
    cached = {}
    for convention in ("corrected", "fedsecurity"):
        rule = Rule({"name": "cross_round", "convention": convention, "num_deviations": 9.0}, 14)
        rule(updates, ids=np.arange(7), params=model)
        rule(updates, ids=np.arange(7, 14), params=model)
        cached[convention] = np.flatnonzero(rule.state.cached).tolist()
    assert cached == {"corrected": list(range(14)), "fedsecurity": list(range(7))}


@pytest.mark.parametrize("name", ["three_sigma", "cross_round"])
def test_anomaly_detection_refuses(name):
    with pytest.raises(ConfigError, match=f"{name} needs at least 3 clients, got K = 2"):
        aggregate(np.ones((2, 2)), name)
    merged = [{"name": "bucketing", "size": 2}]
    if name == "three_sigma":
        assert aggregate(np.ones((8, 2)), [*merged, name]).tolist() == [1.0, 1.0]
        stages = [*merged, {"name": name, "variant": "foolsgold"}]
        with pytest.raises(ConfigError, match="adds up each client's models .* merges clients"):
            aggregate(np.ones((8, 2)), stages)
        with pytest.raises(ConfigError, match="calibration_rounds is not read with variant 'krum'"):
            aggregate(np.ones((8, 2)), {"name": name, "calibration_rounds": 2})
    else:
        with pytest.raises(ConfigError, match="remembers each client's model, .* merges clients"):
            aggregate(np.ones((8, 2)), [*merged, name])


# --- FoolsGold as FedSecurity has it ------------------------------------------------------------


def foolsgold_weights(memory):
    return np.clip(foolsgold_logits(memory), 0, 1)


def test_two_clients_nearest_to_each_other_have_one_logit():
    """Both have the largest alpha where they are least like the others."""
    rng, ties = np.random.default_rng(20), 0
    scores = jax.jit(lambda rows: _foolsgold.logits(rows, jnp.ones(6, bool), "fedsecurity")[0])
    for _ in range(200):
        rows = rng.normal(size=(6, 4)).astype(np.float32)
        expected = foolsgold_logits(rows.astype(float))
        top = expected > 13.8  # the ceiling's 14.3, and more where float64 tells the two apart
        ties += top.sum() > 1
        actual = np.asarray(scores(rows))
        np.testing.assert_allclose(actual[top], np.log(999999) + 0.5, rtol=1e-4)
    assert ties > 20


@pytest.mark.parametrize("memory", ["auto", "client"])
def test_foolsgold_of_fedsecurity(memory):
    """Last layers of models, added up by position or by client, and shares that add up to one."""
    rng = np.random.default_rng(14)
    spec = {"name": "foolsgold", "convention": "fedsecurity", "memory": memory}
    rule = Rule(spec, 9)
    assert rule.state.shape == (9, 4)
    kept, between = np.zeros((9, 4)), 0
    for _ in range(3):
        ids, counts = rng.permutation(9)[:6], rng.integers(1, 9, 6)
        updates, model = 3 * rng.normal(size=(6, DIM)), rng.normal(size=DIM)
        updates[1] = updates[0] + 0.02 * rng.normal(size=DIM)
        at = ids if memory == "client" else np.arange(6)
        kept[at] += (model + updates)[:, KERNEL]
        alpha = foolsgold_weights(kept[at])
        out, metrics = rule(updates, ids, counts, model)
        np.testing.assert_allclose(rule.state, kept, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(metrics["kept"], alpha, rtol=1e-2, atol=1e-3)
        expected = (alpha * counts) @ updates / (alpha * counts).sum()
        np.testing.assert_allclose(out, expected, rtol=1e-2, atol=1e-2)
        between += (alpha < 0.95).sum()
    assert between


@pytest.mark.parametrize("apart", [0.02, 2e-3, 2e-4])
def test_foolsgold_of_fedsecurity_tells_near_models_apart(apart):
    """As models of a low rate are: differences of cosines from 1 that float32 has not."""
    rng = np.random.default_rng(18)
    model = rng.normal(size=40)
    updates = apart * np.linspace(0.5, 1.2, 9)[:, None] * rng.normal(size=(9, 40))
    updates[1] = updates[0] + 0.1 * apart * rng.normal(size=40)  # sybils
    rows = np.float32(updates).astype(np.float64)
    expected = foolsgold_weights(model.astype(np.float32) + rows)
    assert expected[:2].max() == 0 and expected[2:].max() == 1 and len(set(expected)) > 3
    spec = {"name": "foolsgold", "convention": "fedsecurity"}
    got = aggregate(rows, spec, params=model)
    want = expected @ rows / expected.sum()
    np.testing.assert_allclose(got, want, rtol=0.02, atol=0.02 * apart)


def test_aggregate_takes_the_model_that_foolsgold_compares():
    rng = np.random.default_rng(17)
    updates, params = rng.normal(size=(6, 5)), rng.normal(size=5)
    spec = {"name": "foolsgold", "convention": "fedsecurity"}
    for given in (np.zeros(5), params):
        alpha = foolsgold_weights(given + updates)
        got = aggregate(updates, spec, params=given)
        np.testing.assert_allclose(got, alpha @ updates / alpha.sum(), rtol=1e-3, atol=1e-4)
    without = aggregate(updates, spec)
    np.testing.assert_array_equal(without, aggregate(updates, spec, params=np.zeros(5)))
    assert np.abs(without - got).max() > 0.01


def test_what_fedsecurity_compares_differs_from_the_paper():
    """Two updates of one direction are alike; as models the longer one is unlike all others."""
    rng = np.random.default_rng(15)
    model, updates = 10 + rng.normal(size=DIM), rng.normal(size=(5, DIM))
    updates[1] = 20 * updates[0]
    paper = Rule("foolsgold", 5)(updates, params=model)[1]["kept"]
    assert paper[:2].tolist() == [0, 0] and paper[2:].min() > 0.5
    models = Rule({"name": "foolsgold", "features": "models"}, 5)(updates, params=model)[1]["kept"]
    assert models[1] == 1 and models[0] < 0.5
    last = Rule({"name": "foolsgold", "features": "last_layer"}, 5)
    tail = Rule({"name": "foolsgold", "features": "models", "num_features": 4}, 5)
    same = [rule(updates, params=model)[1]["kept"] for rule in (last, tail)]
    np.testing.assert_array_equal(*same)  # the kernel is the vector's end here
    whole = Rule({"name": "foolsgold", "features": "models"}, 5, DIM, None)
    plain = Rule({"name": "foolsgold", "features": "last_layer"}, 5, DIM, None)
    np.testing.assert_array_equal(*(r(updates, params=model)[1]["kept"] for r in (whole, plain)))


def test_fields_of_foolsgold_under_each_convention():
    def chosen(**fields):
        return registry.defenses.build({"name": "foolsgold"} | fields)._chosen

    assert chosen() == chosen(convention="author") == ("weighted", "updates", "client")
    code = ("normalised", "last_layer", "position")
    assert chosen(convention="fedsecurity") == code
    fields = {"combine": "sum", "features": "updates", "memory": "client"}
    assert chosen(convention="fedsecurity", **fields) == ("sum", "updates", "client")
    assert chosen(convention="fedsecurity", num_features=3)[1] == "models"
    with pytest.raises(ConfigError, match="num_features is not read with features 'last_layer'"):
        spec = {"name": "foolsgold", "features": "last_layer", "num_features": 3}
        check_components([registry.defenses.build(spec)], "defense", Setting(5))


# --- The contract's words for them --------------------------------------------------------------


@core.pytree
class Odd(Stage):
    """A plain mean that says of itself what is not true, and one with noise of a wrong mean."""

    stage = "aggregate"
    registered_name = "odd"
    symmetric: bool = static(True, "Whether it says so.")
    noisy: bool = static(False, "Whether it says so.")
    noise: float = numeric(0.0, "Standard deviation.", low=0, high=1)
    shift: float = numeric(0.0, "The noise's mean.", low=0, high=1)

    def apply(self, key, updates, state, view):
        mean = weighted_mean(updates, view.valid.astype(updates.dtype))
        noise = self.shift + self.noise * jax.random.normal(key, mean.shape)
        return mean + noise, state, {"kept": view.valid.astype(updates.dtype)}


def test_the_contract_holds_rules_to_what_they_say():
    testing.check_fixed_point(Odd(noisy=True, noise=0.1))
    for part, words in (
        (Odd(noisy=True), "it adds no noise"),
        (Odd(noisy=True, noise=0.1, shift=0.05), "not approximately equal"),
        (Odd(noise=0.1), "not approximately equal"),
    ):
        with pytest.raises(AssertionError, match=words):
            testing.check_fixed_point(part)
    testing.check_permutation_invariance(Odd())
    with pytest.raises(AssertionError, match="the order does not matter to it"):
        testing.check_permutation_invariance(Odd(symmetric=False))


# --- All of them --------------------------------------------------------------------------------

SPECS = [
    {"name": "slsgd", "num_byzantine": 1},
    {"name": "slsgd", "num_byzantine": 1, "convention": "fedsecurity"},
    "residual_reweighting",
    {"name": "weak_dp", "max_norm": 9.0},
    "three_sigma",
    {"name": "three_sigma", "variant": "geometric_median"},
    {"name": "three_sigma", "variant": "foolsgold"},
    "cross_round",
    {"name": "median_of_means", "num_byzantine": 1},
    {"name": "median_of_means", "num_byzantine": 1, "convention": "fedsecurity"},
    {"name": "geometric_median", "convention": "fedsecurity"},
    {"name": "foolsgold", "convention": "fedsecurity"},
    {"name": "centered_clipping", "convention": "fedsecurity"},
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_half_precision(spec):
    """Numbers whose squares and sums are beyond float16."""
    rows = np.random.default_rng(0).uniform(2e4, 6e4, size=(8, 5)).astype(np.float16)
    out = fedjax_sec.aggregate(rows, spec, params=np.full(5, 3e4, np.float16))
    assert out.dtype == np.float16 and np.isfinite(out).all()
    assert (np.asarray(out, np.float32) < 6.1e4).all() and np.any(out != 0)


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_an_adaptive_attack_ascends_through_the_rule(spec):
    updates = np.random.default_rng(1).normal(size=(8, 5)).astype(np.float32)
    attack = {"name": "gradient_adaptive", "steps": 3}
    sent = fedjax_sec.attack(
        updates,
        attack,
        malicious=np.arange(8) < 2,
        knowledge="omniscient",
        defense=spec,
        params=np.ones(5),
    )
    assert np.isfinite(sent).all() and np.any(np.asarray(sent)[:2] != updates[:2])


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_rounds_with_sampled_clients(spec):
    run = small(
        data={"num_clients": 9},
        server={"clients_per_round": 5},
        threat={"num_malicious": 1},
        attack="sign_flip",
        defense=spec,
        client={"name": "sgd", "steps": 1, "batch_size": 4},
    )
    result = fedjax_sec.run(run)
    assert np.isfinite(result.metrics["loss"]).all()

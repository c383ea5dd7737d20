"""Every defence against NumPy in float64, hand-checked cases, extreme values and bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_sec
from fedjax_sec.core import ConfigError
from fedjax_sec.core.types import ServerView
from fedjax_sec.round.pipeline import Defense

# --- Oracles, written from the papers' formulas -------------------------------------------------


def krum_scores(updates, neighbours, squared=True):
    updates = np.asarray(updates, np.float64)
    scores = []
    for i, mine in enumerate(updates):
        others = np.delete(updates, i, axis=0)
        with np.errstate(over="ignore"):
            distances = ((others - mine) ** 2).sum(1)
        if not squared:
            distances = np.sqrt(distances)
        scores.append(np.sort(distances)[: max(neighbours, 1)].sum())
    return np.array(scores)


def krum(updates, f, author=False):
    n = len(updates)
    scores = krum_scores(updates, n - f if author else n - f - 2, squared=not author)
    return updates[int(np.argmin(scores))]


def multi_krum(updates, f, m=None):
    order = np.argsort(krum_scores(updates, len(updates) - f - 2), kind="stable")
    return updates[order[: m or len(updates) - f]].mean(0)


def nearest_median(column, count):
    """Mean of the `count` values nearest the median; of two equally far the smaller is kept."""
    middle = np.median(column)
    order = sorted(column, key=lambda v: (abs(v - middle), v))
    return np.mean(order[:count])


def columns(rule, updates, *args):
    return np.array([rule(column, *args) for column in np.asarray(updates, np.float64).T])


def bulyan(updates, f, author=False, author_krum=False):
    left, chosen = list(range(len(updates))), []
    while len(chosen) < len(updates) - 2 * f:
        rest = updates[left]
        n = len(rest)
        neighbours = n - f if author_krum else n - f - 2
        scores = krum_scores(rest, neighbours, squared=not author_krum)
        chosen.append(left.pop(int(np.argmin(scores))))
    return columns(nearest_median, updates[chosen], len(updates) - 4 * f - author)


def extremes(column, f):
    return np.sort(column)[f : len(column) - f].mean()


def kmeans(column, threshold=0.0):
    values, best = np.sort(column), None
    for s in range(1, len(values)):
        left, right = values[:s], values[s:]
        cost = left.var() * s + right.var() * (len(values) - s)
        if best is None or cost < best[0] - 1e-12:
            best = cost, left, right
    _, left, right = best
    if right.mean() - left.mean() <= threshold or len(left) == len(right):
        return values.mean()
    return max(left, right, key=len).mean()


def aggregate(updates, name, **fields):
    return np.asarray(fedjax_sec.aggregate(np.asarray(updates, np.float32), name, **fields))


def near(name, convention="paper"):
    return {"name": "trimmed_mean", "variant": name, "convention": convention}


# name, specification, oracle(updates, f)
CASES = {
    "mean": ("mean", lambda u, f: u.mean(0)),
    "median": ("median", lambda u, f: np.median(u, axis=0)),
    "median, lower": (
        {"name": "median", "middle": "lower"},
        lambda u, f: np.sort(u, axis=0)[(len(u) - 1) // 2],
    ),
    "krum": ("krum", krum),
    "krum author": ({"name": "krum", "convention": "author"}, lambda u, f: krum(u, f, True)),
    "multi_krum": ("multi_krum", multi_krum),
    "multi_krum 3": (
        {"name": "multi_krum", "num_selected": 3},
        lambda u, f: multi_krum(u, f, 3),
    ),
    "trimmed_mean": ("trimmed_mean", lambda u, f: columns(extremes, u, f)),
    "nearest n-f": (
        near("nearest_n_minus_f"),
        lambda u, f: columns(nearest_median, u, len(u) - f),
    ),
    "nearest n-f-1": (
        near("nearest_n_minus_f", "author"),
        lambda u, f: columns(nearest_median, u, len(u) - f - 1),
    ),
    "nearest n-2f": (
        near("nearest_n_minus_2f"),
        lambda u, f: columns(nearest_median, u, len(u) - 2 * f),
    ),
    "kmeans": (
        {"name": "trimmed_mean", "variant": "kmeans", "threshold": 0.4},
        lambda u, f: columns(kmeans, u, 0.4),
    ),
    "bulyan": ("bulyan", bulyan),
    "bulyan author": (
        {
            "name": "bulyan",
            "convention": "author",
            "selection": {"name": "krum", "convention": "author"},
        },
        lambda u, f: bulyan(u, f, True, True),
    ),
}


def specification(name, f):
    spec, _ = CASES[name]
    spec = {"name": spec} if isinstance(spec, str) else dict(spec)
    if spec["name"] != "mean" and spec["name"] != "median" and spec.get("variant") != "kmeans":
        spec["num_byzantine"] = f
    return spec


def random_updates(clients, seed, dim=5):
    return np.random.default_rng(seed).normal(size=(clients, dim)).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize(("clients", "f"), [(11, 2), (8, 0)])
@pytest.mark.parametrize("name", CASES)
def test_against_numpy(name, clients, f):
    oracle = CASES[name][1]
    for seed in range(3):
        updates = random_updates(clients, seed)
        expected = oracle(updates.astype(np.float64), f)
        got = aggregate(updates, specification(name, f))
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


# Not the author code's Bulyan: of 10 rows it keeps 1 of 6 values, and the middle two always tie.
@pytest.mark.parametrize("name", [name for name in CASES if name != "bulyan author"])
def test_bad_rows_are_as_if_absent(name):
    updates = random_updates(11, 5)
    updates[3, 1] = np.nan
    rest = np.delete(updates, 3, axis=0).astype(np.float64)
    spec = specification(name, 2) | ({"num_selected": 3} if name == "multi_krum" else {})
    oracle = CASES["multi_krum 3" if name == "multi_krum" else name][1]
    np.testing.assert_allclose(aggregate(updates, spec), oracle(rest, 2), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1e30, 1e-30])
@pytest.mark.parametrize("name", [name for name in CASES if name != "kmeans"])
def test_huge_and_tiny_units(name, scale):
    updates = random_updates(11, 1)
    expected = CASES[name][1](updates.astype(np.float64), 2)
    got = aggregate(updates * np.float32(scale), specification(name, 2))
    np.testing.assert_allclose(got / np.float32(scale), expected, rtol=1e-4, atol=1e-6)


# Not the author code's Krum: its n - f neighbours take in an attacker, which drowns all else.
ROBUST = [n for n in CASES if n not in ("mean", "kmeans", "krum author", "bulyan author")]


@pytest.mark.parametrize("name", ROBUST)
def test_huge_rows_of_an_attacker(name):
    updates = random_updates(11, 2)
    updates[[2, 9]] = [[1e30], [-1e30]]
    expected = CASES[name][1](updates.astype(np.float64), 2)
    assert np.abs(expected).max() < 10
    np.testing.assert_allclose(
        aggregate(updates, specification(name, 2)), expected, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("name", CASES)
def test_duplicates(name):
    """Identical updates beside outliers: ties everywhere, and the oracles break them alike."""
    updates = np.full((11, 5), 0.25, np.float32)
    updates[[4, 7]] = [[3.0], [-2.0]]
    expected = CASES[name][1](updates.astype(np.float64), 2)
    got = aggregate(updates, specification(name, 2))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("values", "spec", "expected"),
    [
        ([0, 1, 5, 100], "median", 3.0),  # even: halfway between the middle two
        ([5, 1, 0], "median", 1.0),
        ([7], "median", 7.0),
        ([0, 0, 1, 1, 1], {"name": "krum", "num_byzantine": 1}, 1.0),
        ([0, 0, 0, 1, 1], {"name": "krum", "num_byzantine": 1}, 0.0),
        ([1, 0, 2], {"name": "krum", "num_byzantine": 0}, 1.0),  # all tie: the first row
        ([0, 1, 2, 3], {"name": "trimmed_mean", "num_byzantine": 0}, 1.5),
        ([0, 1, 2, 9], {"name": "trimmed_mean", "num_byzantine": 1}, 1.5),
        ([0, 1, 3, 4], near("nearest_n_minus_f") | {"num_byzantine": 1}, 4 / 3),  # tie: 0, not 4
        ([0, 1, 3, 4, 9], near("nearest_n_minus_2f") | {"num_byzantine": 1}, 8 / 3),  # 1, 3, 4
        ([0, 1, 3, 4], near("nearest_n_minus_f", "author") | {"num_byzantine": 1}, 2.0),
        ([0, 1, 2, 9], {"name": "trimmed_mean", "variant": "kmeans"}, 1.0),
        ([0, 1, 2, 9], {"name": "trimmed_mean", "variant": "kmeans", "threshold": 8.5}, 3.0),
        ([0, 0, 9, 9], {"name": "trimmed_mean", "variant": "kmeans"}, 4.5),  # equal sizes
        ([5, 5, 5], {"name": "trimmed_mean", "variant": "kmeans"}, 5.0),
        ([0, 2, 1, 50], {"name": "multi_krum", "num_byzantine": 0, "num_selected": 1}, 1.0),
    ],
)
def test_by_hand(values, spec, expected):
    got = aggregate([[float(v)] for v in values], spec)
    np.testing.assert_allclose(got, [expected], rtol=1e-6)


def test_mean_is_weighted_by_examples():
    updates, weights = random_updates(6, 0), np.array([1, 5, 2, 0, 9, 4])
    expected = np.average(updates.astype(np.float64), axis=0, weights=weights)
    np.testing.assert_allclose(aggregate(updates, "mean", weights=weights), expected, rtol=1e-5)
    plain = aggregate(updates, {"name": "mean", "weighted": False}, weights=weights)
    np.testing.assert_allclose(plain, updates.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        aggregate(updates, "median", weights=weights), np.median(updates, 0), rtol=1e-6
    )


def test_clip_then_median():
    updates = random_updates(7, 3) * np.arange(1, 8, dtype=np.float32)[:, None]
    norms = np.linalg.norm(updates.astype(np.float64), axis=1, keepdims=True)
    clipped = updates * np.minimum(1.0, 6.0 / norms)
    assert (norms > 6).any() and (norms < 6).any()
    got = aggregate(updates, [{"name": "clip_norm", "max_norm": 6.0}, "median"])
    np.testing.assert_allclose(got, np.median(clipped, axis=0), rtol=1e-5)


@pytest.mark.parametrize("size", [1e30, 1e-30, 0.0])
def test_clip_of_extreme_norms(size):
    got = aggregate([[0.6 * size, 0.8 * size]], ["clip_norm", "mean"])
    expected = np.array([0.6, 0.8]) * min(size, 1.0)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=0.0)


def test_noise_has_the_given_deviation_and_the_key_decides():
    spec = ["mean", {"name": "gaussian_noise", "std": 0.5}]
    updates = np.full((3, 4000), 2.0, np.float32)
    noisy = aggregate(updates, spec, key=jax.random.key(1))
    assert abs(noisy.mean() - 2.0) < 0.05 and abs(noisy.std() - 0.5) < 0.03
    np.testing.assert_array_equal(noisy, aggregate(updates, spec, key=jax.random.key(1)))
    assert not np.array_equal(noisy, aggregate(updates, spec, key=jax.random.key(2)))
    quiet = ["mean", {"name": "gaussian_noise", "std": 0.0}]
    np.testing.assert_array_equal(aggregate(updates, quiet), updates[0])


def test_bulyan_with_a_rule_that_averages():
    """A selection that is no update picks the remaining update nearest to it."""
    updates = random_updates(11, 4)
    left, chosen = list(range(11)), []
    while len(chosen) < 7:
        rest = updates[left].astype(np.float64)
        distance = np.linalg.norm(rest - np.median(rest, axis=0), axis=1)
        chosen.append(left.pop(int(np.argmin(distance))))
    expected = columns(nearest_median, updates[chosen], 3)
    got = aggregate(updates, {"name": "bulyan", "selection": "median", "num_byzantine": 2})
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_clipping_in_half_precision():
    """There 65504 is the largest number, for norms and for `max_norm`."""
    rows = np.array([[3.0, 4.0], [6e4, 6e4]], np.float16)
    for norm in (7e4, 1e18):
        got = fedjax_sec.aggregate(rows[:1], [{"name": "clip_norm", "max_norm": norm}, "mean"])
        assert got.dtype == np.float16 and got.tolist() == [3.0, 4.0]
    got = fedjax_sec.aggregate(rows[1:], [{"name": "clip_norm", "max_norm": 10.0}, "mean"])
    np.testing.assert_allclose(got, [50**0.5] * 2, rtol=1e-3)


def test_nobody_left_gives_zero():
    """In a round; `fedjax_sec.aggregate` refuses such a stack."""
    view = ServerView(
        jnp.zeros(5), jnp.ones(11), jnp.arange(11), jnp.ones(11, bool), jnp.array(0), False
    )
    for name in CASES:
        defense = Defense.build(specification(name, 2))
        nothing, state = jnp.full((11, 5), jnp.nan), defense.init(11, 5)
        got = defense.apply(jax.random.key(0), nothing, state, view)[0]
        np.testing.assert_array_equal(got, np.zeros(5))


@pytest.mark.parametrize(
    ("spec", "clients", "parts"),
    [
        ({"name": "krum", "num_byzantine": 2}, 6, ["2 f + 2 < K", "K = 6", "<= 1", "got 2"]),
        ({"name": "krum", "num_byzantine": 0}, 2, ["2 f + 2 < K", "no num_byzantine at all"]),
        (
            {"name": "krum", "convention": "author", "num_byzantine": 3},
            6,
            ["2 f < K", "<= 2", "got 3"],
        ),
        ({"name": "multi_krum", "num_byzantine": 2}, 6, ["multi_krum", "2 f + 2 < K", "<= 1"]),
        (
            {"name": "multi_krum", "num_byzantine": 1, "num_selected": 7},
            6,
            ["num_selected", "<= K = 6", "got 7"],
        ),
        ({"name": "trimmed_mean", "num_byzantine": 3}, 6, ["2 f < K", "<= 2", "got 3"]),
        ({"name": "bulyan", "num_byzantine": 2}, 10, ["4 f + 3 <= K", "K = 10", "<= 1"]),
        ({"name": "bulyan", "num_byzantine": 1, "selection": "clip_norm"}, 9, ["aggregator"]),
        ("krum", 6, ["num_byzantine is required"]),
        ({"name": "krum", "num_byzantine": -1}, 6, ["num_byzantine must be >= 0", "got -1"]),
        (
            {"name": "trimmed_mean", "num_byzantine": 1, "threshold": 1.0},
            6,
            ["threshold", "'kmeans' only", "'extremes'"],
        ),
        (
            {"name": "trimmed_mean", "num_byzantine": 1, "convention": "author"},
            6,
            ["'author'", "'nearest_n_minus_f' only"],
        ),
        (["mean", "median"], 6, ["exactly one aggregator", "got 2"]),
        (["clip_norm"], 6, ["exactly one aggregator", "got 0"]),
        (["mean", "clip_norm"], 6, ["before, aggregate, after"]),
    ],
)
def test_bounds(spec, clients, parts):
    with pytest.raises(ConfigError) as error:
        aggregate(random_updates(clients, 0), spec)
    for part in parts:
        assert part in str(error.value)

"""The kernels of `fedjax_sec.ops` against independent NumPy oracles in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sec.ops import coordinatewise, distances, moments, reference, sorting
from fedjax_sec.ops.selection import order_statistic

CLIENTS = [1, 2, 3, 4, 5, 7, 8, 12, 13, 51, 100]
DIM = 37
#: Implementations that must agree with the oracles.
BOTH = pytest.mark.parametrize("impl", ["kernel", "reference"])


def pick(impl, kernel_module, name):
    return getattr(reference if impl == "reference" else kernel_module, name)


def stack(num_clients, kind="normal", dim=DIM, seed=0):
    rng = np.random.default_rng([seed, num_clients, dim])
    x = rng.normal(size=(num_clients, dim))
    if kind == "ties":  # few distinct values: duplicates, and equal distances to the median
        x = rng.integers(-2, 3, size=x.shape).astype(float)
    if kind == "huge":  # a minority of finite but huge rows
        for i in range((num_clients - 1) // 4):
            x[i] = 1e30 * rng.choice([-1, 1], size=dim)
    if kind == "tiny":
        x *= 1e-30
    if kind == "equal":
        x[:] = x[:1]
    return x.astype(np.float32)


KINDS = ["normal", "ties", "huge", "tiny", "equal"]


def with_invalid(x, seed=0):
    """Insert rows of NaN and infinity, and say which rows are real."""
    rng = np.random.default_rng(seed)
    bad = np.stack([np.full(x.shape[1], v, np.float32) for v in (np.nan, np.inf, -np.inf)])
    rows = np.concatenate([x, bad])
    order = rng.permutation(len(rows))
    return rows[order], order < len(x)


# ---------------------------------------------------------------- oracles: valid rows, float64


def np_kept(column, chosen):
    return (column >= min(chosen)) & (column <= max(chosen))


def by_column(rule):
    """Lift a rule on one column, ``column -> (value, chosen values)``, to all columns."""

    def lifted(x, *args):
        x = x.astype(np.float64)
        values, kept = [], []
        for column in x.T:
            value, chosen = rule(column, *args)
            values.append(value)
            kept.append(np_kept(column, chosen))
        return np.array(values), np.mean(kept, axis=0)

    return lifted


@by_column
def np_median(column):
    v = np.sort(column)
    middle = [v[(len(v) - 1) // 2], v[len(v) // 2]]
    return sum(middle) / 2, middle


@by_column
def np_trimmed_mean(column, num_trim):
    b = min(num_trim, (len(column) - 1) // 2)
    chosen = np.sort(column)[b : len(column) - b]
    return chosen.mean(), chosen


@by_column
def np_mean_near_median(column, num_drop):
    center = np.float32(np.median(column))
    # Nearest first; of two values equally far the smaller first. Distances as float32 sees them.
    nearest = sorted(column, key=lambda u: (abs(np.float32(u) - center), u))
    chosen = np.array(nearest[: max(len(column) - num_drop, 1)])
    return chosen.mean(), chosen


@by_column
def np_kmeans_mean(column, threshold):
    v = np.sort(column)
    n = len(v)
    best, chosen = np.inf, v
    for s in range(1, n):
        left, right = v[:s], v[s:]
        cost = ((left - left.mean()) ** 2).sum() + ((right - right.mean()) ** 2).sum()
        if cost < best * (1 - 1e-12):
            best, chosen = cost, v
            if right.mean() - left.mean() > threshold and len(left) != len(right):
                chosen = left if len(left) > len(right) else right
    return chosen.mean(), chosen


def np_sqdist(x):
    x = x.astype(np.float64)
    return ((x[:, None] - x[None]) ** 2).sum(axis=-1)


def np_krum_scores(d, alive, near, squared=True):
    d = d if squared else np.sqrt(d)
    scores = np.full(len(d), np.inf)
    for i in np.flatnonzero(alive):
        others = sorted(d[i, j] for j in np.flatnonzero(alive) if j != i)
        scores[i] = sum(others[: max(near, 1)])
    return scores


RULES = {
    "median": (np_median, lambda k: ()),
    "trimmed_mean": (np_trimmed_mean, lambda k: (k // 4,)),
    "trimmed_mean_0": (np_trimmed_mean, lambda k: (0,)),
    "trimmed_mean_all": (np_trimmed_mean, lambda k: (k,)),
    "mean_near_median": (np_mean_near_median, lambda k: (2 * (k // 4),)),
    "mean_near_median_1": (np_mean_near_median, lambda k: (1,)),
    "mean_near_median_0": (np_mean_near_median, lambda k: (0,)),
    "mean_near_median_all": (np_mean_near_median, lambda k: (k,)),
    "kmeans_mean": (np_kmeans_mean, lambda k: (1.5,)),
    "kmeans_mean_far": (np_kmeans_mean, lambda k: (1e35,)),
}


def named(rule):
    for variant in ("_0", "_1", "_all", "_far"):
        rule = rule.removesuffix(variant)
    return rule


def compiled(impl, rule, args):
    function = pick(impl, coordinatewise, named(rule))
    return jax.jit(lambda x, valid: function(x, valid, *args))


def check(got, expected, kind):
    atol = 1e-36 if kind == "tiny" else 3e-7
    if np.max(np.abs(expected)) > 1e20:  # the rule keeps huge values, which may cancel
        atol = 1e24
    np.testing.assert_allclose(got, expected, rtol=3e-6, atol=atol, err_msg=kind)


def cases():
    """Every rule for every K; variants and the plain versions, slow to compile, for a few."""
    for rule in RULES:
        for num_clients in CLIENTS:
            few = num_clients in (1, 2, 5, 8)
            if few or named(rule) == rule:
                yield "kernel", rule, num_clients
            if few:
                yield "reference", rule, num_clients


@pytest.mark.slow
@pytest.mark.parametrize(("impl", "rule", "num_clients"), list(cases()))
def test_coordinatewise_matches_numpy(impl, rule, num_clients):
    oracle, arguments = RULES[rule]
    args = arguments(num_clients)
    function = compiled(impl, rule, args)
    for kind in KINDS:
        x = stack(num_clients, kind)
        if kind == "tiny" and rule == "kmeans_mean":
            continue  # its threshold has the unit of the updates
        rows, valid = with_invalid(x)
        value, kept = function(jnp.asarray(rows), jnp.asarray(valid))
        expected, expected_kept = oracle(rows[valid], *args)
        check(value, expected, kind)
        assert np.all(kept[~valid] == 0)
        np.testing.assert_allclose(kept[valid], expected_kept, atol=1e-6, err_msg=kind)


@pytest.mark.parametrize("rule", RULES)
def test_only_valid_rows_count(rule):
    """With every number of valid rows, down to none, the rule is that on the valid rows."""
    num_clients = 9
    oracle, arguments = RULES[rule]
    args = arguments(num_clients)
    function = compiled("kernel", rule, args)
    x = stack(num_clients)
    rng = np.random.default_rng(1)
    for n in range(num_clients + 1):
        valid = rng.permutation(num_clients) < n
        rows = np.where(valid[:, None], x, np.nan).astype(np.float32)
        value, kept = function(jnp.asarray(rows), jnp.asarray(valid))
        if n == 0:
            assert np.all(value == 0) and np.all(kept == 0)
        else:
            check(value, oracle(x[valid], *args)[0], f"n={n}")


@pytest.mark.parametrize("rule", RULES)
def test_vmap_is_a_loop(rule):
    function = compiled("kernel", rule, RULES[rule][1](7))
    x = jnp.stack([stack(7, seed=s) for s in range(3)])
    valid = jnp.array([[True] * 7, [True] * 5 + [False] * 2, [False] + [True] * 6])
    together = jax.vmap(function)(x, valid)
    for s in range(3):
        for a, b in zip(together, function(x[s], valid[s]), strict=True):
            np.testing.assert_allclose(a[s], b, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("num_clients", [6, 7])
def test_blocks_of_columns_and_many_clients(rule, num_clients, monkeypatch):
    """Several blocks, the last one overlapping, and the path without the network, agree."""
    args = RULES[rule][1](num_clients)
    x, valid = with_invalid(stack(num_clients))
    x, valid = jnp.asarray(x), jnp.asarray(valid)
    whole = compiled("kernel", rule, args)(x, valid)
    monkeypatch.setattr(sorting, "column_chunk", lambda rows: 10)
    blocks = compiled("kernel", rule, args)(x, valid)
    monkeypatch.setattr(sorting, "MAX_UNROLLED_CPU", 0)
    plain = compiled("kernel", rule, args)(x, valid)
    for other in (blocks, plain):
        for a, b in zip(whole, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("rule", RULES)
def test_kept_is_optional(rule):
    args = RULES[rule][1](5)
    x, valid = stack(5), jnp.ones(5, bool)
    function = pick("kernel", coordinatewise, named(rule))
    value, kept = jax.jit(lambda x, valid: function(x, valid, *args, with_kept=False))(x, valid)
    assert kept is None
    expected = compiled("kernel", rule, args)(x, valid)[0]
    np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-7)


def test_near_median_keeps_the_smaller_of_two_equally_far():
    x = jnp.array([[-1.0], [0.0], [1.0]])
    value, kept = coordinatewise.mean_near_median(x, jnp.ones(3, bool), 1)
    assert value.tolist() == [-0.5] and kept.tolist() == [1, 1, 0]


def test_median_does_not_overflow():
    x = jnp.array([[3e38], [3.1e38], [3.2e38], [3.3e38]])
    assert np.all(np.isfinite(coordinatewise.median(x, jnp.ones(4, bool))[0]))


# ---------------------------------------------------------------- sorting


@pytest.mark.parametrize("num_clients", [*CLIENTS, 130])
def test_sort_clients(num_clients):
    for kind in ("normal", "ties", "huge"):
        x = stack(num_clients, kind)
        np.testing.assert_array_equal(sorting.sort_clients(jnp.asarray(x)), np.sort(x, axis=0))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("num_rows", [1, 2, 129, 1023, 1024, 1500])
def test_order_statistic(num_rows, dtype):
    """Exactly the sorted value, below and above the number of rows whose counts fit one word."""
    rng = np.random.default_rng(num_rows)
    for kind in ("normal", "ties", "huge", "tiny"):
        x = stack(num_rows, kind).astype(dtype)
        x[rng.random(x.shape) < 0.05] = np.inf
        x[rng.random(x.shape) < 0.05] = -np.inf
        rank = rng.integers(0, num_rows, size=(1, x.shape[1]))
        with jax.enable_x64(dtype == np.float64):
            got = order_statistic(jnp.asarray(x), jnp.asarray(rank, jnp.int32))
            same = order_statistic(jnp.asarray(x), jnp.int32(num_rows // 2))
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, np.take_along_axis(np.sort(x, axis=0), rank, axis=0))
        np.testing.assert_array_equal(same[0], np.sort(x, axis=0)[num_rows // 2])


def test_order_statistic_shares_its_gradient_among_ties():
    x = jnp.array([[1.0], [5.0], [1.0], [-3.0]])
    gradient = jax.grad(lambda x: order_statistic(x, jnp.int32(1)).sum())(x)
    assert gradient[:, 0].tolist() == [0.5, 0.0, 0.5, 0.0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_drop", [0, 1, 40, 129])
def test_many_clients_select_what_a_sort_would(kind, num_drop):
    """Beyond the network's size: the same bounds, ties and shares as by sorting all values."""
    x, valid = with_invalid(stack(130, kind))
    for name, count in (("mean_near_median", num_drop), ("trimmed_mean", num_drop // 2)):
        got = getattr(coordinatewise, name)(jnp.asarray(x), jnp.asarray(valid), count)
        want = getattr(reference, name)(jnp.asarray(x), jnp.asarray(valid), count)
        scale = np.abs(np.asarray(want[0])).max()
        np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-6 * scale)
        np.testing.assert_array_equal(got[1], want[1])


@pytest.mark.parametrize("num_rows", range(1, 13))
def test_network_sorts_all_zero_one_inputs(num_rows):
    """The zero-one principle: a network that sorts all of these sorts everything."""
    bits = (np.arange(2**num_rows)[:, None] >> np.arange(num_rows)) & 1
    for layer in sorting.sorting_network(num_rows):
        used = [i for pair in layer for i in pair]
        assert len(used) == len(set(used))
        for i, j in layer:
            low, high = np.minimum(bits[:, i], bits[:, j]), np.maximum(bits[:, i], bits[:, j])
            bits[:, i], bits[:, j] = low, high
    assert np.all(np.diff(bits, axis=1) >= 0)


@pytest.mark.parametrize("chunk", [1, 4, 10, 37, 100])
def test_map_columns(chunk):
    x, y = jnp.asarray(stack(3)), jnp.asarray(stack(2, seed=1))
    rule = lambda a, b: {"sum": a.sum(axis=0) + b[0], "rows": a * b[1:]}  # noqa: E731
    got = sorting.map_columns(rule, x, y, chunk=chunk)
    expected = rule(x, y)
    assert got.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------- moments


@BOTH
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("num_clients", CLIENTS)
def test_mean_and_std(impl, num_clients, ddof):
    function = jax.jit(pick(impl, moments, "mean_and_std"), static_argnums=2)
    for kind in ("normal", "ties", "equal"):
        rows, valid = with_invalid(stack(num_clients, kind))
        mean, std = function(jnp.asarray(rows), jnp.asarray(valid), ddof)
        x = rows[valid].astype(np.float64)
        np.testing.assert_allclose(mean, x.mean(axis=0), rtol=1e-5, atol=1e-6)
        expected = np.sqrt(((x - x.mean(axis=0)) ** 2).sum(axis=0) / max(len(x) - ddof, 1))
        np.testing.assert_allclose(std, expected, rtol=1e-5, atol=1e-6)


def test_mean_and_std_far_from_zero_and_of_nothing():
    x = (1000 + 1e-3 * stack(20).astype(np.float64)).astype(np.float32)
    _, std = moments.mean_and_std(jnp.asarray(x), jnp.ones(20, bool))
    np.testing.assert_allclose(std, x.astype(np.float64).std(axis=0), rtol=1e-4)
    nothing = moments.mean_and_std(jnp.full((3, 4), jnp.nan), jnp.zeros(3, bool), 1)
    assert all(np.all(a == 0) for a in nothing)


@BOTH
@pytest.mark.parametrize("num_clients", CLIENTS)
def test_weighted_mean(impl, num_clients):
    function = jax.jit(pick(impl, moments, "weighted_mean"))
    rng = np.random.default_rng(num_clients)
    for kind in ("normal", "huge", "tiny"):
        rows, valid = with_invalid(stack(num_clients, kind))
        weights = np.where(valid, rng.uniform(0.5, 2.0, len(rows)), 0.0).astype(np.float32)
        x, w = rows[valid].astype(np.float64), weights[valid].astype(np.float64)
        expected = (w[:, None] * x).sum(axis=0) / w.sum()
        scale = np.abs(x).max()
        got = np.asarray(function(jnp.asarray(rows), jnp.asarray(weights)), np.float64)
        np.testing.assert_allclose(got / scale, expected / scale, rtol=2e-6, atol=1e-6)


def test_weighted_mean_range():
    got = moments.weighted_mean(jnp.full((9, 3), 3e38), jnp.full(9, 1e38))
    np.testing.assert_allclose(got, 3e38, rtol=1e-6)
    assert np.all(moments.weighted_mean(jnp.full((2, 3), jnp.nan), jnp.zeros(2)) == 0)


def test_row_norms():
    x = np.stack(
        [*stack(3), stack(1)[0] * 1e30, stack(1)[0] * 1e-30, np.zeros(DIM), np.full(DIM, 5e37)]
    )
    for rows in (x, x[:3]):
        got = jax.jit(moments.row_norms)(jnp.asarray(rows, jnp.float32))
        expected = np.linalg.norm(rows.astype(np.float32).astype(np.float64), axis=1)
        np.testing.assert_allclose(got, expected, rtol=2e-6)
    assert np.isnan(moments.row_norms(jnp.array([[jnp.nan, 1.0], [1.0, 1.0]]))[0])


def test_finite_rows():
    rows, valid = with_invalid(stack(5, "huge"))
    np.testing.assert_array_equal(moments.finite_rows(jnp.asarray(rows)), valid)


def test_moments_vmap_is_a_loop():
    x = jnp.stack([stack(5, seed=s) for s in range(2)])
    mask = jnp.array([[True] * 5, [True, False] * 2 + [True]])
    for function, args in (
        (moments.mean_and_std, (x, mask)),
        (moments.weighted_mean, (x, mask.astype(jnp.float32))),
        (moments.row_norms, (x,)),
        (distances.squared_distances, (x, mask)),
    ):
        together = jax.tree.leaves(jax.jit(jax.vmap(function))(*args))
        function = jax.jit(function)
        for s in range(2):
            single = jax.tree.leaves(function(*(a[s] for a in args)))
            for a, b in zip(together, single, strict=True):
                np.testing.assert_allclose(a[s], b, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- distances


@pytest.mark.parametrize("num_clients", CLIENTS)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_squared_distances(num_clients, scale):
    x = (stack(num_clients, dim=300) * scale).astype(np.float32)
    rows, valid = with_invalid(x)
    d, c = jax.jit(distances.squared_distances)(jnp.asarray(rows), jnp.asarray(valid))
    d, c = np.asarray(d, np.float64), float(c)
    assert np.frexp(c)[0] == 0.5  # a power of two
    expected = np_sqdist(rows[valid]) * c * c
    np.testing.assert_allclose(d[np.ix_(valid, valid)], expected, rtol=1e-4, atol=1e-30)
    assert np.all(d[~valid] == np.inf) and np.all(d[:, ~valid] == np.inf)
    assert np.all(d == d.T)


@pytest.mark.parametrize("dim", [1023, 1024, 1025, 1700])
@pytest.mark.parametrize("num_clients", [1, 2, 3, 12])
def test_squared_distances_in_blocks_of_columns(num_clients, dim):
    assert dim // distances.GRAM_CHUNK in (1, 2, 3)
    rows, valid = with_invalid(stack(num_clients, dim=dim))
    rows[valid, -1] += 5 * np.arange(num_clients)  # the last column, in no whole block, decides
    d, c = jax.jit(distances.squared_distances)(jnp.asarray(rows), jnp.asarray(valid))
    expected = np_sqdist(rows[valid]) * float(c) ** 2
    np.testing.assert_allclose(np.asarray(d)[np.ix_(valid, valid)], expected, rtol=1e-5, atol=1e-30)
    assert np.all(np.isinf(np.asarray(d)[~valid]))


def test_reference_squared_distances():
    rows, valid = with_invalid(stack(5))
    d, c = reference.squared_distances(jnp.asarray(rows), jnp.asarray(valid))
    assert c == 1 and np.all(np.isinf(np.asarray(d)[~valid]))
    np.testing.assert_allclose(
        np.asarray(d)[np.ix_(valid, valid)], np_sqdist(rows[valid]), rtol=1e-5
    )


def test_squared_distances_of_nearly_equal_rows_beside_huge_ones():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=1000) + 1e-4 * rng.normal(size=(15, 1000))).astype(np.float32)
    x[3], x[7] = 1e30, np.inf
    x[9, 5] = np.nan
    honest = [i for i in range(15) if i not in (3, 7, 9)]
    d, c = distances.squared_distances(jnp.asarray(x), jnp.ones(15, bool))
    d = np.asarray(d, np.float64)
    assert not np.any(np.isnan(d)) and np.all(np.diagonal(d) == 0)
    expected = np_sqdist(x[honest]) * float(c) ** 2
    np.testing.assert_allclose(d[np.ix_(honest, honest)], expected, rtol=1e-4)
    far = d[3, honest]
    assert np.all(far > 1e30) and np.all(np.isinf(d[[7, 9]][:, honest]))
    scores = distances.krum_scores(jnp.asarray(d, jnp.float32), jnp.ones(15, bool), 9)
    assert np.all(np.isfinite(scores)) and set(np.argsort(scores)[:12].tolist()) == set(honest)


@BOTH
@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("num_clients", [2, 3, 5, 8, 13])
def test_krum_scores(impl, num_clients, squared):
    function = jax.jit(pick(impl, distances, "krum_scores"), static_argnums=3)
    d = np_sqdist(stack(num_clients))
    rng = np.random.default_rng(0)
    for near in (0, 1, num_clients - 2, num_clients + 3):
        alive = rng.uniform(size=num_clients) < 0.8
        alive[0] = alive[1] = True
        got = function(jnp.asarray(d, jnp.float32), jnp.asarray(alive), near, squared)
        np.testing.assert_allclose(got, np_krum_scores(d, alive, near, squared), rtol=1e-5)


def test_krum_scores_with_one_client_left():
    d = jnp.asarray(np_sqdist(stack(4)), jnp.float32)
    scores = distances.krum_scores(d, jnp.array([False, False, True, False]), 3)
    assert scores.tolist() == [np.inf, np.inf, 0.0, np.inf]


def np_krum_sequence(d, valid, steps, neighbours, squared):
    alive, order = valid.copy(), []
    for _ in range(min(steps, valid.sum())):
        scores = np_krum_scores(d, alive, neighbours(alive.sum()), squared)
        order.append(int(np.argmin(scores)))
        alive[order[-1]] = False
    return order


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize(
    ("impl", "num_clients"),
    [("reference", 5), *(("kernel", k) for k in (1, 2, 5, 12, 13, 51))],
)
def test_krum_sequence(impl, num_clients, squared):
    f = num_clients // 4
    neighbours = lambda n: n - f - 2  # noqa: E731
    function = jax.jit(
        lambda d, valid, steps: pick(impl, distances, "krum_sequence")(
            d, valid, num_clients, steps, neighbours, squared
        )
    )
    rng = np.random.default_rng(0)
    for kind in ("normal", "ties", "equal"):
        # Small whole numbers: sums are exact, so equal scores are equal here and in float32.
        d = np.round(np_sqdist(stack(num_clients, kind)))
        d = d if squared else d**2
        for share, steps in ((1.0, num_clients), (1.0, num_clients // 2), (0.7, num_clients)):
            valid = rng.uniform(size=num_clients) < share
            given = np.where(valid[:, None] & valid[None, :], d, np.inf).astype(np.float32)
            chosen, order = function(jnp.asarray(given), jnp.asarray(valid), steps)
            expected = np_krum_sequence(d, valid, steps, neighbours, squared)
            assert order.tolist() == expected + [-1] * (num_clients - len(expected))
            assert sorted(expected) == np.flatnonzero(chosen).tolist()


def test_krum_sequence_picks_living_clients_when_all_distances_are_infinite():
    d = jnp.where(jnp.eye(4, dtype=bool), 0.0, jnp.inf)
    valid = jnp.array([False, True, True, True])
    chosen, order = distances.krum_sequence(d, valid, 3, 2, lambda n: n - 2)
    assert order.tolist() == [1, 2, -1] and chosen.tolist() == [False, True, True, False]


def test_krum_sequence_vmap_is_a_loop():
    d = jnp.stack([np_sqdist(stack(6, seed=s)).astype(np.float32) for s in range(3)])
    valid = jnp.array([[True] * 6, [True] * 4 + [False] * 2, [False] + [True] * 5])
    steps = jnp.array([4, 2, 3])

    @jax.jit
    def run(d, valid, steps):
        return distances.krum_sequence(d, valid, 4, steps, lambda n: n - 3)

    together = jax.vmap(run)(d, valid, steps)
    for s in range(3):
        for a, b in zip(together, run(d[s], valid[s], steps[s]), strict=True):
            assert a[s].tolist() == b.tolist()

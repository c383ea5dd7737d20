"""Every kernel of the table in `kernels.py`: sizes, types, blocks, `vmap` and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels import KERNELS, example
from scipy.stats import norm

from fedjax_sec.ops import coordinatewise, distances, iterative, moments, sorting
from fedjax_sec.ops.perturbation import z_max
from fedjax_sec.ops.precision import root, wide

EVERY = pytest.mark.parametrize("name", KERNELS)
SMOOTH = pytest.mark.parametrize("name", [n for n, k in KERNELS.items() if k.smooth])
#: What `test_ops` and `test_iterative` have not tried already with few clients or within `vmap`.
OTHERS = ["row_norms", "finite_rows", "distances_from", "krum_scores", "krum_scores_unsquared"]
STACKED = pytest.mark.parametrize("name", [n for n, k in KERNELS.items() if not k.pairwise])


def compiled(kernel):
    # A new function each time: what is patched is read while it is traced.
    return jax.jit(lambda x, valid: kernel.run(x, valid))


@functools.cache
def compiled_plain(name):
    return jax.jit(KERNELS[name].plain)


def plain(name, x, valid):
    with jax.enable_x64(True):
        return compiled_plain(name)(np.asarray(x, np.float64), valid)


def compare(got, expected, x, dtype, label):
    """Equal up to rounding: once to `dtype`, by eps / 2, and in every step of wide sums before.

    Rounding errors of n additions are as good as independent and grow with the root of n; they are
    relative to the largest number that takes part, since sums may cancel.
    """
    largest = np.abs(x[np.isfinite(x)], dtype=np.float64).max()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        scale = max(largest, np.abs(b[np.isfinite(b)]).max(initial=0.0))
        sums = 8 * np.sqrt(max(x.shape)) * float(jnp.finfo(wide(dtype)).eps)
        once = float(jnp.finfo(dtype).eps) / 2
        np.testing.assert_allclose(a, b, rtol=once, atol=sums * scale, err_msg=label)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_clients"),
    [(name, 129) for name in KERNELS]
    + [(name, k) for name in [*OTHERS, "krum_sequence"] for k in (1, 2, 3, 8, 100)],
)
def test_equals_the_plain_version(name, num_clients):
    kernel = KERNELS[name]
    function = compiled(kernel)
    for kind in ("normal", "ties", "equal"):
        if name == "kmeans_mean" and kind == "ties":
            continue  # of equally good splits, rounding chooses; `test_ops` knows how
        x, valid = example(kernel, num_clients, kind=kind)
        x = x.astype(np.float32)
        compare(function(x, valid), plain(name, x, valid), x, jnp.float32, kind)


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize(
    ("num_clients", "dtypes"),
    [(13, (jnp.float16, jnp.float64)), (129, (jnp.float16, jnp.bfloat16))],
    ids=["few", "many"],
)
def test_types_are_kept_and_sums_are_wide(name, num_clients, dtypes):
    """Values near 300: their squares, and the sum of 129 of them, leave the range of float16."""
    kernel = KERNELS[name]
    x, valid = example(kernel, num_clients)
    x = 300 * (x if kernel.pairwise else x + 1)
    for dtype in dtypes:
        with jax.enable_x64(dtype == jnp.float64):
            rounded = jnp.asarray(x, dtype)
            got = compiled(kernel)(rounded, valid)
        wider = ("squared_distances", "cosine_similarities", "cosines_to")
        result = wide(dtype) if name in wider else dtype
        for leaf in jax.tree.leaves(got):
            assert leaf.dtype == result or not jnp.issubdtype(leaf.dtype, jnp.floating)
        rounded = np.asarray(rounded, np.float64)
        compare(got, plain(name, rounded, valid), rounded, dtype, jnp.dtype(dtype).name)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Kernels are traced as for a GPU."""
    for module in (distances, iterative, moments, sorting):
        monkeypatch.setattr(module, "on_cpu", lambda: False)
    monkeypatch.setattr(sorting, "on_gpu", lambda: True)


#: Kernels that a GPU computes in another way than a CPU.
DIFFERENT = ["median", "trimmed_mean", "mean_near_median", "weighted_mean", "mean_and_std"]
DIFFERENT += ["row_norms", "finite_rows", "distances_from", "geometric_median", "centered_clip"]


@pytest.mark.parametrize("name", DIFFERENT)
@pytest.mark.parametrize("num_clients", [1, 13, 70])
def test_kernels_for_a_gpu_equal_the_plain_version(name, num_clients, as_on_a_gpu):
    """Up to 64 clients are sorted by a network; of 70 the values are counted."""
    kernel = KERNELS[name]
    for kind in ("normal", "ties"):
        x, valid = example(kernel, num_clients, kind=kind)
        x = x.astype(np.float32)
        compare(compiled(kernel)(x, valid), plain(name, x, valid), x, jnp.float32, kind)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_row_with_one_number_that_is_not_finite_is_not(on_cpu, monkeypatch):
    monkeypatch.setattr(moments, "on_cpu", lambda: on_cpu)
    x = jnp.ones((4, 50)).at[1, 7].set(jnp.nan).at[2, 0].set(-jnp.inf).at[3].set(3e38)
    assert jax.jit(lambda x: moments.finite_rows(x))(x).tolist() == [True, False, False, True]


@pytest.mark.parametrize("on_cpu", [True, False])
def test_stacks_are_compared_in_the_named_rows(on_cpu, monkeypatch):
    monkeypatch.setattr(moments, "on_cpu", lambda: on_cpu)
    x = jnp.array([[1.0, 2.0], [3.0, 4.0], [jnp.nan, 0.0]])
    rows = jnp.array([[True, True, False], [True, False, False], [False, False, True]])
    changed = x.at[1, 1].set(9.0)
    differs = jax.jit(lambda one, other, rows: moments.differs_in_rows(one, other, rows))
    assert [bool(differs(x, changed, row)) for row in rows] == [True, False, True]
    assert [bool(differs(x, x, row)) for row in rows] == [False, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["median", "trimmed_mean", "mean_near_median", "weighted_mean"])
@pytest.mark.parametrize("num_clients", [13, 70])
def test_kernels_for_a_gpu_have_gradients_and_run_within_vmap(name, num_clients, as_on_a_gpu):
    kernel = KERNELS[name]
    x, valid = example(kernel, num_clients)
    x = jnp.asarray(np.where(valid[:, None], x, 0), jnp.float32)
    stacks, masks = jnp.stack([x, 2 * x + 1]), jnp.stack([jnp.asarray(valid)] * 2)

    def loss(run, x, valid):
        return jnp.sum(jax.tree.leaves(kernel.smooth(run(x, valid)))[0] ** 2)

    got = jax.jit(jax.vmap(jax.value_and_grad(lambda x, v: loss(kernel.run, x, v))))(stacks, masks)
    expected = jax.vmap(jax.value_and_grad(lambda x, v: loss(kernel.plain, x, v)))(stacks, masks)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("low", [-36, -22, -2, 12, 33])
def test_norms_of_any_magnitude_in_one_pass(low):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(9, 301)) * 10 ** rng.uniform(low, low + 4, size=(9, 301))
    x[0] *= 0
    x[1, 5] = 1e37
    norms = moments.one_pass_norms(jnp.asarray(x, jnp.float32))
    expected = np.linalg.norm(x.astype(np.float32).astype(np.longdouble), axis=1)
    np.testing.assert_allclose(norms, expected.astype(float), rtol=1e-6)
    odd = moments.one_pass_norms(jnp.array([[jnp.nan, 1.0], [-jnp.inf, 1e-30], [1e-30, jnp.nan]]))
    np.testing.assert_array_equal(odd, [np.nan, np.inf, np.nan])


def test_more_coordinates_than_float16_can_count():
    x = jnp.ones((3, 70_000), jnp.float16)
    valid = jnp.ones(3, bool)
    assert jax.jit(coordinatewise.median)(x, valid)[1].tolist() == [1, 1, 1]
    assert jax.jit(moments.row_norms)(x).tolist() == [np.float16(70_000**0.5)] * 3
    squares, scale = jax.jit(distances.squared_distances)(x.at[0].set(1.5), valid)
    assert float(squares[0, 1] / scale**2) == 70_000 / 4


def in_blocks(monkeypatch, size):
    monkeypatch.setattr(sorting, "column_chunk", lambda rows: size)
    monkeypatch.setattr(sorting, "sort_chunk", lambda: size)
    monkeypatch.setattr(coordinatewise, "sort_chunk", lambda: size)
    monkeypatch.setattr(distances, "GRAM_CHUNK", size)


@pytest.mark.slow
@STACKED
@pytest.mark.parametrize(
    ("dim", "block"), [(1, None), (37, 15)], ids=["below one block", "two and a half"]
)
def test_any_number_of_columns(name, dim, block, monkeypatch):
    if block:
        in_blocks(monkeypatch, block)
    kernel = KERNELS[name]
    x, valid = example(kernel, 3, dim)
    x = x.astype(np.float32)
    compare(compiled(kernel)(x, valid), plain(name, x, valid), x, jnp.float32, name)


@pytest.mark.parametrize("name", [*OTHERS, "sort_clients"])
def test_vmap_is_a_loop(name):
    kernel = KERNELS[name]
    cases = [example(kernel, 5, seed=seed, invalid=range(seed)) for seed in range(3)]
    x, valid = np.stack([x for x, _ in cases]).astype(np.float32), np.stack([v for _, v in cases])
    function = compiled(kernel)
    together = jax.jit(jax.vmap(kernel.run))(x, valid)
    for i in range(3):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], together)
        compare(one, function(x[i], valid[i]), x[i], jnp.float32, str(i))


def functional(kernel, x, valid):
    """A random linear function of the finite results that have a gradient."""
    leaves = jax.tree.leaves(kernel.smooth(kernel.run(x, valid)))
    rng = np.random.default_rng(7)
    terms = [jnp.where(jnp.isfinite(a), a, 0.0) * rng.normal(size=a.shape) for a in leaves]
    return sum(term.sum() for term in terms)


@pytest.mark.slow
@SMOOTH
def test_gradients(name, monkeypatch):
    """Against central differences; then within `vmap`, blocks and the path for many clients."""
    kernel = KERNELS[name]
    with jax.enable_x64(True):
        slope = jax.jit(jax.value_and_grad(functools.partial(functional, kernel)))
        cases = [example(kernel, 6), example(kernel, 6, seed=1, invalid=(4,))]  # 4 and 5 valid rows
        gradients = []
        for x, valid in cases:
            direction = np.random.default_rng(3).normal(size=x.shape)
            step = np.where(np.isfinite(x), 1e-6 * direction, 0.0)
            change = (slope(x + step, valid)[0] - slope(x - step, valid)[0]) / 2e-6
            gradients.append(slope(x, valid)[1])
            assert np.all(gradients[-1][~valid] == 0)
            np.testing.assert_allclose(np.vdot(gradients[-1], direction), change, rtol=1e-6)
        for kind in ("ties", "equal", "zero"):
            cases.append(example(kernel, 6, kind=kind))
            assert np.all(np.isfinite(slope(*cases[-1])[1])), kind
        in_blocks(monkeypatch, 15)
        monkeypatch.setattr(sorting, "MAX_UNROLLED_CPU", 0)
        x, valid = (np.stack(parts) for parts in zip(*cases, strict=True))
        together = jax.jit(jax.vmap(jax.grad(functools.partial(functional, kernel))))(x, valid)
        assert np.all(np.isfinite(together))
        for one, expected in zip(together, gradients, strict=False):
            np.testing.assert_allclose(one, expected, rtol=1e-9, atol=1e-9)


def test_gradient_of_a_mean_by_its_weights():
    """Also of a row without weight, as long as it holds numbers, alone and within `vmap`."""
    x = jnp.array([[1.0], [4.0], [7.0]])
    weights = jnp.array([[1.0, 3.0, 0.0], [1.0, 3.0, 2.0]])
    gradient = jax.grad(lambda w, x: moments.weighted_mean(x, w)[0])
    slope = jax.jit(gradient)
    means = [(1 + 12) / 4, (1 + 12 + 14) / 6]
    expected = [(x[:, 0] - m) / w.sum() for m, w in zip(means, weights, strict=True)]
    for outcome in (
        jax.jit(jax.vmap(gradient, (0, None)))(weights, x),
        [slope(w, x) for w in weights],
    ):
        np.testing.assert_allclose(outcome, expected, rtol=1e-6)
    assert slope(weights[0], x.at[2].set(jnp.nan))[2] == 0
    assert np.all(slope(jnp.zeros(3), x) == 0)


def test_gradients_of_huge_and_tiny_rows():
    """The squares leave the range of floats, the unit vectors do not."""
    x = jnp.array([[3e30, 4e30], [3e-30, 4e-30], [3e38, 0.0]])
    slope = jax.jit(jax.grad(lambda x: moments.row_norms(x).sum()))
    np.testing.assert_allclose(slope(x), [[0.6, 0.8], [0.6, 0.8], [1.0, 0.0]], rtol=1e-6)
    assert np.all(slope(x.at[0].set(jnp.inf))[0] == 0)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
def test_inverse_power(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        limits = jnp.finfo(dtype)
        x = jnp.array([1.0, 0.7, 3.0, float(limits.max), float(limits.tiny)], dtype)
        function = jax.jit(moments.inverse_power)
        power = function(x)
        assert power.dtype == dtype
        product = np.asarray(power, np.float64) * np.asarray(x, np.float64)
        assert np.all(np.frexp(np.asarray(power, np.float64))[0] == 0.5)
        assert np.all((product[:3] >= 0.5) & (product[:3] <= 1.0))
        assert np.all((product >= 1 / 16) & (product <= 16))
        assert function(jnp.array([0.0, jnp.inf, jnp.nan, -1.0, 0.5], dtype)).tolist() == [1] * 5
        assert np.all(jax.jit(jax.grad(lambda x: moments.inverse_power(x).sum()))(x) == 0)


def test_root():
    x = jnp.array([0.0, 4.0, jnp.inf])
    assert root(x).tolist() == [0.0, 2.0, np.inf] and np.isnan(root(jnp.array([jnp.nan])))
    assert jax.vmap(jax.grad(root))(x).tolist() == [0.0, 0.25, 0.0]


@pytest.mark.parametrize("convention", ["text", "neurips"])
def test_z_max_of_arrays(convention):
    n, m = np.array([50, 50, 9, 3]), np.array([24, 10, 3, 1])
    s = n // 2 + 1 - m
    n_others = n - m if convention == "neurips" else n
    expected = norm.ppf((n_others - s) / n_others)
    rule = functools.partial(z_max, convention=convention)
    for function in (rule, jax.vmap(rule)):
        outcome = jax.jit(function)(n, m)
        np.testing.assert_allclose(outcome, expected, rtol=1e-5, atol=1e-6)

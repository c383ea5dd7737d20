"""Geometric median, centred clipping and sign votes against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

import fedjax_sec
from fedjax_sec.ops import iterative
from fedjax_sec.ops.signs import sign_votes

CLIENTS = pytest.mark.parametrize("num_clients", [1, 2, 3, 8, 51, 129])


def stack(num_clients, dim=37, seed=0):
    """Normal rows; a quarter of them far away."""
    rng = np.random.default_rng([seed, num_clients, dim])
    x = rng.normal(size=(num_clients, dim))
    x[: (num_clients - 1) // 4] += 100.0
    return x.astype(np.float32)


def with_bad_rows(x):
    """Two more rows, of NaN and infinity, and the mask of the others."""
    bad = np.stack([np.full(x.shape[1], v, np.float32) for v in (np.nan, np.inf)])
    rows = np.concatenate([bad[:1], x, bad[1:]])
    return jnp.asarray(rows), jnp.arange(len(rows)) % (len(rows) - 1) != 0


def np_weiszfeld(x, alpha, z, steps, nu):
    x, z = x.astype(np.float64), np.asarray(z, np.float64)
    beta = np.zeros(len(x))
    for _ in range(steps):
        beta = alpha / np.maximum(np.linalg.norm(x - z, axis=1), nu)
        z = beta @ x / beta.sum()
    return z, beta / max(beta.sum(), 1e-300)


def np_centered_clip(x, v, steps, tau):
    x, v = x.astype(np.float64), np.asarray(v, np.float64)
    for _ in range(steps):
        difference = x - v
        factor = np.minimum(1, tau / np.maximum(np.linalg.norm(difference, axis=1), 1e-300))
        v = v + np.mean(factor[:, None] * difference, axis=0)
    return v, factor


@pytest.mark.slow
@CLIENTS
@pytest.mark.parametrize("steps", [1, 4, 30])
def test_geometric_median_equals_weiszfeld(num_clients, steps):
    x = stack(num_clients)
    rows, valid = with_bad_rows(x)
    alpha = np.arange(1, num_clients + 1, dtype=np.float32)
    weights = jnp.zeros(len(rows)).at[1:-1].set(alpha)
    start = np.full(x.shape[1], 0.3, np.float32)
    z, share = jax.jit(iterative.geometric_median, static_argnums=3)(
        rows, weights, jnp.asarray(start), steps, 1e-3
    )
    expected, expected_share = np_weiszfeld(x, alpha, start, steps, 1e-3)
    np.testing.assert_allclose(z, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(share[1:-1], expected_share, rtol=1e-3, atol=1e-6)
    assert share[0] == 0 and share[-1] == 0 and bool(valid.sum() == num_clients)


def test_geometric_median_is_where_unit_vectors_cancel():
    x = stack(9, dim=5)
    z, _ = iterative.geometric_median(jnp.asarray(x), jnp.ones(9), jnp.zeros(5), 300, 1e-6)
    difference = x - np.asarray(z)
    forces = difference / np.linalg.norm(difference, axis=1, keepdims=True)
    assert np.abs(forces.sum(0)).max() < 1e-3
    best = optimize.minimize(lambda z: np.linalg.norm(x - z, axis=1).sum(), np.zeros(5))
    np.testing.assert_allclose(z, best.x, atol=1e-3)


def test_few_steps_from_the_median_withstand_a_huge_row():
    x = stack(9)
    huge = x.copy()
    huge[0] = 1e30
    honest = np.median(x[1:], axis=0)
    defense = {"name": "geometric_median", "weighted": False, "start": "median"}
    for rows in (x, huge):
        result = fedjax_sec.aggregate(rows, defense)
        assert np.linalg.norm(result - honest) < np.linalg.norm(x[1:] - honest, axis=1).max()


def test_geometric_median_of_equal_rows_is_that_row():
    x = jnp.full((5, 3), 7.0)
    for start in ("mean", "median", "zero"):
        result = fedjax_sec.aggregate(x, {"name": "geometric_median", "start": start})
        np.testing.assert_allclose(result, 7.0, rtol=1e-6)


@CLIENTS
@pytest.mark.parametrize("tau", [0.5, 7.0, 1e6])
def test_centered_clip_equals_numpy(num_clients, tau):
    x = stack(num_clients)
    rows, valid = with_bad_rows(x)
    start = np.full(x.shape[1], 0.3, np.float32)
    v, factor = jax.jit(iterative.centered_clip, static_argnums=3)(
        rows, valid, jnp.asarray(start), 3, tau
    )
    expected, expected_factor = np_centered_clip(x, start, 3, tau)
    np.testing.assert_allclose(v, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(factor[1:-1], expected_factor, rtol=1e-4)
    assert factor[0] == 0 and factor[-1] == 0


def test_centered_clipping_moves_at_most_its_radius_whatever_one_row_holds():
    x = np.zeros((4, 6), np.float32)
    for value in (1e3, 1e30, 1e37):
        x[0, 0] = value
        result = fedjax_sec.aggregate(x, {"name": "centered_clipping", "radius": 2.0})
        np.testing.assert_allclose(result, [0.5, 0, 0, 0, 0, 0], rtol=1e-5)


@pytest.mark.slow
def test_centered_clipping_starts_from_the_last_aggregate():
    start = {"name": "centered_clipping", "radius": 0.05}
    client = {"name": "sgd", "steps": 1, "batch_size": 9}
    base = {"rounds": 3, "client": client, "data": {"num_clients": 5, "max_train": 43}}
    previous = fedjax_sec.run(base | {"defense": start, "evaluation": {"every": 1}})
    zero = fedjax_sec.run(base | {"defense": start | {"start": "zero"}, "evaluation": {"every": 1}})
    assert np.all(zero.metrics["aggregate_norm"][1:] <= 0.05 + 1e-6)
    assert previous.metrics["aggregate_norm"][-1] > 0.06  # the centre has moved


@CLIENTS
@pytest.mark.parametrize("dim", [1, 37, 9001])
def test_sign_votes(num_clients, dim):
    rng = np.random.default_rng(num_clients)
    x = (rng.integers(-2, 3, size=(num_clients, dim)) * 1e-20).astype(np.float32)
    rows, valid = with_bad_rows(x)
    votes = jax.jit(sign_votes)(rows, valid)
    np.testing.assert_array_equal(votes, np.sign(x).sum(0))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_dtypes_are_kept(dtype):
    x = jnp.asarray(stack(8), dtype)
    ones = jnp.ones(8, dtype)
    zero = jnp.zeros(37, dtype)
    for result in (
        iterative.geometric_median(x, ones, zero, 3, 1e-3)[0],
        iterative.centered_clip(x, jnp.ones(8, bool), zero, 3, 1.0)[0],
        sign_votes(x, jnp.ones(8, bool)),
    ):
        assert result.dtype == dtype and bool(jnp.all(jnp.isfinite(result)))


def test_vmap_is_a_loop():
    x = jnp.stack([stack(8, seed=s) for s in range(3)])
    valid = jnp.arange(24).reshape(3, 8) % 5 != 0
    for rule in (
        lambda x, v: iterative.geometric_median(x, v.astype(jnp.float32), x[0], 3)[0],
        lambda x, v: iterative.centered_clip(x, v, x[0], 3, 2.0)[0],
        sign_votes,
    ):
        together = jax.jit(jax.vmap(rule))(x, valid)
        one = jax.jit(rule)
        for s in range(3):
            np.testing.assert_allclose(together[s], one(x[s], valid[s]), rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_updates():
    x = jnp.asarray(stack(5))

    def norm(x):
        z, _ = iterative.geometric_median(x, jnp.ones(5), jnp.zeros(37), 3)
        return jnp.sum(z**2)

    direction = jnp.asarray(stack(5, seed=1))
    slope = (norm(x + 1e-2 * direction) - norm(x - 1e-2 * direction)) / 2e-2
    np.testing.assert_allclose(jnp.vdot(jax.grad(norm)(x), direction), slope, rtol=1e-2)

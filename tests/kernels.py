"""Every kernel on ``[K, D]`` with its plain version and what is differentiable of it."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from fedjax_sec.ops import coordinatewise, distances, iterative, moments, reference, signs, sorting


class Kernel(NamedTuple):
    """`call(ops, x, valid)` runs a kernel, or its plain version where `ops` is `reference`.

    `smooth` picks the results that have a gradient, None where there is none. With `pairwise`, x
    holds distances between clients instead of their updates.
    """

    module: object
    call: Callable
    smooth: Callable | None = lambda out: out
    pairwise: bool = False

    def run(self, x, valid):
        return self.call(self.module, x, valid)

    def plain(self, x, valid):
        return self.call(reference, x, valid)


def example(kernel, num_clients, dim=37, kind="normal", seed=0, invalid=(1, 2)):
    """Inputs of a kernel in float64: x, whose invalid rows hold NaN (none of fewer than four)."""
    rng = np.random.default_rng([seed, num_clients, dim])
    x = rng.normal(size=(num_clients, num_clients if kernel.pairwise else dim))
    x = rng.integers(-2, 3, size=x.shape).astype(float) if kind == "ties" else x
    x = x[:1] + 0 * x if kind == "equal" else x
    x = 0 * x if kind == "zero" else x
    valid = ~np.isin(np.arange(num_clients), invalid) | (num_clients < 4)
    if kernel.pairwise:
        x = np.abs(x + x.T) * (kind != "equal")
        np.fill_diagonal(x, 0.0)
        x[:, ~valid] = np.inf
    x[~valid] = np.inf if kernel.pairwise else np.nan
    return x, valid


def blank(x, valid):
    return jnp.where(valid[:, None], x, 0.0)


def weights(x, valid):
    return jnp.where(valid, 1.0 + jnp.arange(len(valid)), 0.0).astype(x.dtype)


def true_squares(ops, x, valid):
    squares, scale = ops.squared_distances(x, valid)
    return squares / scale**2


def start(x):
    return jnp.linspace(-0.5, 0.5, x.shape[1]).astype(x.dtype)


def first(out):
    return out[0]


def num_drop(x):
    return 2 * (x.shape[0] // 4)


KERNELS = {
    "sort_clients": Kernel(sorting, lambda ops, x, v: ops.sort_clients(blank(x, v))),
    "median": Kernel(coordinatewise, lambda ops, x, v: ops.median(x, v), first),
    "trimmed_mean": Kernel(
        coordinatewise, lambda ops, x, v: ops.trimmed_mean(x, v, x.shape[0] // 4), first
    ),
    "mean_near_median": Kernel(
        coordinatewise, lambda ops, x, v: ops.mean_near_median(x, v, num_drop(x)), first
    ),
    "kmeans_mean": Kernel(coordinatewise, lambda ops, x, v: ops.kmeans_mean(x, v, 1.0), first),
    "weighted_mean": Kernel(moments, lambda ops, x, v: ops.weighted_mean(x, weights(x, v))),
    "mean_and_std": Kernel(moments, lambda ops, x, v: ops.mean_and_std(x, v, 1)),
    "row_norms": Kernel(moments, lambda ops, x, v: ops.row_norms(blank(x, v))),
    "finite_rows": Kernel(moments, lambda ops, x, v: ops.finite_rows(x), None),
    "sign_votes": Kernel(signs, lambda ops, x, v: ops.sign_votes(x, v), None),
    "squared_distances": Kernel(distances, true_squares),
    "cosine_similarities": Kernel(distances, lambda ops, x, v: ops.cosine_similarities(x, v)),
    "cosines_to": Kernel(distances, lambda ops, x, v: ops.cosines_to(x, start(x), v)),
    "krum_scores": Kernel(
        distances, lambda ops, x, v: ops.krum_scores(x, v, x.shape[0] // 2), pairwise=True
    ),
    "krum_scores_unsquared": Kernel(
        distances, lambda ops, x, v: ops.krum_scores(x, v, x.shape[0] // 2, False), pairwise=True
    ),
    "krum_sequence": Kernel(
        distances,
        lambda ops, x, v: ops.krum_sequence(x, v, min(len(v), 4), 3, lambda n: n - 2),
        None,
        pairwise=True,
    ),
    "distances_from": Kernel(
        iterative, lambda ops, x, v: ops.distances_from(blank(x, v), start(x))
    ),
    "geometric_median": Kernel(
        iterative, lambda ops, x, v: ops.geometric_median(x, weights(x, v), start(x), 3, 1e-3)
    ),
    "centered_clip": Kernel(
        iterative,
        lambda ops, x, v: ops.centered_clip(x, v, start(x), 3, 4.0),
    ),
}

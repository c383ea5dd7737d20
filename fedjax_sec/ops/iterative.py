"""Robust centres that are found by iterating over the stack: geometric median, centred clipping.

Both need only distances from a moving centre and weighted means, two passes over the stack in every
iteration. Inner products of all pairs would give the distances without further passes, but lose
them to cancellation as soon as one row is far away.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from fedjax_sec.ops.backend import on_cpu
from fedjax_sec.ops.moments import inverse_power, one_pass_norms, unit_rows, wide_weighted_mean
from fedjax_sec.ops.precision import wide


def distances_from(updates: Float[Array, "K D"], center: Float[Array, " D"]) -> Float[Array, " K"]:
    """Euclidean distance of every client's update from one point.

    As `moments.row_norms` of the differences, also where their squares leave the range of floats,
    but without writing the differences down. The gradient is zero for a row that is the point, or
    is not finite. The result has the wider of the two types.

    >>> x = jnp.array([[3.0, 4.0], [0.0, 0.0], [3e30, 4e30]])
    >>> distances_from(x, jnp.zeros(2)).tolist()[:2]
    [5.0, 0.0]
    """
    distance = _distances_from(updates, center.astype(wide(center.dtype)))
    return distance.astype(jnp.result_type(updates, center))


@jax.custom_jvp
def _distances_from(updates, center):
    if not on_cpu():
        return one_pass_norms(updates - center[None, :])
    squares = jnp.sum((updates - center[None, :]) ** 2, axis=1)
    limits = jnp.finfo(squares.dtype)

    def rescaled():
        difference = updates - center[None, :]
        scale = inverse_power(jnp.max(jnp.abs(difference), axis=1))
        return jnp.sqrt(jnp.sum((difference * scale[:, None]) ** 2, axis=1)) / scale

    in_range = ((squares > limits.tiny / limits.eps) & (squares < jnp.inf)) | (squares == 0)
    # A square that underflowed is zero too, but then a rescaled distance would be below 1e-19.
    return lax.cond(jnp.all(in_range), lambda: jnp.sqrt(squares), rescaled)


@_distances_from.defjvp
def _(primals, tangents):
    # Rows that do not take part may hold NaN, which must not reach the gradient of the others.
    distance = _distances_from(*primals)
    unit = unit_rows(primals[0] - primals[1][None, :], distance)
    return distance, jnp.sum(unit * (tangents[0] - tangents[1][None, :]), axis=1)


def geometric_median(
    updates: Float[Array, "K D"],
    weights: Float[Array, " K"],
    start: Float[Array, " D"],
    num_iterations: int,
    smoothing: float | Float[Array, ""] = 1e-6,
    measured: slice = slice(None),
) -> tuple[Float[Array, " D"], Float[Array, " K"]]:
    r"""The smoothed Weiszfeld iteration towards the geometric median.

    .. math:: \beta_i = \frac{\alpha_i}{\max(\nu, \|u_i - z\|)}, \qquad
              z \leftarrow \frac{\sum_i \beta_i u_i}{\sum_i \beta_i}

    which lowers ``sum_i alpha_i |u_i - z|`` in every step (up to the smoothing).

    Args:
        updates: stack of client updates; rows of weight zero may hold anything.
        weights: alpha, non-negative.
        start: z before the first iteration.
        num_iterations: passes; each reads the stack twice.
        smoothing: nu, the distance below which a client's influence grows no further.
        measured: the columns over which distances are taken; the others follow their weights.

    Returns:
        z, and each client's share of it, ``beta_i / sum beta`` (zeros without any iteration).

    Source: Pillutla, Kakade and Harchaoui 2019, arXiv:1912.13445, Algorithm 2.

    >>> x = jnp.array([[0.0], [1.0], [100.0]])
    >>> z, _ = geometric_median(x, jnp.ones(3), jnp.zeros(1), 50)
    >>> print(f"{z[0]:.3f}")
    1.000
    """
    dtype = wide(updates.dtype)
    alpha = weights.astype(dtype)
    used = alpha > 0

    def step(_, state):
        center, _ = state
        distance = distances_from(updates[:, measured], center[measured])
        distance = jnp.where(used, distance, 1.0)
        influence = jnp.where(used, alpha / jnp.maximum(distance, smoothing), 0.0)
        influence = influence * inverse_power(jnp.max(influence))
        share = influence / jnp.maximum(influence.sum(), jnp.finfo(influence.dtype).tiny)
        return wide_weighted_mean(updates, influence), share

    state = (start.astype(dtype), jnp.zeros_like(alpha))
    center, share = lax.fori_loop(0, num_iterations, step, state)
    return center.astype(updates.dtype), share.astype(weights.dtype)


def centered_clip(
    updates: Float[Array, "K D"],
    valid: Bool[Array, " K"],
    start: Float[Array, " D"],
    num_iterations: int,
    radius: float | Float[Array, ""],
    measured: slice = slice(None),
) -> tuple[Float[Array, " D"], Float[Array, " K"]]:
    r"""Moves a centre by the mean of the differences from it, each clipped to `radius`.

    .. math:: v \leftarrow v + \frac{1}{n} \sum_i (u_i - v) \min(1, \tau / \|u_i - v\|)

    Args:
        updates: stack of client updates; invalid rows may hold anything.
        valid: the n rows that take part.
        start: v before the first iteration.
        num_iterations: passes; each reads the stack twice.
        radius: tau.
        measured: the columns over which distances are taken; the others follow their factors.

    Returns:
        v, and each client's last factor ``min(1, tau / |u_i - v|)`` (zeros for invalid rows).

    Source: Karimireddy, He and Jaggi 2021, arXiv:2012.10333, Algorithm 2.

    >>> x = jnp.array([[1.0], [3.0], [1000.0]])
    >>> v, _ = centered_clip(x, jnp.ones(3, bool), jnp.zeros(1), 1, 3.0)
    >>> print(f"{v[0]:.3f}")
    2.333
    """
    dtype = wide(updates.dtype)
    count = jnp.maximum(valid.sum(), 1).astype(dtype)

    def step(_, state):
        center, _ = state
        distance = distances_from(updates[:, measured], center[measured])
        distance = jnp.where(valid, distance, 1.0)
        # Not tau / distance: XLA divides by a huge number as a product with its reciprocal, zero.
        # A factor below 1e-38 is zero all the same; such a row then has no influence.
        scale = inverse_power(distance)
        factor = jnp.minimum(1.0, radius * scale / jnp.maximum(distance * scale, 1e-6))
        factor = jnp.where(valid, factor, 0.0)
        total = factor.sum()
        moved = wide_weighted_mean(updates, factor) * (total / count)
        return center * (1.0 - total / count) + moved, factor

    state = (start.astype(dtype), jnp.zeros(valid.shape, dtype))
    center, factor = lax.fori_loop(0, num_iterations, step, state)
    return center.astype(updates.dtype), factor.astype(updates.dtype)

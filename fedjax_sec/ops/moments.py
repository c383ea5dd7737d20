"""Means, standard deviations and norms of client updates."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from fedjax_sec.ops.backend import on_cpu
from fedjax_sec.ops.precision import root, wide
from fedjax_sec.ops.sorting import map_columns, map_columns_pair, split_rows, tree_sum, unrolled


def inverse_power(magnitude: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """A power of two near ``1 / magnitude``, or one where that is zero or not finite.

    Multiplying by it is exact. Dividing by a huge number is not: XLA multiplies by the reciprocal
    instead, which beyond 8e37 is flushed to zero.

    >>> inverse_power(jnp.array([0.75, 3.0, 0.0])).tolist()
    [1.0, 0.25, 1.0]
    """
    limit = jnp.finfo(magnitude.dtype).maxexp - 3
    usable = jnp.isfinite(magnitude) & (magnitude > 0)
    _, exponent = jnp.frexp(jnp.where(usable, magnitude, 0.5))
    return jnp.ldexp(jnp.ones_like(magnitude), -jnp.clip(exponent, -limit, limit))


def weighted_mean(updates: Float[Array, "K D"], weights: Float[Array, " K"]) -> Float[Array, " D"]:
    """Weighted mean of the clients, ``sum_i w_i u_i / sum_i w_i``.

    Rows of weight zero do not take part, whatever they hold. Weights are normalised before they
    are multiplied, so huge finite rows do not overflow. Zero when all weights are zero. The
    derivative by the weight of a row is taken at zero too, as long as the row is finite.

    Args:
        updates: stack of client updates.
        weights: non-negative and finite, of any scale.

    >>> x = jnp.array([[0.0, 2.0], [4.0, 6.0], [jnp.nan, jnp.inf]])
    >>> weighted_mean(x, jnp.array([1.0, 3.0, 0.0])).tolist()
    [3.0, 5.0]
    """
    return wide_weighted_mean(updates, weights).astype(updates.dtype)


def _normalised(weights):
    scale = inverse_power(jnp.max(jnp.abs(weights)))
    weights = weights * scale
    total = weights.sum()
    return weights / jnp.where(total != 0, total, 1.0), scale, total


@jax.custom_jvp
def wide_weighted_mean(
    updates: Float[Array, "K D"], weights: Float[Array, " K"]
) -> Float[Array, " D"]:
    """`weighted_mean` before it is rounded to half precision: in at least float32.

    >>> wide_weighted_mean(jnp.ones((2, 1), jnp.bfloat16), jnp.array([1.0, 3.0]))
    Array([1.], dtype=float32)
    """
    dtype = wide(updates.dtype)
    weights, _, _ = _normalised(weights.astype(dtype))

    used = weights != 0
    if not on_cpu():  # one pass of the stack; a product would need a blanked copy, or a condition
        rows = jnp.where(used[:, None], updates, 0).astype(dtype)
        return jnp.sum(weights[:, None] * rows, axis=0)

    def product(rows):
        return jnp.dot(weights, rows.astype(dtype), precision=lax.Precision.HIGHEST)

    def dot(rows):
        # Half precision is widened block by block; at once it would be a second, larger stack.
        return product(rows) if rows.dtype == dtype else map_columns(product, rows)

    # Blanking rows copies the whole stack, which costs more than the product itself.
    return lax.cond(
        jnp.all(used), dot, lambda rows: dot(jnp.where(used[:, None], rows, 0.0)), updates
    )


@wide_weighted_mean.defjvp
def _(primals, tangents):
    # Written out because `vmap` turns the condition into a choice between both branches, of which
    # the one that does not blank would spoil the gradient: NaN times zero.
    updates, weights = primals
    mean = wide_weighted_mean(updates, weights)
    move, reweight = (tangent.astype(mean.dtype) for tangent in tangents)
    share, scale, total = _normalised(weights.astype(mean.dtype))
    rows = jnp.where(jnp.isfinite(updates), updates - mean[None, :], 0.0)
    change = jnp.where(total != 0, reweight * scale / jnp.where(total != 0, total, 1.0), 0.0)
    return mean, (
        jnp.dot(share, move, precision=lax.Precision.HIGHEST)
        + jnp.dot(change, rows, precision=lax.Precision.HIGHEST)
    )


def finite_rows(updates: Float[Array, "K D"]) -> Bool[Array, " K"]:
    """Which clients' updates hold neither NaN nor infinity.

    >>> finite_rows(jnp.array([[1.0, 1e30], [jnp.nan, 0.0], [jnp.inf, 0.0]])).tolist()
    [True, False, False]
    """
    if not on_cpu():  # no condition there: the host would wait for it
        return jnp.isfinite(updates).all(axis=1)
    # A finite sum proves it, and as a product with ones it runs at the speed of memory; where
    # huge rows overflow the exact test follows.
    ones = jnp.ones(updates.shape[1], updates.dtype)
    sums = jnp.isfinite(jnp.dot(updates, ones, preferred_element_type=wide(updates.dtype)))
    return lax.cond(
        jnp.all(sums), lambda rows: sums, lambda rows: jnp.isfinite(rows).all(axis=1), updates
    )


def usable_rows(updates: Float[Array, "K D"]) -> Bool[Array, " K"]:
    """Which rows' squares are finite, with room for a sum over all rows.

    One client with NaN, infinity or numbers beyond 1e18 would otherwise spoil every statistic that
    an attack is made from, and the server would leave out what it sends.

    >>> usable_rows(jnp.array([[1.0, 2.0], [jnp.nan, 0.0], [1e30, 0.0]])).tolist()
    [True, False, False]
    """
    dtype = wide(updates.dtype)
    squares = jnp.sum(jnp.square(updates.astype(dtype)), axis=1)
    return squares < jnp.finfo(dtype).max / (4 * updates.shape[0])


def differs_in_rows(
    one: Float[Array, "K D"], other: Float[Array, "K D"], rows: Bool[Array, " K"]
) -> Bool[Array, ""]:
    """Whether the stacks differ in any of these rows; NaN differs from everything.

    On a CPU it stops at the first row that differs, so it costs a pass over all of them only where
    none does.

    >>> x = jnp.array([[1.0], [2.0]])
    >>> bool(differs_in_rows(x, x + 1, jnp.array([True, False])))
    True
    >>> bool(differs_in_rows(x, x.at[0].set(9.0), jnp.array([False, True])))
    False
    """
    if not on_cpu():  # a loop that the host decides would take longer than the pass
        return jnp.any((one != other) & rows[:, None])
    order = jnp.argsort(~rows, stable=True)

    def searching(carry):
        place, differs = carry
        return ~differs & (place < rows.sum())

    def compare(carry):
        place, _ = carry
        row = order[place]
        return place + 1, jnp.any(one[row] != other[row])

    return lax.while_loop(searching, compare, (0, jnp.array(False)))[1]


def mean_and_std(
    updates: Float[Array, "K D"], mask: Bool[Array, " K"], ddof: int = 0
) -> tuple[Float[Array, " D"], Float[Array, " D"]]:
    """Mean and standard deviation of every coordinate over the rows where `mask` is true.

    ``std = sqrt(sum (u - mean)^2 / max(n - ddof, 1))`` in two passes, corrected for the rounding
    of the mean (Chan, Golub and LeVeque 1983, equation 1.7). Squares overflow beyond 1e19. Where
    the deviation is zero, so is its gradient.

    Args:
        updates: stack of client updates; rows outside the mask may hold anything.
        mask: rows that take part; none gives zeros.
        ddof: subtracted from the number of rows; 1 for the unbiased variance.

    >>> x = jnp.array([[1.0], [3.0], [jnp.nan]])
    >>> mean, std = mean_and_std(x, jnp.array([True, True, False]))
    >>> mean.tolist(), std.tolist()
    ([2.0], [1.0])
    """
    dtype = wide(updates.dtype)
    n = mask.sum()
    count = jnp.maximum(n, 1).astype(dtype)
    freedom = jnp.maximum(n - ddof, 1).astype(dtype)

    def block_rule(block):
        block = block.astype(dtype)
        if on_cpu() and unrolled(block.shape[0]):
            # One elementwise loop over the rows; XLA's column reductions are slow on CPU.
            terms = [(mask[i], row) for i, row in enumerate(split_rows(block))]
            mean = tree_sum([jnp.where(m, row / count, 0.0) for m, row in terms])
            deviations = [jnp.where(m, row - mean, 0.0) for m, row in terms]
            error = tree_sum(deviations)
            square = tree_sum([d * d for d in deviations])
        else:
            mean = jnp.where(mask[:, None], block / count, 0.0).sum(axis=0, keepdims=True)
            deviation = jnp.where(mask[:, None], block - mean, 0.0)
            error = deviation.sum(axis=0, keepdims=True)
            square = (deviation * deviation).sum(axis=0, keepdims=True)
        variance = jnp.maximum(square - error * error / count, 0.0) / freedom
        return mean + error / count, root(variance)

    mean, std = map_columns_pair(block_rule, updates)
    return mean[0].astype(updates.dtype), std[0].astype(updates.dtype)


def row_norms(updates: Float[Array, "K D"]) -> Float[Array, " K"]:
    """Euclidean norm of every client's update, ``|c u| / c``.

    With c a power of two, which keeps squares of huge (1e30) and tiny (1e-30) values in range. A
    row with NaN or infinity has norm NaN or infinity. The gradient ``u / |u|`` is zero for a row
    that is zero or not finite.

    >>> row_norms(jnp.array([[3.0, 4.0], [3e30, 4e30], [0.0, 0.0]])).tolist()[::2]
    [5.0, 0.0]
    """
    return _row_norms(updates).astype(updates.dtype)


@jax.custom_jvp
def _row_norms(updates):
    rows = updates.astype(wide(updates.dtype))
    if not on_cpu():
        return one_pass_norms(rows)
    squares = jnp.sum(rows * rows, axis=1)
    limits = jnp.finfo(squares.dtype)

    def rescaled():
        largest = jnp.maximum(jnp.max(updates, axis=1), -jnp.min(updates, axis=1))
        largest = largest.astype(squares.dtype)
        scale = inverse_power(largest)
        return jnp.sqrt(jnp.sum((updates * scale[:, None]) ** 2, axis=1)) / scale

    # The second pass is four times as expensive and rarely needed.
    in_range = (squares > limits.tiny / limits.eps) & (squares < jnp.inf)
    return lax.cond(jnp.all(in_range), lambda: jnp.sqrt(squares), rescaled)


@_row_norms.defjvp
def _(primals, tangents):
    norms = _row_norms(*primals)
    return norms, jnp.sum(unit_rows(primals[0], norms) * tangents[0], axis=1)


def one_pass_norms(rows: Float[Array, "K D"]) -> Float[Array, " K"]:
    """Euclidean norms of rows of any magnitude in one pass, without a condition.

    Squares of huge, of tiny and of all other numbers are added up apart, the first two scaled into
    range by a power of two; of the three sums the largest kind that occurs decides. NaN and
    infinity give themselves.

    Source: Blue 1978, A portable Fortran program to find the Euclidean norm of a vector, ACM TOMS
    4(1); the limits as in Anderson 2017, Algorithm 978, ACM TOMS 44(1).

    >>> one_pass_norms(jnp.array([[3e30, 4e30], [3e-30, 4e-30], [3.0, 4.0]])).tolist()[2]
    5.0
    """
    info = jnp.finfo(rows.dtype)
    digits = info.nmant + 1
    small = 2.0 ** math.ceil((info.minexp - 1) / 2)
    big = 2.0 ** math.floor((info.maxexp - digits + 1) / 2)
    grow = 2.0 ** -math.floor((info.minexp - digits) / 2)
    shrink = 2.0 ** -math.ceil((info.maxexp + digits - 1) / 2)
    size = jnp.abs(rows)
    is_big, is_small = size > big, size < small
    zero = jnp.zeros((), rows.dtype)
    terms = (
        jnp.where(is_big, jnp.square(rows * shrink), 0),
        jnp.where(is_big | is_small, 0, jnp.square(rows)),
        jnp.where(is_small, jnp.square(rows * grow), 0),
    )

    def add(one, other):
        return tuple(a + b for a, b in zip(one, other, strict=True))

    huge, usual, tiny = lax.reduce(terms, (zero, zero, zero), add, (1,))
    with_huge = jnp.sqrt(huge + (usual * shrink) * shrink) / shrink
    usual, tiny = jnp.sqrt(usual), jnp.sqrt(tiny) / grow
    return jnp.where(huge > 0, with_huge, jnp.where(usual == 0, tiny, jnp.hypot(usual, tiny)))


def unit_rows(rows: Float[Array, "K D"], norms: Float[Array, " K"]) -> Float[Array, "K D"]:
    """``u_i / |u_i|``, the derivative of the norm; zero where the norm is zero or not finite.

    >>> unit_rows(jnp.array([[3.0], [0.0]]), jnp.array([3.0, 0.0])).tolist()
    [[1.0], [0.0]]
    """
    usable = (norms > 0) & jnp.isfinite(norms)
    scale = inverse_power(norms)
    unit = rows * scale[:, None] / jnp.where(usable, norms * scale, 1.0)[:, None]
    return jnp.where(usable[:, None], unit, 0.0)

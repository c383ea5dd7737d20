"""Robust estimates of location, coordinate by coordinate, over the valid clients.

Every rule sorts a block of columns and reduces it at once (see `sorting`; over many clients it
selects instead, see `selection`), and returns ``(aggregate [D], kept [K])``. ``kept[i]`` is the
share of coordinates in which the value of client i took part, counted by value: it lies between
the lowest and the highest value that the rule used in that coordinate, so clients that tie count
alike. With ``with_kept=False`` it is None and costs nothing.

No rule subtracts a value after having added it: a finite but huge malicious value (1e30) that
enters a float32 sum cannot be taken out again. Half precision is sorted as it is and averaged in
float32.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from fedjax_sec.ops.precision import wide
from fedjax_sec.ops.selection import order_statistic
from fedjax_sec.ops.sorting import (
    map_columns,
    map_columns_pair,
    selects,
    sort_block,
    sort_chunk,
    sorted_rows,
    tree_sum,
    unrolled,
)

#: Most rows for which `mean_near_median`, the longest rule, is one loop unless `lean`.
MAX_NEAR_COMPARED = 64


class _Sorted:
    """The sorted rows of a block, written so that a rule over them stays one loop on CPU and GPU.

    There a list of rows and trees of elementwise operations, as `sorted_rows` asks; elsewhere
    plain array operations. `n` is the number of valid rows, which come first. One value a column
    is an array ``[1, C]``. `lean`: see `sorted_rows`.
    """

    def __init__(self, block: Float[Array, "K C"], valid: Bool[Array, " K"], lean: bool = False):
        block = jnp.where(valid[:, None], block, jnp.inf)
        self.n = valid.sum()
        self.num_rows = block.shape[0]
        self.dtype = wide(block.dtype)
        self.unrolled = unrolled(self.num_rows)
        if self.unrolled:
            self.rows = [row.astype(self.dtype) for row in sorted_rows(block, lean)]
        else:
            self.block = sort_block(block).astype(self.dtype)

    def row(self, index: Int[Array, ""] | Int[Array, "1 C"]) -> Float[Array, "1 C"]:
        """``v[index]``, where index may be traced and differ between columns."""
        index = jnp.clip(index, 0, self.num_rows - 1)
        if not self.unrolled:
            if index.ndim == 0:
                return lax.dynamic_slice_in_dim(self.block, index, 1, axis=0)
            return jnp.take_along_axis(self.block, index, axis=0)
        rows, bit = self.rows, 0
        while len(rows) > 1:
            rows = rows + rows[-1:] if len(rows) % 2 else rows
            odd = (index >> bit) & 1 == 1
            rows = [jnp.where(odd, b, a) for a, b in zip(rows[::2], rows[1::2], strict=True)]
            bit += 1
        return rows[0]

    def window(self, start: Int[Array, ""], size: int) -> list[Float[Array, "1 C"]] | Array:
        """``v[start : start + size]``, size static, start traced but the same for all columns."""
        if not self.unrolled:
            return lax.dynamic_slice_in_dim(self.block, start, size, axis=0)
        rows = self.rows
        for bit in reversed(range(self.num_rows.bit_length())):
            shift = 1 << bit
            need = min(size + shift - 1, self.num_rows)
            moved = (start >> bit) & 1 == 1
            last = len(rows) - 1
            rows = [jnp.where(moved, rows[min(i + shift, last)], rows[i]) for i in range(need)]
        return rows

    def middle(self) -> tuple[Float[Array, "1 C"], Float[Array, "1 C"]]:
        """The two middle values, equal when n is odd."""
        return self.row((self.n - 1) // 2), self.row(self.n // 2)

    def center(self) -> Float[Array, "1 C"]:
        """The median."""
        return _halfway(*self.middle())

    def mean(self, start: Array, stop: Array) -> Float[Array, "1 C"]:
        """Mean of ``v[start:stop]``; the bounds may be traced and differ between columns."""
        count = jnp.maximum(stop - start, 1).astype(self.dtype)
        if self.unrolled:
            kept = [(start <= r) & (r < stop) for r in range(self.num_rows)]
            terms = [jnp.where(k, v, 0.0) for k, v in zip(kept, self.rows, strict=True)]
            return tree_sum(terms) / count
        row = jnp.arange(self.num_rows)[:, None]
        kept = (start <= row) & (row < stop)
        return jnp.sum(jnp.where(kept, self.block, 0.0), axis=0, keepdims=True) / count

    def window_start(self, width: Array, num_drop: int) -> Int[Array, "1 C"]:
        """Where the `width` values nearest to the median start, ``n - width <= num_drop``."""
        center, high = self.center(), self.window(width, num_drop)
        if not isinstance(high, list):
            farther = center - self.block[:num_drop] > high - center
            below = jnp.arange(num_drop)[:, None] < self.n - width
            return jnp.sum(farther & below, axis=0, keepdims=True, dtype=jnp.int32)
        farther = [center - self.rows[s] > high[s] - center for s in range(num_drop)]
        dropped = [(f & (s < self.n - width)).astype(jnp.int32) for s, f in enumerate(farther)]
        return tree_sum(dropped)


class _Selected:
    """The same answers as `_Sorted` without sorting, for more clients than a network pays for.

    Each order statistic costs 16 passes over the block (see `selection`), so the time grows with
    K, not with K log2(K)^2, and compile time not at all.
    """

    def __init__(self, block: Float[Array, "K C"], valid: Bool[Array, " K"]):
        self.n = valid.sum()
        self.dtype = wide(block.dtype)
        self.values = jnp.where(valid[:, None], block.astype(self.dtype), jnp.inf)

    def row(self, index):
        return order_statistic(self.values, jnp.clip(index, 0, self.values.shape[0] - 1))

    def middle(self):
        low = self.row((self.n - 1) // 2)
        above = jnp.where(self.values > low, self.values, jnp.inf).min(axis=0, keepdims=True)
        return low, jnp.where(_count(self.values <= low) > self.n // 2, low, above)

    def center(self):
        return _halfway(*self.middle())

    def mean(self, start, stop):
        low, high = self.row(start), self.row(stop - 1)
        inner = jnp.where((low < self.values) & (self.values < high), self.values, 0.0)
        # Of the values that tie with an end, as many as lie within the bounds.
        low_count = (_count(self.values <= low) - start).astype(self.dtype)
        high_count = (stop - _count(self.values < high)).astype(self.dtype)
        total = inner.sum(axis=0, keepdims=True) + low * low_count + high * high_count
        return jnp.where(low == high, low, total / jnp.maximum(stop - start, 1).astype(self.dtype))

    def window_start(self, width, num_drop):
        center = self.center()
        distance, left = jnp.abs(self.values - center), self.values < center
        farthest = order_statistic(distance, width - 1)
        ties = _count(left & (distance == farthest))
        wanted = width - _count(distance < farthest)  # of two equally far the smaller is kept
        return _count(left & (distance > farthest)) + ties - jnp.minimum(ties, wanted)


def _count(chosen: Bool[Array, "K C"]) -> Int[Array, "1 C"]:
    return chosen.sum(axis=0, keepdims=True, dtype=jnp.int32)


def _ordered(
    block: Float[Array, "K C"], valid: Bool[Array, " K"], lean: bool = False
) -> _Sorted | _Selected:
    if selects(block.shape[0]):
        return _Selected(block, valid)
    return _Sorted(block, valid, lean)


def _blocks(updates: Float[Array, "K D"]) -> int | None:
    return None if unrolled(updates.shape[0]) else sort_chunk()


def _halfway(low: Array, high: Array) -> Array:
    # Where the two are equal also infinities, and numbers too small to halve, come out exact.
    return jnp.where(low == high, low, 0.5 * low + 0.5 * high)


def _shares(updates, valid, lowest, highest) -> Float[Array, " K"]:
    inside = (lowest[None, :] <= updates) & (updates <= highest[None, :]) & valid[:, None]
    # Not in half precision: in float16 more than 65504 coordinates are infinitely many.
    count = inside.sum(axis=1, dtype=jnp.int32).astype(wide(updates.dtype))
    return (count / max(updates.shape[1], 1)).astype(updates.dtype)


def _pair(rule, updates) -> tuple[Float[Array, " D"], Float[Array, " D"]]:
    low, high = map_columns_pair(rule, updates, chunk=_blocks(updates))
    return low[0], high[0]


def _finish(value: Float[Array, " D"], updates, valid) -> Float[Array, " D"]:
    return jnp.where(valid.any(), value, 0.0).astype(updates.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _between(value: Callable, extremes: Callable, updates, valid) -> Float[Array, " D"]:
    """``value(updates, valid)``, the mean of the values between ``extremes(updates, valid)``.

    Its derivative needs no sorting network: each of these values has the same share in it, those
    that tie with an end too.
    """
    return value(updates, valid)


@_between.defjvp
def _(value, extremes, primals, tangents):
    updates, valid = primals
    low, high = extremes(updates, valid)
    inside = (low[None] <= updates) & (updates <= high[None]) & valid[:, None]
    moved = jnp.where(inside, tangents[0], 0).astype(wide(updates.dtype)).sum(axis=0)
    slope = moved / jnp.maximum(inside.sum(axis=0), 1)
    return value(updates, valid), slope.astype(updates.dtype)


def _reduce(
    bounds: Callable[[_Sorted | _Selected], tuple[Array, Array]],
    updates: Float[Array, "K D"],
    valid: Bool[Array, " K"],
    with_kept: bool,
    lean: bool = False,
) -> tuple[Float[Array, " D"], Float[Array, " K"] | None]:
    """Mean of ``v[start:stop]`` of the sorted columns, with ``bounds(v) = (start, stop)``."""

    def mean(updates, valid):
        def rule(block):
            v = _ordered(block, valid, lean)
            return v.mean(*bounds(v))[0]

        return _finish(map_columns(rule, updates, chunk=_blocks(updates)), updates, valid)

    def extremes(updates, valid):
        def rule(block):
            v = _ordered(block, valid, lean)
            start, stop = bounds(v)
            return v.row(start), v.row(stop - 1)

        return _pair(rule, updates)

    value = _between(mean, extremes, updates, valid)
    if not with_kept:
        return value, None
    # Sorting a second time costs less on CPU than keeping the sorted rows.
    return value, _shares(updates, valid, *extremes(updates, valid))


def median(
    updates: Float[Array, "K D"],
    valid: Bool[Array, " K"],
    *,
    lower: bool = False,
    with_kept: bool = True,
) -> tuple[Float[Array, " D"], Float[Array, " K"] | None]:
    """Coordinate-wise median: the mean of the two middle values when their number is even.

    ``0.5 v[(n-1)//2] + 0.5 v[n//2]`` of the sorted valid values, which cannot overflow. Yin et
    al. 2018, Byzantine-Robust Distributed Learning, definition 1. ``kept[i]``: share of the
    coordinates where client i holds a middle value.

    Args:
        updates: stack of client updates.
        valid: rows that take part.
        lower: of two middle values take the smaller instead of their mean.
        with_kept: also compute the second result.

    >>> x = jnp.array([[0.0], [1.0], [5.0], [jnp.nan]])
    >>> value, kept = median(x, jnp.array([True, True, True, False]))
    >>> value.tolist(), kept.tolist()
    ([1.0], [0.0, 1.0, 0.0, 0.0])
    """
    if lower:

        def bounds(v):
            middle = jnp.maximum(v.n - 1, 0) // 2
            return middle, middle + 1

        return _reduce(bounds, updates, valid, with_kept)

    def center(updates, valid):
        chunk = _blocks(updates)
        value = map_columns(lambda block: _ordered(block, valid).center()[0], updates, chunk=chunk)
        return _finish(value, updates, valid)

    def middle(updates, valid):
        return _pair(lambda block: _ordered(block, valid).middle(), updates)

    value = _between(center, middle, updates, valid)
    if not with_kept:
        return value, None
    return value, _shares(updates, valid, *middle(updates, valid))


def trimmed_mean(
    updates: Float[Array, "K D"],
    valid: Bool[Array, " K"],
    num_trim: int,
    *,
    with_kept: bool = True,
) -> tuple[Float[Array, " D"], Float[Array, " K"] | None]:
    """Mean without the `num_trim` largest and the `num_trim` smallest values of a coordinate.

    ``mean(v[b : n-b])`` of the sorted valid values with ``b = min(num_trim, (n-1)//2)``. Yin et
    al. 2018, definition 2.

    Args:
        updates: stack of client updates.
        valid: rows that take part.
        num_trim: values removed at each end.
        with_kept: also compute the share of coordinates in which each client is not trimmed.

    >>> x = jnp.array([[0.0], [1.0], [3.0], [1e30]])
    >>> value, kept = trimmed_mean(x, jnp.ones(4, bool), 1)
    >>> value.tolist(), kept.tolist()
    ([2.0], [0.0, 1.0, 1.0, 0.0])
    """

    def bounds(v):
        trim = jnp.minimum(num_trim, jnp.maximum(v.n - 1, 0) // 2)
        return trim, v.n - trim

    return _reduce(bounds, updates, valid, with_kept)


def mean_near_median(
    updates: Float[Array, "K D"],
    valid: Bool[Array, " K"],
    num_drop: int,
    *,
    with_kept: bool = True,
) -> tuple[Float[Array, " D"], Float[Array, " K"] | None]:
    """Mean of the ``n - num_drop`` values of a coordinate that are nearest to its median.

    Of the sorted valid values v they form a window of length ``w = max(n - num_drop, 1)``. It
    starts at the number of ``s < n - w`` with ``median - v[s] > v[s+w] - median``; when two
    values are equally far from the median the smaller is kept. The mean-around-median of Xie et
    al. 2018 (Generalized Byzantine-tolerant SGD) and the last step of Bulyan (El Mhamdi et al.
    2018).

    Args:
        updates: stack of client updates.
        valid: rows that take part.
        num_drop: values dropped from a coordinate.
        with_kept: also compute the share of coordinates in which each client is kept.

    >>> x = jnp.array([[0.0], [1.0], [3.0], [1e30]])
    >>> value, kept = mean_near_median(x, jnp.ones(4, bool), 2)
    >>> value.tolist(), kept.tolist()
    ([2.0], [0.0, 1.0, 1.0, 0.0])
    """
    num_drop = min(num_drop, updates.shape[0] - 1)

    def bounds(v):
        width = jnp.maximum(v.n - num_drop, 1)
        if not num_drop:
            return jnp.int32(0), width
        start = v.window_start(width, num_drop)
        return start, start + width

    return _reduce(bounds, updates, valid, with_kept, lean=updates.shape[0] > MAX_NEAR_COMPARED)


def kmeans_mean(
    updates: Float[Array, "K D"],
    valid: Bool[Array, " K"],
    threshold: Float[Array, ""] | float,
    *,
    with_kept: bool = True,
) -> tuple[Float[Array, " D"], Float[Array, " K"] | None]:
    """Mean of the larger of two clusters of a coordinate, where the two lie far apart.

    The optimal 2-means split of the sorted valid values v: of ``v[:s]`` and ``v[s:]`` with means
    l and r, the s that maximises ``sqrt(s (n-s)) (r - l)``, the root of the sum of squares
    between clusters (first such s). Where ``r - l > threshold`` the smaller cluster is
    discarded; equal sizes, or closer centres, keep all. After AUROR, Shen et al. 2016, section
    4, which does so per indicative feature.

    Args:
        updates: stack of client updates.
        valid: rows that take part.
        threshold: distance of the two centres, in the unit of `updates`; may be traced.
        with_kept: also compute the share of coordinates in which each client is kept.

    >>> x = jnp.array([[0.0], [1.0], [2.0], [9.0]])
    >>> value, kept = kmeans_mean(x, jnp.ones(4, bool), 3.0)
    >>> value.tolist(), kept.tolist()
    ([1.0], [1.0, 1.0, 1.0, 0.0])
    """

    n = valid.sum()

    def rule(block):
        ordered = sort_block(jnp.where(valid[:, None], block, jnp.inf)).astype(wide(block.dtype))
        dtype, num_rows = ordered.dtype, ordered.shape[0]
        low = lax.dynamic_index_in_dim(ordered, jnp.maximum(n - 1, 0) // 2, 0, keepdims=False)
        high = lax.dynamic_index_in_dim(ordered, jnp.minimum(n // 2, num_rows - 1), 0, False)
        top = lax.dynamic_index_in_dim(ordered, jnp.maximum(n - 1, 0), 0, keepdims=False)
        center = _halfway(low, high)
        row = jnp.arange(num_rows)
        deviation = jnp.where(row[:, None] < n, ordered - center[None, :], 0.0)

        def add(total, values):
            return total + values, total + values

        # Sums are run from both ends: a difference of prefix sums would cancel.
        zero = jnp.zeros_like(center)
        total, right = lax.scan(add, zero, deviation, reverse=True)
        everything = total / jnp.maximum(n, 1).astype(dtype)

        def split(best, step):  # after s values, of which `below` is the last
            s, below, above, left_value, right_sum = step
            left_sum = best["left_sum"] + left_value
            rest = jnp.maximum(n - s, 1).astype(dtype)
            left, right = left_sum / s.astype(dtype), right_sum / rest
            score = jnp.sqrt(s.astype(dtype)) * jnp.sqrt(rest) * (right - left)
            apart = right - left > threshold
            keep_left, keep_right = apart & (2 * s > n), apart & (2 * s < n)
            results = {
                "score": score,
                "value": jnp.where(keep_left, left, jnp.where(keep_right, right, everything)),
                "lowest": jnp.where(keep_right, above, ordered[0]),
                "highest": jnp.where(keep_left, below, top),
            }
            better = (s < n) & (score > best["score"])
            chosen = {name: jnp.where(better, results[name], best[name]) for name in results}
            return chosen | {"left_sum": left_sum}, None

        best = {
            "score": jnp.full_like(center, -jnp.inf),
            "value": everything,
            "lowest": ordered[0],
            "highest": top,
            "left_sum": zero,
        }
        steps = row[1:], ordered[:-1], ordered[1:], deviation[:-1], right[1:]
        best, _ = lax.scan(split, best, steps)
        return center + best["value"], best["lowest"], best["highest"]

    value, lowest, highest = map_columns(rule, updates, chunk=sort_chunk())
    value = _finish(value, updates, valid)
    return value, _shares(updates, valid, lowest, highest) if with_kept else None

"""Work on many examples, a batch at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def in_batches(fn: Callable, size: int, *arrays) -> Any:
    """`fn` of batches [size, ...] of the arrays, one after another, so that much fits in memory.

    `fn` returns a pytree of arrays with a leading axis of examples. The last batch is smaller where
    the size does not divide the number of examples.

    >>> in_batches(lambda x: x - x.mean(), 2, jnp.array([1.0, 3.0, 7.0])).tolist()
    [-1.0, 1.0, 0.0]
    """
    whole, rest = _cut(size, arrays)
    if whole is None:
        return fn(*arrays)
    parts = jax.lax.map(lambda batch: fn(*batch), whole)
    parts = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), parts)
    if rest is None:
        return parts
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), parts, fn(*rest))


def sum_in_batches(fn: Callable, size: int, *arrays) -> Any:
    """The sum of `fn` over batches of the arrays: a pytree, and nothing is stacked.

    >>> print(sum_in_batches(lambda x: {"sum": x.sum()}, 2, jnp.array([1.0, 3.0, 7.0])))
    {'sum': Array(11., dtype=float32)}
    """
    whole, rest = _cut(size, arrays)
    if whole is None:
        return fn(*arrays)
    shapes = jax.eval_shape(lambda *batches: fn(*(batch[0] for batch in batches)), *whole)
    nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(total, batch):
        return jax.tree.map(jnp.add, total, fn(*batch)), None

    total, _ = jax.lax.scan(add, nothing, tuple(whole))
    return total if rest is None else jax.tree.map(jnp.add, total, fn(*rest))


def _cut(size: int, arrays) -> tuple[Any, Any]:
    """The arrays in whole batches, and what is left; (None, None) where one batch is enough."""
    count = arrays[0].shape[0]
    whole = count // size * size
    if whole == count == size or whole == 0:
        return None, None
    split = [array[:whole].reshape(-1, size, *array.shape[1:]) for array in arrays]
    return split, None if whole == count else [array[whole:] for array in arrays]

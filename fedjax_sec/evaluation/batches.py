"""Work on many examples, a batch at a time."""

import jax
import jax.numpy as jnp


def in_batches(fn, size: int, *arrays):
    """`fn` of batches [size, ...] of the arrays, one after another, so that much fits in memory.

    The last batch is smaller where the size does not divide the number of examples.

    >>> in_batches(lambda x: x - x.mean(), 2, jnp.array([1.0, 3.0, 7.0])).tolist()
    [-1.0, 1.0, 0.0]
    """
    count = arrays[0].shape[0]
    whole = count // size * size
    if whole == count == size or whole == 0:
        return fn(*arrays)
    split = [array[:whole].reshape(-1, size, *array.shape[1:]) for array in arrays]
    parts = jax.lax.map(lambda some: fn(*some), split)
    found = parts.reshape(whole, *parts.shape[2:])
    if whole == count:
        return found
    return jnp.concatenate([found, fn(*(array[whole:] for array in arrays))])

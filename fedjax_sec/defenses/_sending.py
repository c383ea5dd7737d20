"""Parts of the defences that change what a client sends."""

import jax.numpy as jnp

from fedjax_sec.core import value_of


def rate_of(client):
    """The rate of a client that takes plain gradient steps; 1 for others."""
    optimizer = value_of(client, "optimizer")
    rate = None if optimizer is None else optimizer.rate
    return 1.0 if rate is None else rate


def tensors_of(space):
    """The places of the trained tensors in a vector [T], in order."""
    begin = space.trained.start
    places = [p for p in space.slices.values() if p.start >= begin]
    return [slice(p.start - begin, p.stop - begin) for p in sorted(places, key=lambda p: p.start)]


def without_smallest(values, share):
    """The values [m] with the share of those of smallest size set to zero.

    >>> print(without_smallest(jnp.array([3.0, -1.0, 2.0, -4.0]), 0.5))
    [ 3.  0.  0. -4.]
    """
    size = jnp.abs(values)
    return jnp.where(size >= jnp.quantile(size, share), values, 0.0)

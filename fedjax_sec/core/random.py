"""Named random streams, and choices that padding does not change."""

import enum

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray


class Stream(enum.IntEnum):
    """Named random streams. Adding one never shifts another, so runs with and without an attack
    share their honest clients' randomness; numbers must never be reused."""

    INIT = 0
    PARTITION = 1
    MALICIOUS = 2
    SAMPLE = 3
    CLIENT = 4
    POISON = 5
    ATTACK = 6
    DEFENSE = 7
    ROOT = 8
    EVASION = 9
    LOCAL_TEST = 10
    DROPOUT = 11
    REDRAW = 12
    PREPARE = 13
    ALGORITHM = 14
    MONITOR = 15
    EVALUATE = 16


def stream(key: PRNGKeyArray, name: Stream) -> PRNGKeyArray:
    """The key of one purpose."""
    return jax.random.fold_in(key, int(name))


def uniform_by_position(key, size):
    """A number in [0, 1) for each of `size` positions, whatever stands behind them. [M]"""
    draw = lambda p: jax.random.uniform(jax.random.fold_in(key, p))  # noqa: E731
    return jax.vmap(draw)(jnp.arange(size))


def exact_share(key, candidates, fraction):
    """floor(fraction * n) of the n true entries of `candidates` [M], drawn without replacement.

    >>> print(exact_share(jax.random.key(0), jnp.arange(9) < 7, 0.5).sum())
    3
    """
    draw = jnp.where(candidates, uniform_by_position(key, candidates.shape[0]), 2.0)
    place = jnp.argsort(jnp.argsort(draw))  # candidates come first, in random order
    # A product such as 0.7 * 10 must not fall below 7 by the rounding of float32.
    wanted = jnp.floor(fraction * candidates.sum() * (1 + 1e-6))
    return candidates & (place < wanted)

"""Which of a client's examples are poisoned: the same ones in every round."""

import jax
import jax.numpy as jnp


def uniform_by_position(key, size):
    """A number in [0, 1) for each of `size` positions, whatever stands behind them. [M]"""
    draw = lambda p: jax.random.uniform(jax.random.fold_in(key, p))  # noqa: E731
    return jax.vmap(draw)(jnp.arange(size))


def exact_share(key, candidates, fraction):
    """floor(fraction * n) of the n true entries of `candidates` [M], drawn without replacement.

    >>> import jax, jax.numpy as jnp
    >>> print(exact_share(jax.random.key(0), jnp.arange(9) < 7, 0.5).sum())
    3
    """
    draw = jnp.where(candidates, uniform_by_position(key, candidates.shape[0]), 2.0)
    place = jnp.argsort(jnp.argsort(draw))  # candidates come first, in random order
    # A product such as 0.7 * 10 must not fall below 7 by the rounding of float32.
    wanted = jnp.floor(fraction * candidates.sum() * (1 + 1e-6))
    return candidates & (place < wanted)

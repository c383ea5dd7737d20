"""Votes by sign."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fedjax_sec.ops.backend import on_cpu
from fedjax_sec.ops.sorting import map_columns, split_rows, tree_sum, unrolled


def sign_votes(updates: Float[Array, "K D"], valid: Bool[Array, " K"]) -> Float[Array, " D"]:
    """The sum of the valid clients' signs in every coordinate; exact, an integer from -K to K.

    >>> x = jnp.array([[1.0, -2.0], [3.0, 0.0], [5.0, jnp.nan]])
    >>> sign_votes(x, jnp.array([True, True, False])).tolist()
    [2.0, -1.0]
    """

    def block_rule(block):
        if on_cpu() and unrolled(block.shape[0]):  # as in `moments.mean_and_std`
            rows = enumerate(split_rows(block))
            return tree_sum([jnp.where(valid[i], jnp.sign(row), 0.0) for i, row in rows])[0]
        return jnp.sum(jnp.where(valid[:, None], jnp.sign(block), 0.0), axis=0)

    return map_columns(block_rule, updates)

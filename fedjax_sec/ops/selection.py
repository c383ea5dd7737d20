"""Order statistics over many clients without sorting: the bits of the answer, one after another."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def ordered_bits(values: Float[Array, "*S"]) -> Int[Array, "*S"]:
    """Integers in the order of the values: of negative numbers all bits but the sign are flipped.

    >>> ordered_bits(jnp.array([-2.0, -1.0, 0.0, 1.0])).argsort().tolist()
    [0, 1, 2, 3]
    """
    integer = jnp.int64 if values.dtype == jnp.float64 else jnp.int32
    return _flip(lax.bitcast_convert_type(values, integer))


def _flip(bits):  # its own inverse
    info = jnp.iinfo(bits.dtype)
    return bits ^ ((bits >> (info.bits - 1)) & info.max)


@jax.custom_jvp
def order_statistic(
    block: Float[Array, "K C"], rank: Int[Array, ""] | Int[Array, "1 C"]
) -> Float[Array, "1 C"]:
    """The value of `rank` in every column, ``sort(block, axis=0)[rank]``.

    Two bits of the answer are found at a time, by counting the values below three candidates: 16
    passes over a float32 block that stays in cache, with a program whose size does not depend on
    K. The three counts share one integer below 1,024 rows; from there on it is one bit at a time.
    The derivative is shared by the values that tie. float32 or float64, without NaN.

    Args:
        block: K values a column; infinities are allowed.
        rank: from 0 to K - 1, may be traced and differ between columns.

    >>> order_statistic(jnp.array([[3.0], [-1.0], [2.0]]), jnp.int32(1)).tolist()
    [[2.0]]
    """
    keys = ordered_bits(block)
    info, dtype = jnp.iinfo(keys.dtype), keys.dtype
    width = 10  # bits of a packed count
    step_bits = 2 if block.shape[0] < 1 << width else 1

    def refine(i, bits):
        step = jnp.left_shift(jnp.ones((), dtype), (info.bits - (i + 1) * step_bits).astype(dtype))
        below = [(keys < bits + c * step).astype(dtype) for c in range(1, 1 << step_bits)]
        each = functools.reduce(jnp.add, [b << (width * c) for c, b in enumerate(below)])
        packed = each.sum(0, keepdims=True, dtype=dtype)
        if step_bits == 1:
            return jnp.where(packed <= rank, bits + step, bits)
        counts = [(packed >> (width * c)) & ((1 << width) - 1) for c in range(3)]
        return bits + step * sum((count <= rank).astype(dtype) for count in counts)

    bits = jnp.full((1, block.shape[1]), info.min, dtype)
    bits = lax.fori_loop(0, info.bits // step_bits, refine, bits)
    return lax.bitcast_convert_type(_flip(bits), block.dtype)


@order_statistic.defjvp
def _(primals, tangents):
    block, rank = primals
    value = order_statistic(block, rank)
    tied = block == value
    move = jnp.where(tied, tangents[0], 0.0).sum(axis=0, keepdims=True)
    return value, move / jnp.maximum(tied.sum(axis=0, keepdims=True), 1).astype(move.dtype)

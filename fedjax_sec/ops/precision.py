"""Helpers of all kernels for half precision and for gradients."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def wide(dtype) -> jnp.dtype:
    """The type in which values of `dtype` are added up: itself, but at least float32.

    >>> [wide(dtype).name for dtype in (jnp.float16, jnp.bfloat16, jnp.float32)]
    ['float32', 'float32', 'float32']
    """
    return jnp.promote_types(dtype, jnp.float32)


@jax.custom_jvp
def root(square: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """``sqrt``, with derivative zero at zero, where the derivative of `jnp.sqrt` is infinite.

    >>> jax.grad(lambda x: root(x * x))(0.0).item()
    0.0
    """
    return jnp.sqrt(square)


@root.defjvp
def _(primals, tangents):
    value = root(*primals)
    zero = value == 0
    slope = jnp.where(zero, 0.0, 0.5 / jnp.where(zero, 1.0, value))
    return value, tangents[0] * slope

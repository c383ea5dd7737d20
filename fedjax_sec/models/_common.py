"""What the networks share: initialisers and the adapter from flax to `Model`."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedjax_sec.types import Model

INITS = ("pytorch", "lecun", "glorot")


def kernel_init(name: str):
    """`pytorch` is U(-1/sqrt(fan_in), 1/sqrt(fan_in)), its default for linear and conv layers."""
    if name == "pytorch":
        return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    return {"lecun": nn.initializers.lecun_normal, "glorot": nn.initializers.glorot_uniform}[name]()


def bias_init(name: str, fan_in: int):
    """PyTorch's default U(-1/sqrt(fan_in), 1/sqrt(fan_in)); zero for the other initialisers."""
    if name != "pytorch":
        return nn.initializers.zeros
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


def dense(width: int, x, init: str, name: str, kernel: str | None = None):
    """A fully connected layer on the last axis of `x`."""
    return nn.Dense(
        width, kernel_init=kernel_init(kernel or init), bias_init=bias_init(init, x.shape[-1]),
        name=name,
    )(x)  # fmt: skip


def conv(width: int, size: int, x, init: str, name: str, kernel: str | None = None):
    """A valid convolution with stride 1 and a square kernel."""
    return nn.Conv(
        width, (size, size), padding="VALID", kernel_init=kernel_init(kernel or init),
        bias_init=bias_init(init, size * size * x.shape[-1]), name=name,
    )(x)  # fmt: skip


def max_pool(size: int, x):
    """Max-pooling over disjoint windows; what does not fill a window is dropped, as in PyTorch.

    Written as a reshape and a maximum: XLA's reduce_window has a slow gradient
    (select-and-scatter) under the client axis.
    """
    batch, height, width, channels = x.shape
    rows, columns = height // size, width // size
    x = x[:, : rows * size, : columns * size]
    return x.reshape(batch, rows, size, columns, size, channels).max(axis=(2, 4))


def flax_model(module: nn.Module, input_shape: tuple[int, ...]) -> Model:
    """The pure-function form of a linen module for inputs [B, *input_shape]."""

    def init(key):
        return module.init(key, jnp.zeros((1, *input_shape)))

    def apply(variables, x, *, train=False, key=None):
        rngs = None if key is None else {"dropout": key}
        return module.apply(variables, x, rngs=rngs)

    return Model(init, apply)

"""Convolution and max-pooling, lowered for kernels that differ from client to client.

`vmap` over a convolution's kernel becomes a grouped convolution, whose gradients XLA computes
slowly on every backend. Written as patches times a matrix it becomes a (batched) matrix product.

Images are [B, H, W, C], as everywhere; `fedjax_sec.ops.polyphase` has an arrangement of them that
is quicker on a CPU.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fedjax_sec.ops import polyphase
from fedjax_sec.ops.backend import on_cpu

#: How `conv2d` can be computed.
LOWERINGS = ("xla", "patches", "rows", "polyphase")


def rule_lowering() -> str:
    """What `auto` means where nothing is measured: `patches` on CPU, `xla` elsewhere.

    See docs/performance.md for the measurements behind it.
    """
    return "patches" if on_cpu() else "xla"


def conv2d(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "h w C F"],
    lowering: str = "auto",
    stride: int = 1,
) -> Float[Array, "B R S F"]:
    r"""Valid convolution (cross-correlation) with stride t, by one of several lowerings.

    .. math:: y_{b,r,s,f} = \sum_{i,j,c} x_{b,rt+i,st+j,c}\, k_{i,j,c,f}

    ``xla`` is XLA's own convolution. ``patches`` gathers all h w C inputs of an output into one
    row and multiplies once: needs h w times the input's memory. ``rows`` gathers along the width
    only and adds up h products: w times the memory, h times as many products. ``polyphase`` is
    `patches` on images split by the phases of later poolings, which only a whole network gains
    from, and computes all outputs whatever the stride. All agree up to rounding. ``auto`` is
    ``patches`` on CPU (see docs/performance.md), ``xla`` elsewhere.

    Raises: `ValueError` for an unknown lowering.

    >>> x, k = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 1))
    >>> [conv2d(x, k, lowering)[0, 0, 0, 0].item() for lowering in LOWERINGS]
    [18.0, 18.0, 18.0, 18.0]
    """
    if lowering == "auto":
        lowering = rule_lowering()
    if lowering not in LOWERINGS:
        raise ValueError(f"lowering must be one of {LOWERINGS} or 'auto', got {lowering!r}.")
    if lowering == "xla":
        return lax.conv_general_dilated(
            x, kernel, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    if lowering == "polyphase":
        dense = polyphase.join(polyphase.conv2d(polyphase.split(x, 1), kernel))
        return dense[:, ::stride, ::stride]
    high, wide, channels, features = kernel.shape
    batch, height, width, _ = x.shape
    rows, columns = (height - high) // stride + 1, (width - wide) // stride + 1
    down, right = stride * (rows - 1) + 1, stride * (columns - 1) + 1
    shape = (batch, rows, columns, features)
    if lowering == "patches":
        patches = jnp.concatenate(
            [
                x[:, i : i + down : stride, j : j + right : stride]
                for i in range(high)
                for j in range(wide)
            ],
            axis=-1,
        )
        # Two dimensions on either side: XLA's fastest product on CPU.
        flat = patches.reshape(-1, high * wide * channels)
        return (flat @ kernel.reshape(-1, features)).reshape(shape)
    strips = jnp.concatenate([x[:, :, j : j + right : stride] for j in range(wide)], axis=-1)
    out = jnp.zeros(shape, jnp.result_type(x, kernel))
    for i in range(high):
        flat = strips[:, i : i + down : stride].reshape(-1, wide * channels)
        out = out + (flat @ kernel[i].reshape(-1, features)).reshape(shape)
    return out


def _maximum(parts):
    return functools.reduce(jnp.maximum, parts)


def max_pool(x: Float[Array, "B H W C"], size: int) -> Float[Array, "B R S C"]:
    """Maximum over disjoint `size` x `size` windows; what does not fill a window is dropped.

    First over the rows of a window, then over its columns, each as elementwise maxima: XLA's
    reduce-window has a slow gradient (select-and-scatter), and a reduction over both axes of a
    reshaped array reads memory in short pieces. Where several values of a window are the largest,
    the gradient is shared among them; PyTorch gives it to the first.

    >>> max_pool(jnp.arange(9.0).reshape(1, 3, 3, 1), 2).tolist()
    [[[[4.0]]]]
    """
    batch, height, width, channels = x.shape
    rows, columns = height // size, width // size
    x = x[:, : rows * size, : columns * size]
    x = x.reshape(batch, rows, size, columns, size * channels)
    tallest = _maximum([x[:, :, i] for i in range(size)])
    tallest = tallest.reshape(batch, rows, columns, size, channels)
    return _maximum([tallest[:, :, :, j] for j in range(size)])

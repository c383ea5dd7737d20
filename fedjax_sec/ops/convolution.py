"""Convolution and max-pooling, lowered for kernels that differ from client to client.

`vmap` over a convolution's kernel becomes a grouped convolution, whose gradients XLA computes
slowly on every backend. Written as patches times a matrix it becomes a (batched) matrix product.

Images are [B, H, W, C], as everywhere; two other arrangements of them are quicker on a CPU:
`fedjax_sec.ops.polyphase` for networks that pool, and [C, H, W, B] for those that do not.
"""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fedjax_sec.ops import polyphase
from fedjax_sec.ops.backend import on_cpu

#: How `conv2d` can be computed.
LOWERINGS = ("xla", "patches", "rows", "polyphase", "chwn")
#: Those that can pay for a network that pools, and for one that does not.
POOLING = ("xla", "patches", "rows", "polyphase")
UNPOOLED = ("xla", "patches", "rows", "chwn")


def rule_lowering(lowerings: Sequence[str] = POOLING) -> str:
    """What `auto` means where nothing is measured.

    On a CPU `chwn` for networks that can be computed so, `patches` for others; `xla` elsewhere. See
    docs/performance.md for the measurements behind it.
    """
    if not on_cpu():
        return "xla"
    return "chwn" if "chwn" in lowerings else "patches"


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
    [18.0, 18.0, 18.0, 18.0, 18.0]
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
    if lowering == "chwn":
        return conv2d_chwn(x.transpose(3, 1, 2, 0), kernel, stride).transpose(3, 1, 2, 0)
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


def conv2d_chwn(
    x: Float[Array, "C H W B"], kernel: Float[Array, "h w C F"], stride: int = 1, around: int = 0
) -> Float[Array, "F R S B"]:
    """`conv2d` on images with channels first and the batch last, and zeros `around` them.

    A row of an image is W B neighbouring numbers, and patches are shifted images one behind the
    other, so that all is copied as memory lies.

    >>> x, k = jnp.ones((2, 4, 4, 1)), jnp.ones((3, 3, 2, 1))
    >>> conv2d_chwn(x, k).ravel().tolist(), conv2d_chwn(x, k, stride=2, around=1)[0, 0, 0, 0].item()
    ([18.0, 18.0, 18.0, 18.0], 8.0)
    """
    high, wide, channels, features = kernel.shape
    batch = x.shape[3]
    height, width = x.shape[1] + 2 * around, x.shape[2] + 2 * around
    rows, columns = height - high + 1, width - wide + 1
    x = x.reshape(*x.shape[:2], -1)
    if around:
        x = jnp.pad(x, ((0, 0), (around, around), (around * batch, around * batch)))
    # First along the width, so that what computes x is computed for each column of the kernel only.
    if stride > 1:
        x = x.reshape(channels, height, width, batch)
        strips = jnp.concatenate([x[:, :, j : j + columns : stride] for j in range(wide)])
    else:
        strips = [x[:, :, j * batch : (j + columns) * batch] for j in range(wide)]
        strips = jnp.concatenate(strips)
    patches = jnp.concatenate([strips[:, i : i + rows : stride] for i in range(high)])
    patches = patches.reshape(high * wide * channels, -1)
    flat = lax.dot_general(kernel.reshape(-1, features), patches, (((0,), (0,)), ((), ())))
    return flat.reshape(features, -(-rows // stride), -(-columns // stride), batch)


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

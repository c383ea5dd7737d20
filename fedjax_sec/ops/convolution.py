"""Convolution and max-pooling, lowered for kernels that differ from client to client.

`vmap` over a convolution's kernel becomes a grouped convolution, whose gradients XLA computes
slowly on every backend. Written as patches times a matrix it becomes a (batched) matrix product.

Images are [B, H, W, C], as everywhere, or [C, H, W, B] ("batch last"), quicker on CPU.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fedjax_sec.ops.backend import on_cpu

#: How `conv2d` can be computed.
LOWERINGS = ("xla", "patches", "rows", "batch_last")


def rule_lowering() -> str:
    """What `auto` means where nothing is measured: `patches` on CPU, `xla` elsewhere.

    See docs/performance.md for the measurements behind it.
    """
    return "patches" if on_cpu() else "xla"


def conv2d(
    x: Float[Array, "B H W C"], kernel: Float[Array, "h w C F"], lowering: str = "auto"
) -> Float[Array, "B R S F"]:
    r"""Valid convolution (cross-correlation) with stride 1, by one of several lowerings.

    .. math:: y_{b,r,s,f} = \sum_{i,j,c} x_{b,r+i,s+j,c}\, k_{i,j,c,f}

    ``xla`` is XLA's own convolution. ``patches`` gathers all h w C inputs of an output into one
    row and multiplies once: needs h w times the input's memory. ``rows`` gathers along the width
    only and adds up h products: w times the memory, h times as many products. All three agree up
    to rounding. ``auto`` is ``patches`` on CPU (see docs/performance.md), ``xla`` elsewhere.

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
            x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    if lowering == "batch_last":
        return to_batch_first(conv2d_batch_last(to_batch_last(x), kernel))
    high, wide, channels, features = kernel.shape
    batch, height, width, _ = x.shape
    rows, columns = height - high + 1, width - wide + 1
    shape = (batch, rows, columns, features)
    if lowering == "patches":
        patches = jnp.concatenate(
            [x[:, i : i + rows, j : j + columns] for i in range(high) for j in range(wide)], axis=-1
        )
        # Two dimensions on either side: XLA's fastest product on CPU.
        flat = patches.reshape(-1, high * wide * channels)
        return (flat @ kernel.reshape(-1, features)).reshape(shape)
    strips = jnp.concatenate([x[:, :, j : j + columns] for j in range(wide)], axis=-1)
    out = jnp.zeros(shape, jnp.result_type(x, kernel))
    for i in range(high):
        flat = strips[:, i : i + rows].reshape(-1, wide * channels)
        out = out + (flat @ kernel[i].reshape(-1, features)).reshape(shape)
    return out


def to_batch_last(x: Float[Array, "B H W C"]) -> Float[Array, "C H W B"]:
    """Images with the channels first and the batch last.

    >>> to_batch_last(jnp.zeros((8, 28, 28, 1))).shape
    (1, 28, 28, 8)
    """
    return x.transpose(3, 1, 2, 0)


def to_batch_first(x: Float[Array, "C H W B"]) -> Float[Array, "B H W C"]:
    """The inverse of `to_batch_last`.

    >>> to_batch_first(jnp.zeros((1, 28, 28, 8))).shape
    (8, 28, 28, 1)
    """
    return x.transpose(3, 1, 2, 0)


def conv2d_batch_last(
    x: Float[Array, "C H W B"], kernel: Float[Array, "h w C F"]
) -> Float[Array, "F R S B"]:
    """`conv2d` on images whose batch is the last axis, as patches times a matrix.

    A patch's rows are then runs of S B neighbouring numbers, which are copied and added at memory
    speed, and the product [F, h w C] [h w C, R S B] is one that CPUs are quick at.

    >>> conv2d_batch_last(jnp.ones((2, 4, 4, 5)), jnp.ones((3, 3, 2, 1))).shape
    (1, 2, 2, 5)
    """
    high, wide, channels, features = kernel.shape
    _, height, width, batch = x.shape
    rows, columns = height - high + 1, width - wide + 1
    patches = jnp.concatenate(
        [x[:, i : i + rows, j : j + columns] for i in range(high) for j in range(wide)]
    )
    flat = patches.reshape(high * wide * channels, -1)
    out = lax.dot_general(kernel.reshape(-1, features), flat, (((0,), (0,)), ((), ())))
    return out.reshape(features, rows, columns, batch)


def max_pool_batch_last(x: Float[Array, "C H W B"], size: int) -> Float[Array, "C R S B"]:
    """`max_pool` on images whose batch is the last axis.

    >>> max_pool_batch_last(jnp.arange(9.0).reshape(1, 3, 3, 1), 2).tolist()
    [[[[4.0]]]]
    """
    channels, height, width, batch = x.shape
    rows, columns = height // size, width // size
    x = x[:, : rows * size, : columns * size].reshape(channels, rows, size, columns, size, batch)
    tallest = _maximum([x[:, :, i] for i in range(size)])
    return _maximum([tallest[:, :, :, j] for j in range(size)])


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

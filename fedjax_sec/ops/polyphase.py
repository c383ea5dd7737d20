"""Images split into the phases of their later pooling, so that a network never interleaves pixels.

A network that pools by T in all needs, for one output, inputs that lie T apart. Kept as T x T
arrays of every T-th row and column, each flattened to [C, L], a shifted image is a slice of
neighbouring numbers, a pooling the maximum of whole arrays, and a convolution slices times a
matrix. On [B, H, W, C] XLA works out each number's place by divisions instead: in the gradient of a
pooling that was the largest part of PGD's profile on a CPU.

The price are the places between the rows, which shifting fills with numbers that mean nothing;
nothing that counts ever reads them, so their gradient is zero.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


class Phases(NamedTuple):
    """Images [B, H, W, C] by phase: pixel (T r + i, T s + j) is place r P + s of `parts[i][j]`.

    Each part is [C, L B], the batch quickest, and as long as its last pixel needs.
    """

    parts: tuple[tuple[Array, ...], ...]
    height: int
    width: int
    batch: int
    pitch: int  # P, places from one row to the next

    @property
    def factor(self) -> int:
        """T, the poolings that are still to come."""
        return len(self.parts)

    def map(self, fn: Callable[[Array], Array]) -> "Phases":
        """`fn` of every part, which must keep its shape.

        >>> images = split(jnp.ones((1, 2, 2, 1)), 2)
        >>> join(images.map(lambda x: -x)).ravel().tolist()
        [-1.0, -1.0, -1.0, -1.0]
        """
        return self._replace(parts=tuple(tuple(map(fn, row)) for row in self.parts))


def _length(images: Phases, factor: int, height: int, width: int, i: int, j: int) -> int:
    """Numbers in a channel of the phase (i, j) of an image [height, width]; none if it is empty."""
    rows, columns = -(-(height - i) // factor), -(-(width - j) // factor)
    full = rows > 0 and columns > 0
    return ((rows - 1) * images.pitch + columns) * images.batch if full else 0


def split(x: Float[Array, "B H W C"], factor: int) -> Phases:
    """The images by the phases of `factor`, the product of all poolings to come.

    >>> x = jnp.arange(9.0).reshape(1, 3, 3, 1)
    >>> [part.ravel().tolist() for row in split(x, 2).parts for part in row]
    [[0.0, 2.0, 6.0, 8.0], [1.0, 0.0, 7.0], [3.0, 5.0], [4.0]]
    """
    batch, height, width, channels = x.shape
    rows, pitch = -(-height // factor), -(-width // factor)
    spare = ((0, 0), (0, rows * factor - height), (0, pitch * factor - width), (0, 0))
    x = jnp.pad(x.transpose(3, 1, 2, 0), spare)
    x = x.reshape(channels, rows, factor, pitch, factor, batch)
    images = Phases((), height, width, batch, pitch)

    def part(i, j):
        length = _length(images, factor, height, width, i, j)
        return x[:, :, i, :, j].reshape(channels, -1)[:, :length]

    return images._replace(parts=_square(factor, part))


def _square(factor, part):
    return tuple(tuple(part(i, j) for j in range(factor)) for i in range(factor))


def join(images: Phases) -> Float[Array, "B H W C"]:
    """The inverse of `split`.

    >>> x = jnp.arange(24.0).reshape(2, 3, 4, 1)
    >>> bool((join(split(x, 2)) == x).all())
    True
    """
    factor, pitch, batch = images.factor, images.pitch, images.batch
    channels = images.parts[0][0].shape[0]
    rows = -(-images.height // factor)

    def grid(part):
        part = jnp.pad(part, ((0, 0), (0, rows * pitch * batch - part.shape[1])))
        return part.reshape(channels, rows, pitch, batch)

    x = jnp.stack([jnp.stack([grid(p) for p in row], axis=3) for row in images.parts], axis=2)
    x = x.reshape(channels, rows * factor, pitch * factor, batch)
    return x[:, : images.height, : images.width].transpose(3, 1, 2, 0)


def conv2d(images: Phases, kernel: Float[Array, "h w C F"]) -> Phases:
    """`fedjax_sec.ops.convolution.conv2d` on images by phase.

    >>> x, k = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 1))
    >>> join(conv2d(split(x, 2), k)).ravel().tolist()
    [18.0, 18.0, 18.0, 18.0]
    """
    high, wide, _, features = kernel.shape
    factor = images.factor
    height, width = images.height - high + 1, images.width - wide + 1
    matrix = kernel.reshape(-1, features)

    def part(i, j):
        length = _length(images, factor, height, width, i, j)
        if not length:
            return jnp.zeros((features, 0), jnp.result_type(matrix, images.parts[0][0]))
        patches = []
        for row in range(i, i + high):
            for column in range(j, j + wide):
                start = (row // factor * images.pitch + column // factor) * images.batch
                source = images.parts[row % factor][column % factor]
                patches.append(source[:, start : start + length])
        return lax.dot_general(matrix, jnp.concatenate(patches), (((0,), (0,)), ((), ())))

    return images._replace(parts=_square(factor, part), height=height, width=width)


def max_pool(images: Phases, size: int) -> Phases:
    """`fedjax_sec.ops.convolution.max_pool` on images by phase.

    Where `size` does not divide the phases' factor, the images are first split anew.

    >>> join(max_pool(split(jnp.arange(9.0).reshape(1, 3, 3, 1), 3), 3)).tolist()
    [[[[8.0]]]]
    """
    if images.factor % size:
        images = split(join(images), size)
    factor = images.factor // size
    height, width = images.height // size, images.width // size

    def part(i, j):
        length = _length(images, factor, height, width, i, j)
        window = [
            [images.parts[size * i + u][size * j + v][:, :length] for v in range(size)]
            for u in range(size)
        ]
        tallest = [functools.reduce(jnp.maximum, column) for column in zip(*window, strict=True)]
        return functools.reduce(jnp.maximum, tallest)

    return images._replace(parts=_square(factor, part), height=height, width=width)

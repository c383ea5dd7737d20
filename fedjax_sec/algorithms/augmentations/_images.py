"""Crops, flips and holes of images [B, H, W, C], and the draws that decide them."""

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sec.core import ConfigError


def check_images(part, path: str, setting) -> None:
    """Raises `ConfigError` for inputs that have no rows and columns."""
    shape = setting.example_shape
    if shape is not None and len(shape) != 3:
        raise ConfigError(
            f"{path}: {part.registered_name!r} needs images [H, W, C], and the data set's inputs "
            f"have the shape {list(shape)}; leave it out."
        )


def draw_offsets(key, count: int, padding: int):
    """Where each image's window begins in the padded one: row and column, 0 to 2 padding. [B, 2]"""
    return jax.random.randint(key, (count, 2), 0, 2 * padding + 1)


def shifted(x, offsets, padding: int):
    """The windows [H, W] that begin at `offsets` of the images with zeros around them."""
    around = (padding, padding)
    padded = jnp.pad(x, ((0, 0), around, around, (0, 0)))

    def window(image, at):
        return jax.lax.dynamic_slice(image, (at[0], at[1], 0), x.shape[1:])

    return jax.vmap(window)(padded, offsets)


def flipped(x, which):
    """The images with left and right exchanged where `which [B]`."""
    return jnp.where(which[:, None, None, None], x[:, :, ::-1], x)


def draw_centers(key, x):
    """A pixel of each image: row and column. [B, 2]"""
    pairs = zip(jax.random.split(key), x.shape[1:3], strict=True)
    return jnp.stack([jax.random.randint(k, x.shape[:1], 0, size) for k, size in pairs], axis=1)


def with_holes(x, centers, length, fill):
    """The images with `fill` (a number a channel) in a square around each center.

    The square reaches from length // 2 before the center to length // 2 - 1 behind it, and no
    further than the image.
    """
    half = length // 2

    def inside(size, center):
        place = jnp.arange(size)[None] - center[:, None]
        return (place >= -half) & (place < half)

    rows, columns = inside(x.shape[1], centers[:, 0]), inside(x.shape[2], centers[:, 1])
    hole = rows[:, :, None, None] & columns[:, None, :, None]
    return jnp.where(hole, np.asarray(fill, np.float32)[None, None, None], x)

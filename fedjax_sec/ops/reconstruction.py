"""Scores of reconstructed examples: how near they are to the true ones, which have no order."""

from typing import NamedTuple

import dm_pix
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from fedjax_sec.core.types import Guess, InputSpec

#: Side and width of SSIM's window (Wang et al. 2004), narrower on images that are smaller.
WINDOW, SIGMA = 11, 1.5


class Scores(NamedTuple):
    """Of n true examples, in their order: `match [n]` says which guess is held against each.

    `mse` and `psnr` [n] are of inputs in the units that components see, PSNR in decibels where
    pixels are in [0, 1]; `ssim [n]` is NaN for inputs that are no images of 3 x 3 pixels or more;
    `labels` is the share of the true labels that are recovered, counted with their multiplicity. Of
    tokens `mse` is the share that is wrong, and `psnr` NaN.
    """

    match: Int[Array, " n"]
    mse: Float[Array, " n"]
    psnr: Float[Array, " n"]
    ssim: Float[Array, " n"]
    labels: Float[Array, ""]


def score(guess: Guess, x, y, inputs: InputSpec, num_classes: int) -> Scores:
    """Scores of a guess of n examples against the true inputs [n, ...] and labels [n].

    Guesses are matched to true inputs so that the sum of the squared errors is smallest (optax's
    Hungarian algorithm). Without guessed inputs only the labels are scored.
    """
    labels = label_recovery(guess.y, y, num_classes)
    if guess.x is None:
        nothing = jnp.full(y.shape[0], jnp.nan)
        return Scores(jnp.arange(y.shape[0]), nothing, nothing, nothing, labels)
    tokens = inputs.kind == "tokens"
    errors = squared_errors(guess.x, x, differ=tokens)
    match = assignment(errors)
    mse = errors[match, jnp.arange(x.shape[0])]
    similar = jnp.full(x.shape[0], jnp.nan)
    if is_image(inputs):
        similar = ssim(guess.x[match], x)
    return Scores(match, mse, jnp.full_like(mse, jnp.nan) if tokens else psnr(mse), similar, labels)


def is_image(inputs: InputSpec) -> bool:
    """Whether inputs are images that are large enough for a window of SSIM."""
    return inputs.kind == "pixels" and len(inputs.shape) == 3 and min(inputs.shape[:2]) >= 3


def mean_where(mask, values):
    """The mean of the values [n] of the mask; NaN where there are none."""
    return jnp.where(mask, values, 0.0).sum() / mask.sum()


def squared_errors(guess, x, differ: bool = False) -> Float[Array, "m n"]:
    """The mean squared error of every guess [n, ...] (down) to every true input (across).

    With `differ`, the share of entries that are not the same.
    """
    flat, true = guess.reshape(guess.shape[0], -1), x.reshape(x.shape[0], -1)

    def to_all(one):
        apart = one[None] != true if differ else (one[None] - true) ** 2
        return jnp.mean(apart.astype(jnp.float32), axis=1)

    return jax.vmap(to_all)(flat)


def matched(errors: Float[Array, "m n"]) -> tuple[Int[Array, " k"], Int[Array, " k"]]:
    """(guesses, examples): pairs of each another, by the least sum of errors, min(m, n) of them.

    >>> rows, columns = matched(jnp.array([[0.5, 0.1, 0.9]]))
    >>> print(rows, columns)
    [0] [1]
    """
    # Beyond every real error, and finite, so that the assignment avoids it where it can.
    worst = 1.0 + jnp.max(jnp.where(jnp.isfinite(errors), errors, 0.0))
    return optax.assignment.hungarian_algorithm(
        jnp.where(jnp.isfinite(errors), errors, 1e3 * worst)
    )


def assignment(errors: Float[Array, "n n"]) -> Int[Array, " n"]:
    """The guess for each true example, another one for each, by the least sum of errors.

    >>> print(assignment(jnp.array([[0.5, 0.0], [0.1, 0.2]])))
    [1 0]
    """
    rows, columns = matched(errors)
    return jnp.zeros(errors.shape[0], jnp.int32).at[columns].set(rows.astype(jnp.int32))


def psnr(mse):
    """Decibels of values in [0, 1]: 10 log10(1 / mse).

    >>> float(psnr(jnp.array(0.01)))
    20.0
    """
    return -10.0 * jnp.log10(mse)


def ssim(one, other) -> Float[Array, " n"]:
    """Structural similarity of images [n, H, W, C] in [0, 1], the mean over their channels.

    A Gaussian window of side 11 and width 1.5, narrower for images that are smaller (a choice).

    Source: Wang et al. 2004, computed by dm_pix.
    """
    side = min(WINDOW, *one.shape[1:3])
    size = side - (side % 2 == 0)
    return jnp.asarray(dm_pix.ssim(one, other, filter_size=size, filter_sigma=SIGMA))


def label_recovery(guess, true, num_classes: int, there=None) -> Float[Array, ""]:
    """The share of the true labels [n] among those guessed [m], each as often as it is there.

    Of m guesses as many can be right; `there` [n] says which of the true ones count (None: all).

    >>> float(label_recovery(jnp.array([3, 3, 1, 0]), jnp.array([3, 1, 1, 2]), 4))
    0.5
    """
    guess, true = guess.reshape(-1), true.reshape(true.shape[0], -1)
    mask = jnp.ones(true.shape) if there is None else there[:, None] * jnp.ones(true.shape)
    guessed = jnp.bincount(guess, length=num_classes)
    held = jnp.bincount(true.reshape(-1), mask.reshape(-1), length=num_classes)
    possible = jnp.minimum(guess.shape[0], mask.sum())
    return jnp.minimum(guessed, held).sum() / jnp.maximum(possible, 1)


def identified(guess, match, ids, pool) -> Float[Array, " n"]:
    """Whether the nearest of all training inputs `pool [T, ...]` is the true one, `ids [n]`.

    The precision with which an observer that holds the candidates names the right one.

    Source: Geiping et al. 2020, Section 6.1 (image identification precision).
    """
    chosen = guess[match].reshape(match.shape[0], -1)
    candidates = pool.reshape(pool.shape[0], -1)
    squares = jnp.sum(candidates**2, axis=1)
    nearest = jnp.argmin(squares[None] - 2.0 * chosen @ candidates.T, axis=1)
    return (nearest == ids).astype(jnp.float32)

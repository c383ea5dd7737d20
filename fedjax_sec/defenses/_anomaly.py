"""The cross-client check of FedML's anomaly detection: distances from a reference, a threshold."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from fedjax_sec.ops import distances, iterative
from fedjax_sec.ops.moments import inverse_power, weighted_mean

#: A score that exceeds the threshold by this share of the mean is equal to it but for rounding.
ROUNDING = 1e-6


def krum_reference(features, valid):
    """The mean [F] of the ``ceil(n / 2) - 1`` rows with the lowest Krum scores, one at least.

    A score is the sum of the squared distances to the ``ceil(n / 2) - 1`` nearest other rows. Of
    equal scores the lower row counts as lower.

    Source: `three_sigma_defense.py` (`compute_avg_with_krum`) and `common/utils.py`
    (`compute_krum_score`) of FedML.

    >>> x = jnp.array([[0.0], [1.0], [2.0], [3.0], [90.0]])
    >>> krum_reference(x, jnp.ones(5, bool)).tolist()
    [1.5]
    """
    count = jnp.maximum(-(-valid.sum() // 2) - 1, 1)
    squares, _ = distances.squared_distances(features, valid)
    scores = distances.krum_scores(squares, valid, count)
    place = jnp.argsort(jnp.argsort(scores, stable=True))
    return mean_of(features, valid & (place < count))


def mean_of(features, rows):
    """The plain mean [F] of the rows [K] of a mask."""
    return weighted_mean(features, rows.astype(features.dtype))


def distances_to(features, reference, valid):
    """The distances [K] from the reference; zero for rows that are not valid.

    Those beyond the largest float are that: an infinite one would lift the threshold to infinity.
    """
    apart = iterative.distances_from(features, reference)
    return jnp.where(valid, jnp.minimum(apart, jnp.finfo(apart.dtype).max), 0.0)


class Scores(NamedTuple):
    """How many scores there were, their mean and their standard deviation (n - 1)."""

    count: Array
    mean: Array
    deviation: Array


def no_scores() -> Scores:
    """Before any."""
    return Scores(*jnp.zeros(3))


def summary(scores, rows) -> Scores:
    """Of the scores [K] of a mask. Huge ones are scaled, so that their squares stay finite.

    >>> [float(x) for x in summary(jnp.array([1.0, 3.0, 9.0]), jnp.array([True, True, False]))]
    [2.0, 2.0, 1.4142135381698608]
    """
    scores = jnp.where(rows, scores, 0.0)
    scale = inverse_power(jnp.abs(scores).max())
    count = rows.sum().astype(scores.dtype)
    scaled = scores * scale
    mean = scaled.sum() / jnp.maximum(count, 1)
    squares = jnp.where(rows, (scaled - mean) ** 2, 0.0).sum()
    return Scores(count, mean / scale, jnp.sqrt(squares / jnp.maximum(count - 1, 1)) / scale)


def pooled(one: Scores, other: Scores) -> Scores:
    """Of both samples together.

    >>> one, all_true = jnp.array([1.0, 3.0, 8.0]), jnp.ones(3, bool)
    >>> parts = pooled(summary(one[:2], all_true[:2]), summary(one[2:], all_true[2:]))
    >>> bool(jnp.allclose(jnp.stack(parts), jnp.stack(summary(one, all_true))))
    True
    """
    count = one.count + other.count
    gap = other.mean - one.mean
    scale = inverse_power(jnp.maximum(jnp.abs(gap), jnp.maximum(one.deviation, other.deviation)))
    squares = sum(jnp.maximum(s.count - 1, 0) * (s.deviation * scale) ** 2 for s in (one, other))
    both = one.count * other.count / jnp.maximum(count, 1)
    squares = squares + both * (gap * scale) ** 2
    mean = one.mean + gap * (other.count / jnp.maximum(count, 1))
    return Scores(count, mean, jnp.sqrt(squares / jnp.maximum(count - 1, 1)) / scale)


def exceeds(scores, limits: Scores, num_deviations):
    """Which scores [K] lie more than so many standard deviations above the mean.

    Scores that do so by rounding do not: of equal scores none exceeds their mean.
    """
    slack = ROUNDING * jnp.abs(limits.mean)
    # Halved: beyond half the largest float the threshold itself would be infinite.
    limit = 0.5 * limits.mean + 0.5 * slack + num_deviations * (0.5 * limits.deviation)
    return 0.5 * scores > limit

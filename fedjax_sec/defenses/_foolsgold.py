"""FoolsGold's scores (Fung et al., RAID 2020), which two defences use."""

import jax.numpy as jnp

from fedjax_sec.ops import distances
from fedjax_sec.ops.moments import row_norms, unit_rows

#: 1 - cosine, or 1 - an alpha relative to the largest, below this is rounding in float32, and
#: counts as no difference at all.
ROUNDING = 1e-5
#: Replaces an alpha of 1 before the logit; the paper leaves it.
CEILINGS = {"author": 0.99, "fedsecurity": 0.999999}


def logits(rows, usable, convention: str):
    r"""``ln(a / (1 - a)) + 0.5`` [K] of a, each client's alpha relative to the largest.

    From the vectors [K, F] that are compared. Infinite for an a of 1 without a ceiling; of clients
    that are not usable it is that of an alpha of zero. The second result says whether any alpha is
    above zero.

    >>> rows = jnp.array([[1.0, 0.0], [0.5, 0.75**0.5]])
    >>> value, _ = logits(rows, jnp.ones(2, bool), "author")
    >>> value.round(2).tolist()
    [5.099999904632568, 5.099999904632568]
    """
    others = usable[:, None] & usable[None, :] & ~jnp.eye(usable.shape[0], dtype=bool)
    if convention == "fedsecurity":
        alpha = jnp.where(usable, jnp.maximum(_alpha_of_near(rows, usable, others), 1e-15), 0.0)
    else:
        alpha = _alpha(rows, usable, others, 1e-5 if convention == "author" else 0.0)
    top = alpha.max()
    share = alpha / jnp.where(top > 0, top, 1.0)
    # Two clients nearest to each other have one alpha, and rounding would tell their logits apart.
    share = jnp.where(share > 1.0 - ROUNDING, 1.0, share)
    odds = share / jnp.where(share < 1.0, 1.0 - share, 1.0)
    epsilon, best = 1e-5 if convention == "author" else 0.0, jnp.inf
    if (ceiling := CEILINGS.get(convention)) is not None:
        best = ceiling / (1 - ceiling) + epsilon
    return jnp.log(jnp.where(share < 1.0, odds + epsilon, best)) + 0.5, top > 0


def _alpha(rows, usable, others, epsilon):
    """1 - the largest pardoned cosine [K]."""
    cosines = jnp.where(others, distances.cosine_similarities(rows, usable), 0.0)
    largest = cosines.max(axis=1) + epsilon
    pardoned = largest[:, None] < largest[None, :]
    ratio = largest[:, None] / jnp.where(largest > 0, largest, 1.0)[None, :]
    cosines = jnp.where(pardoned, cosines * ratio, cosines)
    alpha = jnp.clip(1.0 - cosines.max(axis=1), 0.0, 1.0)
    return jnp.where(usable & (alpha > ROUNDING), alpha, 0.0)


def _alpha_of_near(rows, usable, others):
    """The same for vectors that are nearly parallel, as last layers of models are.

    Not from cosines, whose difference from 1 is lost in float32, but from gaps
    :math:`g_{ij} = 1 - c_{ij} = |e_i - e_j|^2 / 2` of the directions e, with which a pardoned
    :math:`1 - c_{ij} v_i / v_j` is :math:`(v_j - v_i + g_{ij} v_i) / v_j`.
    """
    safe = jnp.where(usable[:, None], rows, 0.0)
    norms = row_norms(safe)
    some = usable & (norms > 0)
    squares, scale = distances.squared_distances(unit_rows(safe, norms), some)
    gaps = jnp.where(others & some[:, None] & some[None, :], 0.5 * squares / scale**2, 1.0)
    least = gaps.min(axis=1)  # 1 - v
    pardoned = least[:, None] > least[None, :]
    ratio = jnp.where(least < 1.0, 1.0 - least, 1.0)[None, :]
    more = (least[:, None] - least[None, :] + gaps * (1.0 - least)[:, None]) / ratio
    return jnp.clip(jnp.where(pardoned, more, gaps).min(axis=1), 0.0, 1.0)

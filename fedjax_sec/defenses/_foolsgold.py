"""FoolsGold's scores (Fung et al., RAID 2020), which two defences use."""

import jax.numpy as jnp

#: 1 - cosine below this is rounding in float32, and counts as no difference at all.
ROUNDING = 1e-5
#: Replaces an alpha of 1 before the logit; the paper leaves it.
CEILINGS = {"author": 0.99, "fedsecurity": 0.999999}


def logits(cosines, usable, convention: str):
    r"""``ln(a / (1 - a)) + 0.5`` [K] of a, each client's alpha relative to the largest.

    From the cosines [K, K]. Infinite for an a of 1 without a ceiling; of clients that are not
    usable it is that of an alpha of zero. The second result says whether any alpha is above zero.

    >>> value, _ = logits(jnp.array([[1.0, 0.5], [0.5, 1.0]]), jnp.ones(2, bool), "author")
    >>> value.round(2).tolist()
    [5.099999904632568, 5.099999904632568]
    """
    clients = usable.shape[0]
    epsilon = 1e-5 if convention == "author" else 0.0
    others = usable[:, None] & usable[None, :] & ~jnp.eye(clients, dtype=bool)
    cosines = jnp.where(others, cosines, 0.0)
    largest = cosines.max(axis=1) + epsilon
    pardoned = largest[:, None] < largest[None, :]
    ratio = largest[:, None] / jnp.where(largest > 0, largest, 1.0)[None, :]
    cosines = jnp.where(pardoned, cosines * ratio, cosines)
    alpha = jnp.clip(1.0 - cosines.max(axis=1), 0.0, 1.0)
    alpha = jnp.where(usable & (alpha > ROUNDING), alpha, 0.0)
    if convention == "fedsecurity":
        alpha = jnp.where(usable, jnp.maximum(alpha, 1e-15), 0.0)
    top = alpha.max()
    share = alpha / jnp.where(top > 0, top, 1.0)
    odds = share / jnp.where(share < 1.0, 1.0 - share, 1.0)
    best = jnp.inf
    if (ceiling := CEILINGS.get(convention)) is not None:
        best = ceiling / (1 - ceiling) + epsilon
    return jnp.log(jnp.where(share < 1.0, odds + epsilon, best)) + 0.5, top > 0

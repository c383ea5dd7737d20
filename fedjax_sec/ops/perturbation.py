"""The perturbation range of *A Little Is Enough*."""

import jax.numpy as jnp
from jax.scipy.special import ndtri


def z_max(num_clients, num_malicious, convention: str = "text"):
    r"""Largest number of standard deviations that still leaves the attacker the median.

    With `s = floor(n / 2 + 1) - m` honest clients to win over,

    .. math:: z_{max} = \Phi^{-1}((n - s) / n) \quad (text), \qquad
              z_{max} = \Phi^{-1}((n - m - s) / (n - m)) \quad (neurips).

    Args: `num_clients` n and `num_malicious` m, integers or integer arrays; s is taken as at
    least 1, since the formula has no finite value for an attacker who already has the majority.

    Source: Baruch et al. 2019, Algorithm 3 ("text": arXiv version, whose example gives 1.75 for
    n = 50, m = 24; "neurips": the published version).

    >>> print(f"{z_max(50, 24):.2f} {z_max(50, 24, 'neurips'):.2f}")
    1.75 1.43
    """
    n, m = jnp.asarray(num_clients), jnp.asarray(num_malicious)
    s = jnp.maximum(n // 2 + 1 - m, 1)
    if convention == "neurips":
        return ndtri(jnp.maximum(n - m - s, 0) / jnp.maximum(n - m, 1))
    return ndtri((n - s) / n)

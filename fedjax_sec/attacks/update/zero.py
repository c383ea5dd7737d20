"""Zero updates: the malicious clients contribute nothing."""

import jax.numpy as jnp

from fedjax_sec.core import UpdateAttack, registry


@registry.attacks.register("zero")
class Zero(UpdateAttack):
    r"""Every malicious client sends the zero update, u_mal = 0.

    `updates [K, D] -> [K, D]`; it slows training by diluting the honest updates.

    Source: the "zero" mode of FedSecurity's Byzantine attack (Han et al. 2023), on updates
    instead of weights.

    Example:
        >>> import fedjax_sec
        >>> print(fedjax_sec.attack([[1.0], [2.0]], "zero", malicious=[True, False])[:, 0])
        [0. 2.]
    """

    separable = True

    def apply(self, key, updates, state, view):
        return jnp.zeros_like(updates), state, {}

"""The fast gradient sign method."""

import jax
import jax.numpy as jnp

from fedjax_sec.attacks.evasion._attempts import Attempts
from fedjax_sec.core import registry


@registry.evasions.register("fgsm")
class Fgsm(Attempts):
    r"""One step of the whole radius along the sign of the loss's gradient.

    .. math:: x' = \Pi_{[0, 1]} (x + \epsilon\, \mathrm{sign}\, \nabla_x L(x))

    `x [B, ...] -> x' [B, ...]`, pixels in [0, 1]. There is nothing random in it, so restarts
    find the same.

    Raises: `ConfigError` for more targets than there are wrong classes, or `dlr` with too few.

    Source: Goodfellow, Shlens, Szegedy: Explaining and harnessing adversarial examples (ICLR 2015).

    Example:
        >>> from fedjax_sec.core import registry
        >>> logits = lambda x: x @ jnp.array([[1.0, -1.0], [0.0, 0.5]])
        >>> fgsm = registry.evasions.build({"name": "fgsm", "eps": 0.25})
        >>> x, y = jnp.array([[0.5, 0.5]]), jnp.array([0])
        >>> fgsm.apply(jax.random.key(0), logits, x, y).tolist()
        [[0.25, 0.75]]
    """

    def search(self, key, value, x):
        slope = jax.grad(lambda inputs: value(inputs).sum())(x)
        return jnp.clip(x + self.eps * jnp.sign(slope), 0.0, 1.0)

"""Random noise: what an attack must beat."""

import jax
import jax.numpy as jnp

from fedjax_sec.attacks.evasion._attempts import worst_of
from fedjax_sec.core import Evasion, numeric, registry, static


@registry.evasions.register("noise")
class Noise(Evasion):
    r"""The worst of several random inputs in the L-infinity ball; no gradient is used.

    Each is x + eps u with every u uniform in [-1, 1] (`uniform`) or +-1 (`corners`), cut to [0, 1];
    the input with the smallest margin is kept. `x [B, ...] -> x' [B, ...]`.

    Source: Carlini et al.: On evaluating adversarial robustness (2019), Section 5.3: a random
    search has to do worse than an attack that sees gradients.

    Example:
        >>> from fedjax_sec.core import registry
        >>> noise = registry.evasions.build({"name": "noise", "eps": 0.25})
        >>> x, y = jnp.array([[0.5, 0.5]]), jnp.array([0])
        >>> moved = noise.apply(jax.random.key(0), lambda x: x, x, y)
        >>> bool(jnp.abs(moved - x).max() <= 0.25)
        True
    """

    inputs = frozenset({"pixels"})
    eps: float = numeric(
        0.3, "Radius of the L-infinity ball, pixels in [0, 1].", low=0, high=1, pixels=True
    )
    tries: int = static(100, "Inputs tried.", low=1, high=10**6)
    kind: str = static("corners", "Where in the ball.", choices=("corners", "uniform"))

    def apply(self, key, logits, x, y, surrogate=None):
        def find(number):
            draw = jax.random.uniform(jax.random.fold_in(key, number), x.shape, x.dtype, -1.0, 1.0)
            draw = jnp.sign(draw) if self.kind == "corners" else draw
            return jnp.clip(x + self.eps * draw, 0.0, 1.0)

        return worst_of(self.tries, find, logits, x, y)

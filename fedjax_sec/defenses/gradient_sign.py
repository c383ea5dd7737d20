"""Only the signs of what a client sends (Bernstein et al., ICML 2018)."""

import jax.numpy as jnp

from fedjax_sec.core import ANY_SCALE, Hooks, Stage, numeric, registry, static


@registry.defenses.register("gradient_sign")
class GradientSign(Stage):
    r"""Each client sends the signs of its update, times one number: a stage of training.

    .. math:: \Delta \leftarrow s \, \mathrm{sign}(\Delta), \qquad s = scale
              \text{, or } \frac{1}{T} \|\Delta\|_1 \text{ where it is null}

    `[T] -> [T]`, once behind all local steps: one bit a coordinate. With a fixed scale the length
    of the update is hidden too. Malicious clients follow only with `malicious_follow`.

    Source: Bernstein et al. 2018 (signSGD), Algorithm 1, sends the signs; the mean size as scale is
    that of EF-signSGD (Karimireddy et al. 2019, Algorithm 1), without its memory of the error.

    Example:
        >>> from fedjax_sec.core import registry
        >>> registry.defenses.build({"name": "gradient_sign", "scale": 0.01}).stage
        'client'
    """

    stage = "client"
    scale: float | None = numeric(
        None, "Size of every entry (null: the mean size).", above=0, unbounded=ANY_SCALE
    )
    malicious_follow: bool = static(False, "Whether malicious clients do so as well.")

    def hooks(self, view):
        def send(key, delta):
            scale = jnp.abs(delta).mean() if self.scale is None else self.scale
            return scale * jnp.sign(delta)

        return Hooks(send=send)

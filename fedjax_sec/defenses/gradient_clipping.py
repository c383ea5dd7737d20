"""Clipping of what a client sends, by the client."""

import jax.numpy as jnp

from fedjax_sec.core import ANY_SCALE, Hooks, Stage, numeric, registry, static


@registry.defenses.register("gradient_clipping")
class GradientClipping(Stage):
    r"""Each client shortens its update to a bound before it sends it: a stage of training.

    .. math:: \Delta \leftarrow \Delta \min(1, M / \|\Delta\|_2)

    `[T] -> [T]`, once behind all local steps. `clip_norm` is the same done by the server, which
    then has seen the length. Malicious clients follow only with `malicious_follow`.

    Source: McMahan et al. 2018 (Learning differentially private recurrent language models), Section
    2.3; M = 1 is a choice.

    Example:
        >>> from fedjax_sec.core import registry
        >>> registry.defenses.build({"name": "gradient_clipping", "max_norm": 0.5}).stage
        'client'
    """

    stage = "client"
    max_norm: float = numeric(1.0, "M, the largest L2 norm.", above=0, unbounded=ANY_SCALE)
    malicious_follow: bool = static(False, "Whether malicious clients do so as well.")

    def hooks(self, view):
        def send(key, delta):
            length = jnp.linalg.norm(delta)
            over = length > self.max_norm
            return delta * jnp.where(over, self.max_norm / jnp.where(over, length, 1.0), 1.0)

        return Hooks(send=send)

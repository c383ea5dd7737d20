"""Pruning of what a client sends (Zhu, Liu and Han, 2019)."""

import jax.numpy as jnp

from fedjax_sec.core import Hooks, Stage, numeric, registry, static
from fedjax_sec.defenses._sending import tensors_of, without_smallest


@registry.defenses.register("gradient_pruning")
class GradientPruning(Stage):
    r"""Each client sets the smallest entries of every tensor it sends to zero: a stage of training.

    In each tensor, entries whose size is below the `share`-quantile of the sizes become 0. `[T] ->
    [T]`, once behind all local steps; nothing is added to later rounds. Malicious clients follow
    only with `malicious_follow`.

    Source: Zhu et al. 2019 (Deep leakage from gradients), Section 5.2: from 20% on reconstructions
    show artefacts, and from 30% on they fail; its shares are 0.01 to 0.7. By tensor: the baseline
    in the author code of Soteria (Sun et al. 2021), 0.1 to 0.9.

    Example:
        >>> from fedjax_sec.core import registry
        >>> registry.defenses.build("gradient_pruning").share
        0.3
    """

    stage = "client"
    share: float = numeric(0.3, "Share of a tensor's entries that become 0.", low=0, high=1)
    malicious_follow: bool = static(False, "Whether malicious clients do so as well.")

    def idle(self, setting):
        return "gradient_pruning would do nothing: its share is 0." if self.share == 0 else None

    def hooks(self, view):
        places = tensors_of(view.task.space)

        def send(key, delta):
            return jnp.concatenate([without_smallest(delta[p], self.share) for p in places])

        return Hooks(send=send)

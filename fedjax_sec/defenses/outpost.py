"""Outpost: pruning, and noise where it hurts reconstruction most (Wang, Hugh and Li, 2023)."""

import jax
import jax.numpy as jnp

from fedjax_sec.core import ANY_SCALE, Hooks, Stage, numeric, registry, static
from fedjax_sec.defenses._sending import rate_of, tensors_of, without_smallest


@registry.defenses.register("outpost")
class Outpost(Stage):
    r"""Each client prunes its update and adds noise by a risk of each tensor: a stage of training.

    In the tensor l of the update, with g its gradient, :math:`- \Delta / \eta`, entries whose size
    is below the `prune_share`-quantile of the tensor become 0, and then those whose squared
    gradient is among the `noise_share` largest of the whole model get Gaussian noise of the
    standard deviation

    .. math:: std \cdot \min(1, \mathrm{Var}(w_l))

    with w_l the tensor's parameters. `[T] -> [T]`, once behind all local steps, in units of a
    gradient where the client takes plain gradient steps. Malicious clients follow only with
    `malicious_follow`.

    Source: Wang, Hugh, Li 2023 (More than enough is too much: adaptive defenses against gradient
    leakage in production federated learning); its text was not at hand. Definition: the author code
    (Plato, `examples/gradient_leakage_attacks/defense/Outpost/perturb.py`), whose function returns
    the gradients that it was given, without what it computed, and takes the mean of the squares
    over a tensor's first axis; here each entry has its own. The defaults are choices: it has none.
    That the risk decays over rounds is left to a schedule of `std`.

    Example:
        >>> from fedjax_sec.core import registry
        >>> registry.defenses.build({"name": "outpost", "std": 0.5}).stage
        'client'
    """

    stage = "client"
    std: float = numeric(0.1, "Factor of the noise.", low=0, unbounded=ANY_SCALE)
    noise_share: float = numeric(0.4, "Share of all entries that get noise.", low=0, high=1)
    prune_share: float = numeric(0.8, "Share of a tensor's entries that become 0.", low=0, high=1)
    malicious_follow: bool = static(False, "Whether malicious clients do so as well.")

    def hooks(self, view):
        places, part = tensors_of(view.task.space), view.task.space.trained
        weights, rate = view.params[part], rate_of(view.client)

        def send(key, delta):
            noisy = delta**2 >= jnp.quantile(delta**2, 1 - self.noise_share)
            risk = jnp.concatenate(
                [jnp.full(p.stop - p.start, jnp.minimum(1.0, jnp.var(weights[p]))) for p in places]
            )
            pruned = jnp.concatenate([without_smallest(delta[p], self.prune_share) for p in places])
            noise = rate * self.std * risk * jax.random.normal(key, delta.shape, delta.dtype)
            return pruned + jnp.where(noisy, noise, 0.0)

        return Hooks(send=send)

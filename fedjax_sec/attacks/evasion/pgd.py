"""Projected gradient descent on inputs, with restarts, momentum, targets and scaled logits."""

import jax
import jax.numpy as jnp

from fedjax_sec.attacks.evasion._attempts import Attempts
from fedjax_sec.core import numeric, registry, static
from fedjax_sec.ops.pgd import linf_pgd


@registry.evasions.register("pgd")
class Pgd(Attempts):
    r"""Steps along the sign of the loss's gradient inside the L-infinity ball.

    .. math:: x_{t+1} = \Pi \left( x_t + \alpha\, \mathrm{sign}\, g_{t+1} \right)

    with :math:`g_{t+1} = \nabla L(x_t)`, or with `momentum` mu
    :math:`g_{t+1} = \mu g_t + \nabla L(x_t) / \|\nabla L(x_t)\|_1`. Of all restarts and targets
    the last input with the smallest margin is kept. `x [B, ...] -> x' [B, ...]` in [0, 1].

    Gradients that vanish move nothing: a model distilled at temperature T has logits T times too
    large and looks robust for this reason, which `logit_scale` 1/T undoes.

    Raises: `ConfigError` for more targets than there are wrong classes, or `dlr` with too few.

    Source: Madry et al. 2018; defaults are those of Zizzo et al. 2020 (FAT), Table 1, MNIST. Its
    thorough evaluation is `restarts: 40, steps: 100` (Section 2.1). Momentum: Dong et al.: Boosting
    adversarial attacks with momentum (CVPR 2018), Algorithm 1, mu 1 there. Scaled logits: Carlini
    and Wagner: Defensive distillation is not robust to adversarial examples (2016).

    Example:
        >>> from fedjax_sec.core import registry
        >>> pgd = registry.evasions.build({"name": "pgd", "eps": 0.25, "random_start": False})
        >>> logits = lambda x: x @ jnp.array([[1.0, -1.0], [0.0, 0.5]])
        >>> x, y = jnp.array([[0.5, 0.5]]), jnp.array([0])
        >>> pgd.apply(jax.random.key(0), logits, x, y).tolist()
        [[0.25, 0.75]]
    """

    step_size: float = numeric(0.01, "alpha, pixels in [0, 1].", low=0, high=1, pixels=True)
    steps: int = static(40, "Gradients of a search.", low=1, high=10**6)
    random_start: bool = static(True, "Start anywhere in the ball.")
    momentum: float | None = numeric(
        None, "mu: what a step's direction keeps of those before (null: nothing).", low=0, high=1e3
    )

    def search(self, key, value, x):
        slope = jax.grad(lambda inputs: value(inputs).sum())

        def direction(moved, memory):
            slopes = slope(moved)
            size = jnp.abs(slopes).sum(axis=tuple(range(1, x.ndim)), keepdims=True)
            memory = self.momentum * memory + slopes / jnp.maximum(size, 1e-30)
            return memory, memory

        recalls = self.momentum is not None
        return linf_pgd(
            direction if recalls else slope,
            x,
            key,
            eps=self.eps,
            step_size=self.step_size,
            num_steps=self.steps,
            random_start=self.random_start,
            memory=jnp.zeros_like(x) if recalls else None,
        )

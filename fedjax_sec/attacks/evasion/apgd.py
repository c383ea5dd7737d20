"""Auto-PGD: PGD that chooses its own step size."""

from fedjax_sec.attacks.evasion._attempts import Attempts
from fedjax_sec.core import numeric, registry, static
from fedjax_sec.ops.evasion import linf_apgd


@registry.evasions.register("apgd")
class Apgd(Attempts):
    r"""Projected gradient ascent with momentum, whose step size is halved where it gets stuck.

    See `fedjax_sec.ops.evasion.linf_apgd`. `x [B, ...] -> x' [B, ...]`, pixels in [0, 1]. APGD-CE
    is the default, APGD-DLR is `loss: dlr`, APGD-T is `loss: dlr, targets: 9`; AutoAttack's
    standard version runs APGD-CE and APGD-T (and two attacks that are not here).

    Raises: `ConfigError` for more targets than there are wrong classes, or `dlr` with too few.

    Source: Croce and Hein 2020, Algorithm 1; 100 steps and rho 0.75 as there, one restart as in the
    standard version. The step size is halved where the value rose in fewer than rho of the steps,
    the paper's Condition 1; AutoAttack's code (`autopgd_base.py`, `check_oscillation`) halves at
    equality too.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedjax_sec.core import registry
        >>> apgd = registry.evasions.build({"name": "apgd", "eps": 0.25, "steps": 20})
        >>> logits = lambda x: x @ jnp.array([[1.0, -1.0], [0.0, 0.5]])
        >>> x, y = jnp.array([[0.5, 0.5]]), jnp.array([0])
        >>> apgd.apply(jax.random.key(0), logits, x, y).tolist()
        [[0.25, 0.75]]
    """

    steps: int = static(100, "Gradients of a search, after the first.", low=1, high=10**6)
    rho: float = numeric(0.75, "Share of the steps in which the value has to rise.", low=0, high=1)

    def search(self, key, value, x):
        return linf_apgd(value, x, key, eps=self.eps, num_steps=self.steps, rho=self.rho)

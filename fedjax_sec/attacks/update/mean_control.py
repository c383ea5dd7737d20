"""One client sets the mean to whatever it wants (Blanchard et al., NeurIPS 2017, Lemma 1)."""

import jax.numpy as jnp

from fedjax_sec.attacks.update._perturbation import check_statistics, counted
from fedjax_sec.core import ANY_SCALE, UpdateAttack, numeric, registry, static
from fedjax_sec.ops.moments import weighted_mean


@registry.attacks.register("mean_control")
class MeanControl(UpdateAttack):
    r"""Chooses the malicious updates so that the unweighted mean of all becomes -scale times mu.

    .. math:: u_{mal} = \frac{1}{m} \left( -n \cdot scale \cdot \mu - (n - m) \mu \right)

    where mu, the mean of the updates the adversary sees, its own too, stands for the honest mean;
    with `statistics: honest` it is that mean itself. `updates [K, D] -> [K, D]`. Any defence that
    looks at distances finds such rows at once; it is aimed at no defence.

    Raises: `ConfigError` when `statistics` is `honest` and the adversary sees no honest client.

    Source: Blanchard et al. 2017, Lemma 1 (no linear rule tolerates a single Byzantine client);
    the reversed mean as its goal is a choice.

    Example:
        >>> import fedjax_sec
        >>> updates = [[1.0], [1.0], [1.0], [1.0]]
        >>> out = fedjax_sec.attack(updates, "mean_control", malicious=[True, False, False, False])
        >>> print(out.mean())
        -1.0
    """

    scale: float = numeric(
        1.0, "The mean becomes -scale times the honest mean.", low=0, unbounded=ANY_SCALE
    )
    statistics: str = static(
        "seen",
        "Whose updates: of all clients that are `seen`, the adversary's too, or `honest` only.",
        choices=("seen", "honest"),
    )

    def check(self, path, setting):
        check_statistics(path, self.statistics, setting)

    def apply(self, key, updates, state, view):
        n = updates.shape[0]
        m = jnp.maximum(view.malicious.sum(), 1)
        mean = weighted_mean(updates, counted(self, view).astype(updates.dtype))
        crafted = -(n * self.scale + n - m) / m * mean
        return jnp.broadcast_to(crafted, updates.shape), state, {}

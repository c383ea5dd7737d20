"""A Little Is Enough: the convergence attack (Baruch et al., NeurIPS 2019)."""

import jax.numpy as jnp

from fedjax_sec.attacks.update._directed import own_update_alone
from fedjax_sec.attacks.update._perturbation import (
    check_statistics,
    check_z_max,
    perturbation_range,
)
from fedjax_sec.core import UpdateAttack, numeric, registry, static


@registry.attacks.register("alie")
class Alie(UpdateAttack):
    r"""All malicious clients send the mean plus z standard deviations, coordinate by coordinate.

    .. math:: u_{mal} = \mu + z \sigma

    with mu and sigma over the updates the adversary sees (`threat.knowledge`: the corrupted
    clients' own, or all). `updates [K, D] -> [K, D]`. For a gradient descent step this is
    mu_g - z sigma_g on gradients, the sign of the author code. z may be negative.

    Raises: `ConfigError` when z is to be computed but the formula has no finite positive value;
    when the adversary sees a single update, since the attack would send just that; when
    `statistics` is `honest` and it sees no honest client.

    Source: Baruch et al. 2019, Algorithm 3, over the corrupted workers' updates; z = null computes
    z_max from n and m (line 3). The text does not say which standard deviation: `ddof` 0 as in the
    author code. An adversary that sees all counts its own updates too, a choice; `statistics:
    honest` leaves them out, as FLPoison (`attackers/alie.py`), Blades
    (`adversaries/alie_adversary.py`) and ByzFL (`attacks/attacks.py`) do, the latter two with
    `ddof` 1.

    Example:
        >>> import fedjax_sec
        >>> updates = [[0.0], [2.0], [5.0], [6.0], [7.0]]
        >>> mask = [True, True, False, False, False]
        >>> print(fedjax_sec.attack(updates, "alie", malicious=mask, z=1.5)[:, 0])
        [2.5 2.5 5.  6.  7. ]
    """

    z: float | None = numeric(
        None, "Standard deviations from the mean (null: z_max).", low=-1e6, high=1e6
    )
    z_formula: str = static(
        "text",
        "z_max: `text` (n - s)/n, `neurips` (n - m - s)/(n - m), with s = floor(n/2 + 1) - m.",
        choices=("text", "neurips"),
    )
    ddof: int = static(0, "Divisor of the variance is (count - ddof).", low=0, high=1)
    statistics: str = static(
        "seen",
        "Whose updates: of all clients that are `seen`, the adversary's too, or `honest` only.",
        choices=("seen", "honest"),
    )

    def check(self, path, setting):
        if self.z is None:
            check_z_max(path, self.z_formula, setting)
        check_statistics(path, self.statistics, setting)

    def idle(self, setting):
        return own_update_alone(self.registered_name, setting)

    def apply(self, key, updates, state, view):
        mean, std, z = perturbation_range(self, updates, view)
        crafted = jnp.broadcast_to(mean + z * std, updates.shape)
        return crafted, state, {"z": jnp.asarray(z, jnp.float32)}

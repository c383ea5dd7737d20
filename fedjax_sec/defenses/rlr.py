"""The robust learning rate (Ozdayi, Kantarcioglu and Gel, AAAI 2021)."""

import jax.numpy as jnp

from fedjax_sec.core import COUNT, ConfigError, Stage, numeric, registry
from fedjax_sec.ops.signs import sign_votes


@registry.defenses.register("rlr")
class Rlr(Stage):
    r"""Reverses the aggregate where too few clients agree on its sign: a stage after aggregation.

    .. math:: agg_j \leftarrow \begin{cases} agg_j &
              |\sum_i \mathrm{sgn}(u_{ij})| \ge \theta \\ -agg_j & \text{otherwise} \end{cases}

    `[D] -> [D]`, behind any aggregator. The votes are those of the stack that was aggregated (after
    `clip_norm`, which keeps signs), one a client whatever its weight; clients whose update is not
    finite do not vote. A zero is no vote. `threshold=0` reverses nothing, so a schedule over rounds
    turns the defence on or off: `threshold: {schedule: steps, values: {0: 0, 100: 4}}`. The metric
    `rlr/flipped` is the share of reversed coordinates.

    With noise there are two orders. Equation 5 in place of eta in Equation 2, and the author code
    (`aggregation.py`, `aggregate_updates`), reverse the noise too: `[mean, gaussian_noise, rlr]`.
    In `[mean, rlr, gaussian_noise]` it is added afterwards; as the noise is symmetric and
    independent of the votes, the two differ in the numbers drawn, not in distribution.

    Raises: `ConfigError` when the threshold exceeds K, the most that K signs can add up to.

    Source: Ozdayi et al. 2021, "Defending against Backdoors in Federated Learning with Robust
    Learning Rate", Equations 5 and 6. The sentence before Equation 5 speaks of the sum of signs
    without its absolute value; equation and author code (`compute_robustLR`) take it, and without
    it coordinates on which all clients agree to go down would be reversed. The default is
    the authors' for 10 agents (`runner.sh`).

    Example:
        >>> import fedjax_sec
        >>> updates = [[1.0, 1.0], [2.0, 2.0], [3.0, -6.0]]
        >>> print(fedjax_sec.aggregate(updates, ["mean", {"name": "rlr", "threshold": 2}]))
        [2. 1.]
    """

    stage = "after"
    threshold: float = numeric(
        4.0, "theta, the least |sum of signs| that is trusted.", low=0, high=COUNT
    )

    def check(self, path, setting):
        if self.threshold > setting.num_clients:
            raise ConfigError(
                f"{path}.threshold must be <= K = {setting.num_clients}, the most that the signs "
                f"of the clients in a round can add up to, got {self.threshold}: every coordinate "
                f"would be reversed in every round."
            )

    def apply(self, key, aggregate, updates, state, view):
        trusted = jnp.abs(sign_votes(updates, view.valid)) >= self.threshold
        flipped = jnp.mean(~trusted, dtype=jnp.float32)
        return jnp.where(trusted, aggregate, -aggregate), state, {"flipped": flipped}

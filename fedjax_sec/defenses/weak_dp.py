"""Weak differential privacy: clipping and noise on the mean (Sun et al., 2019)."""

import jax
import jax.numpy as jnp

from fedjax_sec.core import (
    ANY_SCALE,
    Stage,
    numeric,
    refuse_unread,
    registry,
    static,
    with_statistics,
)
from fedjax_sec.defenses._layers import trained_columns
from fedjax_sec.ops.moments import row_norms, weighted_mean
from fedjax_sec.ops.precision import wide


@registry.defenses.register("weak_dp")
class WeakDp(Stage):
    r"""Mean of the updates clipped to norm M, with Gaussian noise on the mean.

    .. math:: agg = \frac{\sum_i n_i \, u_i \min(1, M / \|u_i\|_2)}{\sum_i n_i}
              + \mathcal{N}(0, \sigma^2 I)

    `updates [K, D] -> [D]`. Noise is drawn once a round, and sigma is absolute, in units of a
    parameter: `[clip_norm, mean, gaussian_noise]` is the same with sigma in units of M. `kept` is
    each client's factor. Clients whose update is not finite are left out. Running statistics do not
    count towards the norm, and get neither factor nor noise: Wang et al.'s code (`defense.py`)
    works on parameters alone.

    `convention="fedsecurity"` is FedML's class of that name (`weak_dp_defense.py`): nothing is
    clipped, and every client's model gets noise of its own, statistics too, so that of the mean has
    the standard deviation :math:`\sigma \sqrt{\sum_i p_i^2}`, with
    :math:`p_i = n_i / \sum_j n_j`; it is drawn at once, which is equal in distribution. In FedML it
    never acts: no hook calls it (`fedml_defender.py`).

    Raises: `ConfigError` for a `max_norm` that the convention does not read.

    Source: Sun et al. 2019, "Can You Really Backdoor Federated Learning?", Section 3. The paper
    tunes both values for each task. M = 5 and sigma = 0.025 are BackFed's defaults; the edge cases
    of Wang et al. 2020 run with 2 and 0.025 (`run_simulated_averaging.sh`).

    Example:
        >>> import fedjax_sec
        >>> rule = {"name": "weak_dp", "max_norm": 2.0, "std": 0.001}
        >>> print(fedjax_sec.aggregate([[3.0], [1.0]], rule).round(1))
        [1.5]
    """

    stage = "aggregate"
    noisy = True
    max_norm: float = numeric(
        5.0, "M, the largest L2 norm of an update.", above=0, unbounded=ANY_SCALE
    )
    std: float = numeric(
        0.025, "sigma, the noise's standard deviation.", low=0, unbounded=ANY_SCALE
    )
    weighted: bool = static(True, "Weight clients by their example counts.")
    convention: str = static(
        "paper",
        "`fedsecurity`: noise on every client's model and no clipping.",
        choices=("paper", "fedsecurity"),
    )

    def check(self, path, setting):
        if self.convention == "fedsecurity":
            refuse_unread(self, path, ("max_norm",), "with convention 'fedsecurity'")

    def apply(self, key, updates, state, view):
        dtype = wide(updates.dtype)
        weights = jnp.where(view.valid, view.weights if self.weighted else 1.0, 0.0).astype(dtype)
        factor, std = view.valid.astype(dtype), self.std
        if self.convention == "paper":
            norms = row_norms(trained_columns(updates, view).astype(dtype))
            factor = jnp.minimum(1.0, self.max_norm / jnp.maximum(norms, self.max_norm * 1e-6))
            factor = jnp.where(view.valid, factor, 0.0)
            shortened = updates * factor[:, None].astype(updates.dtype)
            updates = with_statistics(view.space, shortened, updates)
        else:
            shares = weights / jnp.maximum(weights.sum(), 1e-30)
            std = std * jnp.linalg.norm(shares)
        noise = jax.random.normal(key, updates.shape[1:], updates.dtype)
        mean = weighted_mean(updates, weights)
        aggregate = mean + (std * noise).astype(updates.dtype)
        if self.convention == "paper":
            aggregate = with_statistics(view.space, aggregate, mean)
        aggregate = jnp.where(view.valid.any(), aggregate, 0.0)
        return aggregate, state, {"kept": factor.astype(updates.dtype)}

"""Gaussian noise on the aggregate (Sun et al., 2019, weak differential privacy)."""

import jax

from fedjax_sec import registry
from fedjax_sec.schema import numeric


@registry.defenses.register("gaussian_noise")
class GaussianNoise:
    r"""Adds independent Gaussian noise to the aggregate: a stage after aggregation.

    .. math:: agg \leftarrow agg + \mathcal{N}(0, \sigma^2 I)

    `[D] -> [D]`. With `clip_norm` before it, this is "weak differential privacy".

    Source: Sun et al. 2019, Section 3, "(weak) differential privacy"; sigma is tuned there for
    each task, so the default is a choice.

    Example:
        >>> import fedjax_sec
        >>> noisy = ["clip_norm", "mean", {"name": "gaussian_noise", "std": 0.1}]
        >>> fedjax_sec.aggregate([[1.0, 1.0], [3.0, 3.0]], noisy).shape
        (2,)
    """

    stage = "after"
    std: float = numeric(0.001, "sigma, in units of the update.", low=0)

    def init(self, num_clients, dim):
        return ()

    def apply(self, key, aggregate, updates, state, view):
        noise = jax.random.normal(key, aggregate.shape, aggregate.dtype)
        return aggregate + self.std * noise, state, {}

"""Gaussian noise on the aggregate (Sun et al., 2019, weak differential privacy)."""

import jax

from fedjax_sec.core import ANY_SCALE, Stage, numeric, registry, with_statistics


@registry.defenses.register("gaussian_noise")
class GaussianNoise(Stage):
    r"""Adds independent Gaussian noise to the aggregate: a stage after aggregation.

    .. math:: agg \leftarrow agg + \mathcal{N}(0, \sigma^2 M^2 I)

    `[D] -> [D]`, drawn once a round. With `clip_norm` before it, this is "weak differential
    privacy"; `max_norm` is then the M to which updates are clipped, and sigma is relative to it.
    With the default of 1, sigma is in units of the update. Running statistics get no noise: a
    variance that it makes negative would be taken for zero.

    Source: Sun et al. 2019, Section 3, "(weak) differential privacy"; sigma is tuned there for
    each task, so the default is a choice. With M: Ozdayi et al. 2021, Equation 2.

    Example:
        >>> import fedjax_sec
        >>> noise = {"name": "gaussian_noise", "std": 0.1, "max_norm": 4.0}
        >>> noisy = [{"name": "clip_norm", "max_norm": 4.0}, "mean", noise]
        >>> fedjax_sec.aggregate([[1.0, 1.0], [3.0, 3.0]], noisy).shape
        (2,)
    """

    stage = "after"
    std: float = numeric(0.001, "sigma, in units of `max_norm`.", low=0, high=1e6)
    max_norm: float = numeric(
        1.0, "M, the norm to which updates are clipped.", above=0, unbounded=ANY_SCALE
    )

    def apply(self, key, aggregate, updates, state, view):
        noise = jax.random.normal(key, aggregate.shape, aggregate.dtype)
        noisy = aggregate + self.std * self.max_norm * noise
        return with_statistics(view.space, noisy, aggregate), state, {}

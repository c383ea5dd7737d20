"""Geometric median, also known as RFA (Pillutla, Kakade and Harchaoui, 2019)."""

import jax.numpy as jnp

from fedjax_sec.core import ANY_SCALE, Stage, numeric, registry, static
from fedjax_sec.ops import coordinatewise, iterative
from fedjax_sec.ops.moments import weighted_mean


@registry.defenses.register("geometric_median")
class GeometricMedian(Stage):
    r"""The point with the smallest (weighted) sum of distances to all updates: RFA.

    .. math:: agg = \arg\min_z \sum_i \alpha_i \|u_i - z\|, \qquad
       z \leftarrow \frac{\sum_i \beta_i u_i}{\sum_i \beta_i}, \quad
       \beta_i = \frac{\alpha_i}{\max(\nu, \|u_i - z\|)}

    approximated by `num_iterations` smoothed Weiszfeld steps over the whole vector (not layer by
    layer). `updates [K, D] -> [D]`; alpha are the example counts, or equal. `kept` is each client's
    share of the result relative to the largest. Clients whose update is not finite are left out.

    Source: Pillutla et al. 2019, arXiv:1912.13445, Algorithms 1 and 2. Four steps from the weighted
    mean are its author code's (`model.py`), nu = 1e-5 too. Few steps leave a far outlier visible:
    `start="median"` begins at the coordinate-wise median, a choice of ours.

    Example:
        >>> import fedjax_sec
        >>> defense = {"name": "geometric_median", "num_iterations": 100}
        >>> print(fedjax_sec.aggregate([[0.0], [1.0], [9.0]], defense).round(3))
        [1.]
    """

    stage = "aggregate"
    num_iterations: int = static(4, "Weiszfeld steps.", low=1, high=10**6)
    smoothing: float = numeric(
        1e-5, "nu, the smallest distance divided by.", above=0, unbounded=ANY_SCALE
    )
    weighted: bool = static(True, "Weight clients by their example counts.")
    start: str = static("mean", "Where the iteration begins.", choices=("mean", "median", "zero"))

    def apply(self, key, updates, state, view):
        weights = jnp.where(view.valid, view.weights if self.weighted else 1.0, 0.0)
        if self.start == "mean":
            begin = weighted_mean(updates, weights)
        elif self.start == "median":
            begin, _ = coordinatewise.median(updates, view.valid, with_kept=False)
        else:
            begin = jnp.zeros(updates.shape[1], updates.dtype)
        aggregate, share = iterative.geometric_median(
            updates, weights, begin, self.num_iterations, self.smoothing
        )
        return aggregate, state, {"kept": share / jnp.maximum(share.max(), 1e-30)}

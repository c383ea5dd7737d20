"""Geometric median, also known as RFA (Pillutla, Kakade and Harchaoui, 2019)."""

import jax.numpy as jnp

from fedjax_sec.core import (
    ANY_SCALE,
    Stage,
    numeric,
    refuse_unread,
    registry,
    static,
    tensors,
    trained_part,
)
from fedjax_sec.defenses import _fedsecurity
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
    Running statistics do not count towards distances, and follow the weights.

    `convention="fedsecurity"` is what FedML computes in its place (`RFA_defense.py`, and
    `compute_geometric_median` of `common/utils.py`), in three ways another thing. Every tensor of
    the model has its own median. Weights stand in a Python set: equal counts of examples leave one
    weight, paired with the first client, so the result is the update of the round's first client,
    whatever the others send; of u different counts the first u clients are used, with the counts'
    shares in the order of the set's hashes, as if drawn. And each step divides the last step's
    weights by the distances, not alpha, so that the factors multiply and a tensor draws near that
    of a single client. At most 100 steps, until the objective stays; the other fields are not read.
    Exact for whole numbers of examples (sum below 2^31) and CPython of 64 bits.

    Raises: `ConfigError` for fields beside `convention="fedsecurity"` that it does not read.

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
    convention: str = static(
        "paper", "`fedsecurity`: as FedML computes it.", choices=("paper", "fedsecurity")
    )

    @property
    def symmetric(self):
        return self.convention == "paper"

    def check(self, path, setting):
        if self.convention == "fedsecurity":
            unread = ("num_iterations", "smoothing", "weighted", "start")
            refuse_unread(self, path, unread, "with convention 'fedsecurity'")

    def apply(self, key, updates, state, view):
        if self.convention == "fedsecurity":
            alpha, used = _fedsecurity.set_weights(view.weights, view.valid)
            places = tensors(view.space, updates.shape[1])
            aggregate, share = _fedsecurity.layered_median(updates, alpha, used, places)
            share = share.astype(updates.dtype)
            return aggregate, state, {"kept": share / jnp.maximum(share.max(), 1e-6)}
        weights = jnp.where(view.valid, view.weights if self.weighted else 1.0, 0.0)
        if self.start == "mean":
            begin = weighted_mean(updates, weights)
        elif self.start == "median":
            begin, _ = coordinatewise.median(updates, view.valid, with_kept=False)
        else:
            begin = jnp.zeros(updates.shape[1], updates.dtype)
        measured = trained_part(view.space, updates.shape[1])
        aggregate, share = iterative.geometric_median(
            updates, weights, begin, self.num_iterations, self.smoothing, measured
        )
        return aggregate, state, {"kept": share / jnp.maximum(share.max(), 1e-30)}

"""The mean of the updates, weighted by examples: FedAvg (McMahan et al., AISTATS 2017)."""

from fedjax_sec.core import Stage, registry, static
from fedjax_sec.ops.moments import weighted_mean


@registry.defenses.register("mean")
class Mean(Stage):
    r"""Average of the updates: no defence at all ("No Defense" in ALIE).

    .. math:: \sum_i w_i u_i / \sum_i w_i, \quad w_i = n_i \text{ (examples) or } 1 .

    `updates [K, D] -> [D]`. One malicious client suffices to set it to anything (Blanchard et al.
    2017, Lemma 1). Only clients whose update is not finite are left out.

    Source: McMahan et al. 2017, Algorithm 1; unweighted in ALIE, whose clients hold equal shares.

    Example:
        >>> import fedjax_sec
        >>> print(fedjax_sec.aggregate([[1.0], [5.0]], {"name": "mean"}, weights=[3, 1]))
        [2.]
    """

    stage = "aggregate"
    weighted: bool = static(True, "Weigh clients by their number of examples.")

    def apply(self, key, updates, state, view):
        kept = view.valid.astype(updates.dtype)
        weights = kept * view.weights if self.weighted else kept
        return weighted_mean(updates, weights), state, {"kept": kept}

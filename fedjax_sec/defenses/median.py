"""Coordinate-wise median (Yin et al., ICML 2018, Definition 1)."""

from fedjax_sec.core import Stage, registry, static
from fedjax_sec.ops import coordinatewise


@registry.defenses.register("median")
class Median(Stage):
    r"""Median of every coordinate; when K is even the mean of the two middle values.

    .. math:: agg_j = \mathrm{med}\{u_{1j}, \dots, u_{Kj}\}

    `updates [K, D] -> [D]`, unweighted: `weights` are ignored, as in the paper. Holds against
    fewer than K / 2 Byzantine clients. Clients whose update is not finite are left out.

    Source: Yin et al. 2018, arXiv:1803.01498, Definition 1. `middle="lower"` takes the smaller of
    the two, as `torch.median` does and so the code of Ozdayi et al. 2021 (RLR, "comed").

    Example:
        >>> import fedjax_sec
        >>> print(fedjax_sec.aggregate([[1.0], [2.0], [9.0]], "median"))
        [2.]
    """

    stage = "aggregate"
    middle: str = static("mean", "What stands for two middle values.", choices=("mean", "lower"))

    def apply(self, key, updates, state, view):
        lower = self.middle == "lower"
        aggregate, kept = coordinatewise.median(updates, view.valid, lower=lower)
        return aggregate, state, {"kept": kept}

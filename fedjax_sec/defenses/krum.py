"""Krum (Blanchard et al., NeurIPS 2017)."""

import jax
import jax.numpy as jnp

from fedjax_sec.core import COUNT, Stage, registry, static
from fedjax_sec.defenses._bounds import check_num_byzantine
from fedjax_sec.defenses._layers import trained_columns
from fedjax_sec.ops import distances


@registry.defenses.register("krum")
class Krum(Stage):
    r"""The one update that is closest to its n - f - 2 nearest neighbours.

    .. math:: agg = u_{i^*}, \quad i^* = \arg\min_i \sum_{i \to j} \|u_i - u_j\|^2

    where `i -> j` are the n - f - 2 nearest others of i. `updates [K, D] -> [D]`, unweighted. On a
    tie the lower row wins. Clients whose update is not finite are left out, and n is the number of
    the others. Running statistics do not count towards distances.

    Raises: `ConfigError` unless 2 f + 2 < K.

    Source: Blanchard et al. 2017, Section 4; Baruch et al. 2019, Equation 2.
    `convention="author"` sums *unsquared* distances to n - f neighbours and asks for 2 f < K only,
    as ALIE's code does (`defences.py`, `krum`).

    Example:
        >>> import fedjax_sec
        >>> updates = [[0.0], [0.1], [0.2], [0.4], [9.0]]
        >>> print(fedjax_sec.aggregate(updates, "krum", num_byzantine=1))
        [0.1]
    """

    stage = "aggregate"
    num_byzantine: int | None = static(
        None,
        "f, the Byzantine clients to tolerate (default: the threat's num_malicious).",
        low=0,
        high=COUNT,
        default_from="num_malicious",
    )
    convention: str = static(
        "paper",
        "`author`: ALIE's code, unsquared and n - f neighbours.",
        choices=("paper", "author"),
    )

    def check(self, path, setting):
        if self.convention == "author":
            largest, bound = (setting.num_clients - 1) // 2, "2 f < K"
        else:
            largest, bound = (setting.num_clients - 3) // 2, "2 f + 2 < K"
        check_num_byzantine(path, "krum", self.num_byzantine, setting.num_clients, largest, bound)

    def _neighbours(self, n):
        return n - self.num_byzantine - (0 if self.convention == "author" else 2)

    def apply(self, key, updates, state, view):
        sqdist, _ = distances.squared_distances(trained_columns(updates, view), view.valid)
        scores = distances.krum_scores(
            sqdist, view.valid, self._neighbours(view.valid.sum()), self.convention == "paper"
        )
        best = jnp.argmin(scores)
        aggregate = jnp.where(view.valid[best], updates[best], 0.0)
        kept = jax.nn.one_hot(best, updates.shape[0], dtype=updates.dtype)
        return aggregate, state, {"kept": kept * view.valid, "krum_scores": scores}

    def select_sequence(self, updates, view, at_most: int, count):
        # Distances are computed once.
        sqdist, _ = distances.squared_distances(trained_columns(updates, view), view.valid)
        selected, _ = distances.krum_sequence(
            sqdist, view.valid, at_most, count, self._neighbours, self.convention == "paper"
        )
        return selected

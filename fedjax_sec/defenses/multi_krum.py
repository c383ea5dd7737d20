"""Multi-Krum (Blanchard et al., NeurIPS 2017, Section 4)."""

import jax.numpy as jnp

from fedjax_sec.core import COUNT, ConfigError, Stage, registry, static
from fedjax_sec.defenses._bounds import check_num_byzantine
from fedjax_sec.defenses._layers import trained_columns
from fedjax_sec.ops import distances
from fedjax_sec.ops.moments import weighted_mean


@registry.defenses.register("multi_krum")
class MultiKrum(Stage):
    r"""Mean of the `num_selected` updates with the lowest Krum scores.

    .. math:: agg = \frac{1}{m} \sum_{i \in S} u_i, \quad
              S = \text{the } m \text{ lowest } \sum_{i \to j} \|u_i - u_j\|^2

    over each client's n - f - 2 nearest others. `updates [K, D] -> [D]`, unweighted; on ties lower
    rows win. Clients whose update is not finite are left out; when fewer than m remain, all do.
    Running statistics do not count towards distances. `weighted` is FedML's m-Krum: its defence
    (`krum_defense.py`) hands on the m chosen models, and its server weights them by examples.

    Raises: `ConfigError` unless 2 f + 2 < K and `num_selected` <= K.

    Source: Blanchard et al. 2017, Section 4; m = n - f, the default, as in their experiments.

    Example:
        >>> import fedjax_sec
        >>> updates = [[0.0], [0.1], [0.18], [0.4], [9.0]]
        >>> print(fedjax_sec.aggregate(updates, "multi_krum", num_byzantine=1, num_selected=2))
        [0.14]
    """

    stage = "aggregate"
    num_byzantine: int | None = static(
        None,
        "f, the Byzantine clients to tolerate (default: the threat's num_malicious).",
        low=0,
        high=COUNT,
        default_from="num_malicious",
    )
    num_selected: int | None = static(
        None, "m, the updates averaged (null: K - f).", low=1, high=COUNT
    )
    weighted: bool = static(False, "Weight the selected clients by their example counts.")

    def check(self, path, setting):
        clients = setting.num_clients
        largest = (clients - 3) // 2
        check_num_byzantine(path, "multi_krum", self.num_byzantine, clients, largest, "2 f + 2 < K")
        if self.num_selected is not None and self.num_selected > clients:
            raise ConfigError(
                f"{path}.num_selected must be <= K = {clients}, got {self.num_selected}."
            )

    def apply(self, key, updates, state, view):
        f, clients = self.num_byzantine, updates.shape[0]
        sqdist, _ = distances.squared_distances(trained_columns(updates, view), view.valid)
        neighbours = view.valid.sum() - f - 2
        scores = distances.krum_scores(sqdist, view.valid, neighbours)
        order = jnp.argsort(scores, stable=True)
        kept = jnp.zeros(clients, bool).at[order[: self.num_selected or clients - f]].set(True)
        kept = (kept & view.valid).astype(updates.dtype)
        weights = kept * view.weights if self.weighted else kept
        return weighted_mean(updates, weights), state, {"kept": kept, "krum_scores": scores}

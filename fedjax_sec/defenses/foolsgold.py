"""FoolsGold: clients that push in the same direction lose weight (Fung et al., RAID 2020)."""

import jax.numpy as jnp

from fedjax_sec.core import (
    COUNT,
    ConfigError,
    Stage,
    last_layer,
    numeric,
    registry,
    static,
    trained_part,
)
from fedjax_sec.defenses import _foolsgold
from fedjax_sec.defenses._layers import models
from fedjax_sec.ops.moments import finite_rows, weighted_mean


@registry.defenses.register("foolsgold")
class FoolsGold(Stage):
    r"""Weights clients by how little the sums of their past updates resemble each other.

    With the history H_i of client i, the sum of all updates it has sent, and
    :math:`c_{ij} = \cos(H_i, H_j)` for the other clients j of the round (0 for i itself),

    .. math:: v_i = \max_j c_{ij}, \quad c_{ij} \leftarrow c_{ij} v_i / v_j \text{ if } v_j > v_i,
              \quad \alpha_i = 1 - \max_j c_{ij}

    .. math:: \alpha_i \leftarrow \alpha_i / \max_k \alpha_k, \quad
              \alpha_i \leftarrow \kappa \left( \ln \frac{\alpha_i}{1 - \alpha_i} + 0.5 \right)
              \text{ cut to } [0, 1]

    `updates [K, D] -> [D]`, by `combine`:

    - `weighted`: :math:`\sum \alpha_i n_i u_i / \sum n_i` (Ozdayi et al. 2021, Equation 3);
    - `sum`: :math:`\sum \alpha_i u_i`, whose step grows with K (Fung et al. 2020, Algorithm 1);
    - `normalised`: :math:`\sum \alpha_i n_i u_i / \sum \alpha_i n_i`, as FedSecurity's runs do;
    - `auto`: the last under `convention="fedsecurity"`, else the first.

    `kept` is alpha. Where all clients are alike, all alpha are zero and the division by their
    maximum is not defined: then everybody gets 1, a choice (the author code gives NaN). An alpha
    below 1e-5 counts as zero, a choice: in float32 it is rounding. Clients
    whose update is not finite are left out, and their history stays as it is.

    The history has one row for each of the N registered clients, whoever takes part: N D numbers of
    4 bytes (N = 3,383 and D = 1,199,882: 16 GB), and as much again where `evaluation.diagnostics`
    is on. `num_features` compares, and keeps, only the last so many parameters; of our networks
    those are the output layer's (1,290 of `rlr_cnn`: 17 MB). `features: models` adds up and
    compares the clients' models, the global one plus their update, and `last_layer` only the kernel
    of their last layer.

    `convention="fedsecurity"` is FedSecurity's (`foolsgold_defense.py`): it compares the last
    layers of models, nearly parallel vectors, whose sums over the rounds it keeps by the position
    in the round, another client's where clients are sampled; alpha is at least 1e-15, however near
    the models are, and 1 becomes 0.999999; updates are added up `normalised`. `features`, `memory`
    and `combine` set each by itself.

    Raises: `ConfigError` when `num_features` exceeds D or stands beside `last_layer`, or a stage
    before it merges clients.

    Source: Fung et al. 2020, "The Limitations of Federated Learning in Sybil Settings",
    Algorithm 1, with kappa = 1 and all features alike; weights of features are not offered. The 0
    for i itself is the code's: without it, clients unlike all others would be pardoned by division
    by a negative number. `convention="author"` is the code of the paper (`model_aggregator.py`,
    `foolsgold`): 1e-5 is added to v and inside the logarithm, and alpha = 1 becomes 0.99 before it;
    that code also scales updates down to norm 1 beforehand, here `clip_norm`.

    Example:
        >>> import fedjax_sec
        >>> updates = [[2.0, 0.0], [0.0, 2.0], [-3.0, -3.0], [-3.0, -3.0]]
        >>> print(fedjax_sec.aggregate(updates, "foolsgold"))
        [0.5 0.5]
    """

    stage = "aggregate"
    needs = frozenset({"space"})
    convention: str = static(
        "paper",
        "`paper`, the `author` code's constants, or all that `fedsecurity` does.",
        choices=("paper", "author", "fedsecurity"),
    )
    combine: str = static(
        "auto",
        "How weighted updates are added up.",
        choices=("auto", "weighted", "sum", "normalised"),
    )
    confidence: float = numeric(1.0, "kappa, the slope of the logit.", above=0, high=1e6)
    num_features: int | None = static(
        None, "Compare only the last so many parameters (null: all D).", low=1, high=COUNT
    )
    features: str = static(
        "auto",
        "The vectors that are compared (auto: `updates`, or `last_layer`, of models, under "
        "`fedsecurity`).",
        choices=("auto", "updates", "models", "last_layer"),
    )
    memory: str = static(
        "auto",
        "Whose history a row has: the `client`'s, or its `position`'s in the round (auto: the "
        "latter under `fedsecurity`).",
        choices=("auto", "client", "position"),
    )

    @property
    def _chosen(self) -> tuple[str, str, str]:
        """`combine`, `features` and `memory` without `auto`."""
        auto = ("weighted", "updates", "client")
        if self.convention == "fedsecurity":
            auto = ("normalised", "last_layer", "position")
        given = (self.combine, self.features, self.memory)
        combine, features, memory = (
            default if one == "auto" else one for one, default in zip(given, auto, strict=True)
        )
        if self.num_features is not None and self.features == "auto" and features == "last_layer":
            features = "models"
        return combine, features, memory

    def check(self, path, setting):
        if setting.merged:
            raise ConfigError(
                f"{path}: foolsgold adds up each client's updates, and a stage before it merges "
                f"clients; leave that stage out."
            )
        if self.num_features is not None and self.features == "last_layer":
            raise ConfigError(
                f"{path}.num_features is not read with features 'last_layer', which is the kernel "
                f"of the last layer; leave one of them out."
            )
        dim = setting.num_parameters
        if dim is not None and self.num_features is not None and self.num_features > dim:
            raise ConfigError(
                f"{path}.num_features must be <= {dim}, the parameters, got {self.num_features}."
            )

    @property
    def keeps_scale(self):
        return self._chosen[0] != "sum"

    def _place(self, space, dim: int) -> slice:
        if self._chosen[1] == "last_layer":
            return last_layer(space, dim)
        if self.num_features is None:
            return trained_part(space, dim)
        return slice(dim - self.num_features, dim)

    def init(self, num_clients, dim, space=None):
        if self.num_features is not None and self.num_features > dim:
            raise ConfigError(
                f"foolsgold.num_features must be <= D = {dim}, got {self.num_features}."
            )
        place = self._place(space, dim)
        return jnp.zeros((num_clients, place.stop - place.start))

    def apply(self, key, updates, state, view):
        combine, features, memory = self._chosen
        place = self._place(view.space, updates.shape[1])
        recent = updates[:, place] if features == "updates" else models(updates, view, place)
        ids = view.client_ids if memory == "client" else jnp.arange(updates.shape[0])
        history = state[ids]
        history = jnp.where(view.valid[:, None], history + recent.astype(state.dtype), history)
        usable = view.valid & finite_rows(history)  # a sum of huge updates may overflow
        alpha = self.weights(history, usable)
        alpha = alpha.astype(updates.dtype)
        state = state.at[ids].set(history)
        if combine == "sum":
            aggregate = weighted_mean(updates, alpha) * alpha.sum()
        else:
            counts = jnp.where(usable, view.weights, 0.0)
            aggregate = weighted_mean(updates, alpha * counts)
            if combine == "weighted":
                total = counts.sum()
                aggregate = aggregate * ((alpha * counts).sum() / jnp.where(total > 0, total, 1.0))
        return aggregate, state, {"kept": alpha}

    def weights(self, history, usable):
        """alpha [K] in [0, 1] from the histories [K, F]; zero for clients that are not usable."""
        logit, some = _foolsgold.logits(history, usable, self.convention)
        weight = jnp.clip(self.confidence * logit, 0.0, 1.0)
        return jnp.where(usable, jnp.where(some, weight, 1.0), 0.0)

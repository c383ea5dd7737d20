"""FoolsGold: clients that push in the same direction lose weight (Fung et al., RAID 2020)."""

import jax.numpy as jnp

from fedjax_sec.core import COUNT, ConfigError, Stage, numeric, registry, static
from fedjax_sec.ops.distances import cosine_similarities
from fedjax_sec.ops.moments import finite_rows, weighted_mean

#: 1 - cosine below this is rounding in float32, and counts as no difference at all.
ROUNDING = 1e-5


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
    - `normalised`: :math:`\sum \alpha_i n_i u_i / \sum \alpha_i n_i`, as FedSecurity's runs do.

    `kept` is alpha. Where all clients are alike, all alpha are zero and the division by their
    maximum is not defined: then everybody gets 1, a choice (the author code gives NaN). Clients
    whose update is not finite are left out, and their history stays as it is.

    The history has one row for each of the N registered clients, whoever takes part: N D numbers of
    4 bytes (N = 3,383 and D = 1,199,882: 16 GB), and as much again where `evaluation.diagnostics`
    is on. `num_features` compares, and keeps, only the last so many parameters; of our networks
    those are the output layer's (1,290 of `rlr_cnn`: 17 MB).

    Raises: `ConfigError` when `num_features` exceeds D, or a stage before it merges clients.

    Source: Fung et al. 2020, "The Limitations of Federated Learning in Sybil Settings",
    Algorithm 1, with kappa = 1 and all features alike; weights of features are not offered. The 0
    for i itself is the code's: without it, clients unlike all others would be pardoned by division
    by a negative number. `convention="author"` is the code of the paper (`model_aggregator.py`,
    `foolsgold`): 1e-5 is added to v and inside the logarithm, and alpha = 1 becomes 0.99 before it;
    that code also scales updates down to norm 1 beforehand, here `clip_norm`.
    `convention="fedsecurity"` is FedSecurity's: alpha is at least 1e-15, and 1 becomes 0.999999
    (`foolsgold_defense.py`, which also compares the last layer of models instead of updates and
    takes the position in the round for the client; neither is offered).

    Example:
        >>> import fedjax_sec
        >>> updates = [[2.0, 0.0], [0.0, 2.0], [-3.0, -3.0], [-3.0, -3.0]]
        >>> print(fedjax_sec.aggregate(updates, "foolsgold"))
        [0.5 0.5]
    """

    stage = "aggregate"
    convention: str = static(
        "paper",
        "Constants: `paper`, the `author` code's, or `fedsecurity`'s.",
        choices=("paper", "author", "fedsecurity"),
    )
    combine: str = static(
        "weighted", "How weighted updates are added up.", choices=("weighted", "sum", "normalised")
    )
    confidence: float = numeric(1.0, "kappa, the slope of the logit.", above=0, high=1e6)
    num_features: int | None = static(
        None, "Compare only the last so many parameters (null: all D).", low=1, high=COUNT
    )

    def check(self, path, setting):
        if setting.merged:
            raise ConfigError(
                f"{path}: foolsgold adds up each client's updates, and a stage before it merges "
                f"clients; leave that stage out."
            )
        dim = setting.num_parameters
        if dim is not None and self.num_features is not None and self.num_features > dim:
            raise ConfigError(
                f"{path}.num_features must be <= {dim}, the parameters, got {self.num_features}."
            )

    @property
    def keeps_scale(self):
        return self.combine != "sum"

    def init(self, num_clients, dim):
        if self.num_features is not None and self.num_features > dim:
            raise ConfigError(
                f"foolsgold.num_features must be <= D = {dim}, got {self.num_features}."
            )
        return jnp.zeros((num_clients, self.num_features or dim))

    def apply(self, key, updates, state, view):
        recent = updates[:, updates.shape[1] - state.shape[1] :].astype(state.dtype)
        history = state[view.client_ids]
        history = jnp.where(view.valid[:, None], history + recent, history)
        usable = view.valid & finite_rows(history)  # a sum of huge updates may overflow
        alpha = self.weights(cosine_similarities(history, usable), usable)
        alpha = alpha.astype(updates.dtype)
        state = state.at[view.client_ids].set(history)
        if self.combine == "sum":
            aggregate = weighted_mean(updates, alpha) * alpha.sum()
        else:
            counts = jnp.where(usable, view.weights, 0.0)
            aggregate = weighted_mean(updates, alpha * counts)
            if self.combine == "weighted":
                total = counts.sum()
                aggregate = aggregate * ((alpha * counts).sum() / jnp.where(total > 0, total, 1.0))
        return aggregate, state, {"kept": alpha}

    def weights(self, cosines, usable):
        """alpha [K] in [0, 1] from the cosines [K, K]; zero for clients that are not usable."""
        clients = usable.shape[0]
        epsilon = 1e-5 if self.convention == "author" else 0.0
        others = usable[:, None] & usable[None, :] & ~jnp.eye(clients, dtype=bool)
        cosines = jnp.where(others, cosines, 0.0)
        largest = cosines.max(axis=1) + epsilon
        pardoned = largest[:, None] < largest[None, :]
        ratio = largest[:, None] / jnp.where(largest > 0, largest, 1.0)[None, :]
        cosines = jnp.where(pardoned, cosines * ratio, cosines)
        alpha = jnp.clip(1.0 - cosines.max(axis=1), 0.0, 1.0)
        alpha = jnp.where(usable & (alpha > ROUNDING), alpha, 0.0)
        top = alpha.max()
        if self.convention == "fedsecurity":
            alpha = jnp.where(usable, jnp.maximum(alpha, 1e-15), 0.0)
        share = alpha / jnp.where(top > 0, top, 1.0)
        ceiling = {"author": 0.99, "fedsecurity": 0.999999}.get(self.convention)
        if ceiling is not None:
            share = jnp.where(share == 1.0, ceiling, share)
        odds = share / jnp.where(share < 1.0, 1.0 - share, 1.0)
        logit = jnp.where(share < 1.0, jnp.log(odds + epsilon), jnp.inf)
        weight = jnp.clip(self.confidence * (logit + 0.5), 0.0, 1.0)
        return jnp.where(usable, jnp.where(top > 0, weight, 1.0), 0.0)

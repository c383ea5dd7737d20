"""Geometric median of means (Chen, Su and Xu, 2017)."""

import jax
import jax.numpy as jnp

from fedjax_sec.core import (
    ANY_SCALE,
    COUNT,
    ConfigError,
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


@registry.defenses.register("median_of_means")
class MedianOfMeans(Stage):
    r"""The geometric median of the means of k batches of clients.

    With the clients in k batches :math:`B_1, \dots, B_k`, of which fewer than half hold one of f
    malicious clients,

    .. math:: agg = \arg\min_z \sum_{l=1}^{k} \|m_l - z\|, \qquad
              m_l = \frac{1}{|B_l|} \sum_{i \in B_l} u_i

    `updates [K, D] -> [D]`, unweighted. Batches follow the clients' order in the round, as the
    paper's fixed partition of the machines; `shuffle` draws new ones in every round. Their sizes
    differ by one at most. With k = 1 this is the mean, with k = K the geometric median of all. It
    is approximated by `num_iterations` smoothed Weiszfeld steps from the coordinate-wise median of
    the means, over the whole vector. `kept` is the share of a client's batch in the result relative
    to the largest. Clients whose update is not finite are left out, and batches made of the others.
    Running statistics do not count towards distances, and follow the weights.

    `convention="fedsecurity"` is FedML's (`geometric_median_defense.py`, `common/bucket.py`):
    batches of ceil(n / k) clients, so there may be fewer than k of them; means by numbers of
    examples; one batch where f = 0; and in place of the geometric median what FedML computes in
    `geometric_median` with that convention: with equal numbers of examples in all batches the first
    batch's mean. FedML does not ask for 2 f < k, and its example has f = 1 and k = 2.

    Raises: `ConfigError` unless 2 f < k <= K (k <= K with FedML's convention), and for fields that
    the convention does not read.

    Source: Chen, Su, Xu 2017, "Distributed Statistical Machine Learning in Adversarial Settings:
    Byzantine Gradient Descent", Algorithm 2, and k >= 2 (1 + epsilon) f there. The paper leaves
    epsilon > 0 open, so the default of k, 2 f + 1, is the least that it allows; batches of unequal
    sizes and the approximation are choices.

    Example:
        >>> import fedjax_sec
        >>> updates = [[0.0], [2.0], [3.0], [5.0], [90.0], [4.0]]
        >>> rule = {"name": "median_of_means", "num_byzantine": 1}
        >>> print(fedjax_sec.aggregate(updates, rule).round(2))
        [4.]
    """

    stage = "aggregate"
    num_byzantine: int | None = static(
        None,
        "f, the Byzantine clients to tolerate (default: the threat's num_malicious).",
        low=0,
        high=COUNT,
        default_from="num_malicious",
    )
    num_batches: int | None = static(
        None, "k, batches whose means are taken (null: 2 f + 1).", low=1, high=COUNT
    )
    shuffle: bool = static(False, "Draw the batches in every round.")
    num_iterations: int = static(100, "Weiszfeld steps.", low=1, high=10**6)
    smoothing: float = numeric(
        1e-6, "nu, the smallest distance divided by.", above=0, unbounded=ANY_SCALE
    )
    convention: str = static(
        "paper", "`fedsecurity`: as FedML computes it.", choices=("paper", "fedsecurity")
    )

    @property
    def symmetric(self):
        return self.shuffle or self._batches == 1

    @property
    def _batches(self) -> int:
        if self.convention == "fedsecurity" and self.num_byzantine == 0:
            return 1
        return 2 * (self.num_byzantine or 0) + 1 if self.num_batches is None else self.num_batches

    def check(self, path, setting):
        if self.num_byzantine is None:
            raise ConfigError(
                f"{path}.num_byzantine is required: how many Byzantine clients median_of_means is "
                f"to tolerate."
            )
        paper = self.convention == "paper"
        least = 2 * self.num_byzantine + 1 if paper else 1
        if not least <= self._batches <= setting.num_clients:
            raise ConfigError(
                f"{path}: median_of_means needs {'2 f < k' if paper else '1 <= k'} <= K; with K = "
                f"{setting.num_clients} clients and f = {self.num_byzantine} Byzantine ones, got k "
                f"= {self._batches}."
            )
        if self.convention == "fedsecurity":
            unread = ("shuffle", "num_iterations", "smoothing")
            refuse_unread(self, path, unread, "with convention 'fedsecurity'")

    def apply(self, key, updates, state, view):
        count, batches = view.valid.sum(), self._batches
        if self.convention == "fedsecurity":
            size = -(-count // batches)
            rows, weights, members = _fedsecurity.buckets(
                updates, view.weights, view.valid, jnp.maximum(size, 1), batches
            )
            alpha, used = _fedsecurity.set_weights(weights, members.any(axis=1))
            places = tensors(view.space, updates.shape[1])
            aggregate, share = _fedsecurity.layered_median(rows, alpha, used, places)
        else:
            place = jnp.cumsum(view.valid) - 1
            if self.shuffle:
                # Each client's own draw, whoever else takes part; merged rows have no id.
                same = view.client_ids.shape == view.valid.shape
                ids = view.client_ids if same else jnp.arange(updates.shape[0])
                drawn = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(ids)
                place = jnp.argsort(jnp.argsort(jnp.where(view.valid, drawn, 2.0)))
            # The first `larger` batches have one client more than the others.
            smaller, larger = jnp.maximum(count // batches, 1), count % batches
            larger = jnp.where(count < batches, 0, larger)
            batch = jnp.where(
                place < larger * (smaller + 1), place // (smaller + 1), (place - larger) // smaller
            )
            members = (batch[None] == jnp.arange(batches)[:, None]) & view.valid[None]
            members = members.astype(updates.dtype)
            sizes = members.sum(axis=1)
            used = sizes > 0
            # Divided first: in float16 a sum of huge updates would be infinite.
            shares = members / jnp.maximum(sizes, 1)[:, None]
            rows = jnp.matmul(
                shares,
                jnp.where(view.valid[:, None], updates, 0.0),
                precision=jax.lax.Precision.HIGHEST,
            )
            begin, _ = coordinatewise.median(rows, used, with_kept=False)
            aggregate, share = iterative.geometric_median(
                rows,
                used.astype(updates.dtype),
                begin,
                self.num_iterations,
                self.smoothing,
                trained_part(view.space, updates.shape[1]),
            )
        share = (share / jnp.maximum(share.max(), 1e-6)).astype(updates.dtype)
        return aggregate, state, {"kept": share @ members}

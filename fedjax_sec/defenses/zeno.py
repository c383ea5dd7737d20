"""Zeno: the updates that lower the server's own loss most (Xie et al., ICML 2019)."""

import jax
import jax.numpy as jnp

from fedjax_sec.core import COUNT, ConfigError, Stage, numeric, registry, static
from fedjax_sec.defenses._layers import trained_columns
from fedjax_sec.ops.moments import row_norms, weighted_mean


@registry.defenses.register("zeno")
class Zeno(Stage):
    r"""The mean of the n - b updates whose scores on the server's examples are highest.

    With f the loss on the server's root data set, w the global parameters and update :math:`u_i`,
    the score falls with the loss after the step and with the step's length,

    .. math:: s_i = f(w) - f(w + u_i) - \rho \|u_i\|^2, \qquad
              agg = \frac{1}{n - b} \sum_{i \in \mathrm{top}_{n - b}(s)} u_i

    `updates [K, D] -> [D]`, unweighted; on a tie the lower row wins. Clients whose update is not
    finite are left out, and n is the number of the others. `kept` marks the rows that are averaged.
    The loss is evaluated K times, one client after another. Running statistics do not count towards
    the length.

    Raises: `ConfigError` unless b < K; without `server.root`, or in `fedjax_sec.aggregate` without
    `server_loss`.

    Source: Xie, Koyejo, Gupta 2019 (Zeno: distributed stochastic gradient descent with
    suspicion-based fault-tolerance), Definitions 2 and 3. A worker there sends a gradient g, scored
    by :math:`f(w) - f(w - \gamma g) - \rho \|g\|^2`; here :math:`u_i` is the step itself, so the
    paper's :math:`\rho` is this one times :math:`\gamma^2`. In the paper :math:`\rho = \gamma / c`
    with c from 10 to 1000; the default is a choice. The batch of f is the whole root data set.

    Example:
        >>> import fedjax_sec
        >>> def loss(params):
        ...     return ((params - 1.0) ** 2).sum()
        >>> updates = [[0.5], [1.0], [-9.0]]
        >>> print(fedjax_sec.aggregate(updates, "zeno", server_loss=loss, num_removed=1))
        [0.75]
    """

    stage = "aggregate"
    needs = frozenset({"root"})
    num_removed: int | None = static(
        None,
        "b, the updates that are left out (default: the threat's num_malicious).",
        low=0,
        high=COUNT,
        default_from="num_malicious",
    )
    rho: float = numeric(0.0005, "Weight of an update's squared length.", low=0, high=1e6)

    def check(self, path, setting):
        if self.num_removed is None:
            raise ConfigError(f"{path}.num_removed is required: how many updates zeno leaves out.")
        if self.num_removed >= setting.num_clients:
            raise ConfigError(
                f"{path}.num_removed: zeno needs b < K; with K = {setting.num_clients} clients "
                f"that allows num_removed <= {setting.num_clients - 1}, got {self.num_removed}."
            )

    def init(self, num_clients, dim):
        return ()

    def apply(self, key, updates, state, view):
        loss, params = view.root.loss, view.params
        before = loss(params)
        safe = jnp.where(view.valid[:, None], updates, 0.0)
        # One at a time: side by side, all clients' activations would lie in memory.
        after = jax.lax.map(lambda update: loss(params + update.astype(params.dtype)), safe)
        lengths = row_norms(trained_columns(safe, view)).astype(after.dtype)
        scores = before - after - self.rho * lengths**2
        # A loss that overflows is the worst there is.
        scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
        # Valid rows first, so that one of an infinite loss stands before those that are left out.
        order = jnp.lexsort((-scores, ~view.valid))
        place = jnp.zeros(order.shape, jnp.int32).at[order].set(jnp.arange(order.shape[0]))
        keep = view.valid & (place < view.valid.sum() - self.num_removed)
        kept = keep.astype(updates.dtype)
        return weighted_mean(safe, kept), state, {"kept": kept, "zeno_scores": scores}

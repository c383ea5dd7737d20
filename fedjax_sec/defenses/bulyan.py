"""Bulyan (El Mhamdi et al., ICML 2018)."""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_sec.core import COUNT, ConfigError, Stage, component, init_stage, registry, static
from fedjax_sec.defenses._bounds import check_num_byzantine
from fedjax_sec.defenses._layers import trained_columns
from fedjax_sec.ops import coordinatewise


@registry.defenses.register("bulyan")
class Bulyan(Stage):
    r"""Selects n - 2f updates by a rule A, one at a time, then averages near their median.

    .. math:: S \leftarrow S \cup \{A(P \setminus S)\} \text{ until } |S| = n - 2f, \qquad
              agg_j = \text{mean of the } |S| - 2f \text{ values of } S_j \text{ nearest its median}

    The rule A (`selection`) is any aggregator; where its output is not one of the updates, the
    remaining update nearest to it is selected. `updates [K, D] -> [D]`, unweighted. Clients whose
    update is not finite are left out, and n is the number of the others.

    Raises: `ConfigError` unless 4 f + 3 <= K.

    Source: El Mhamdi et al. 2018, Section 4; Baruch et al. 2019, Algorithm 2.
    `convention="author"` keeps one value fewer in the second part (n - 4f - 1), as ALIE's code
    does (`defences.py`, `bulyan`); its Krum is `{name: krum, convention: author}`.

    Example:
        >>> import fedjax_sec
        >>> updates = [[0.0], [0.1], [0.2], [0.3], [0.4], [0.5], [9.0]]
        >>> print(fedjax_sec.aggregate(updates, "bulyan", num_byzantine=1).round(3))
        [0.2]
    """

    stage = "aggregate"
    num_byzantine: int | None = static(
        None,
        "f, the Byzantine clients to tolerate (default: the threat's num_malicious).",
        low=0,
        high=COUNT,
        default_from="num_malicious",
    )
    selection: Any = component("defense", "krum", "A, the rule that selects (its f is Bulyan's).")
    convention: str = static(
        "paper", "`author`: n - 4f - 1 values in the second part.", choices=("paper", "author")
    )

    def check(self, path, setting):
        clients = setting.num_clients
        largest = (clients - 3) // 4
        check_num_byzantine(path, "bulyan", self.num_byzantine, clients, largest, "4 f + 3 <= K")
        if self.selection.stage != "aggregate":
            raise ConfigError(
                f"{path}.selection must be an aggregator, got {self.selection.registered_name!r}."
            )

    @property
    def needs(self):
        return self.selection.needs & {"space"}

    def init(self, num_clients, dim, space=None):
        return init_stage(self.selection, num_clients, dim, space)

    def apply(self, key, updates, state, view):
        f = self.num_byzantine
        at_most = updates.shape[0] - 2 * f
        count = jnp.maximum(view.valid.sum() - 2 * f, 1)
        selected = self.selection.select_sequence(updates, view, at_most, count)
        if selected is None:
            selected = self._select(key, updates, state, view, at_most, count)
        drop = 2 * f + (self.convention == "author")
        aggregate, kept = coordinatewise.mean_near_median(updates, selected & view.valid, drop)
        return aggregate, state, {"kept": kept, "selected": selected.astype(updates.dtype)}

    def _select(self, key, updates, state, view, at_most, count):
        safe = jnp.where(view.valid[:, None], updates, 0.0)

        def select(step, selected):
            left = view.valid & ~selected
            aggregate, _, _ = self.selection.apply(
                jax.random.fold_in(key, step),
                updates,
                state,
                view._replace(valid=left),
            )
            apart = trained_columns(safe - aggregate[None], view)
            distance = jnp.linalg.norm(apart, axis=1)
            # A huge finite row is infinitely far in float32: still nearer than one already taken.
            distance = jnp.minimum(
                jnp.nan_to_num(distance, nan=jnp.inf), jnp.finfo(jnp.float32).max
            )
            nearest = jnp.argmin(jnp.where(left, distance, jnp.inf))
            return selected.at[nearest].set(selected[nearest] | (step < count))

        return jax.lax.fori_loop(0, at_most, select, jnp.zeros_like(view.valid))

"""FedML's anomaly detection (Han et al., 2023): a check across rounds, then one across clients."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from fedjax_sec.core import ConfigError, Stage, last_layer, numeric, registry, static
from fedjax_sec.defenses import _anomaly
from fedjax_sec.defenses._layers import last_layers
from fedjax_sec.ops.distances import cosines_to
from fedjax_sec.ops.moments import row_norms, unit_rows, weighted_mean


class Memory(NamedTuple):
    """Each client's last accepted features [N, F], who has any, the last survivors' mean [F]."""

    cache: Any
    cached: Any
    reference: Any
    known: Any
    started: Any


@registry.defenses.register("cross_round")
class CrossRound(Stage):
    r"""Mean without clients whose last layer has turned since last time and lies far from others'.

    With z_i the flattened kernel of the last layer of client i's *model*, :math:`w + u_i`, z_w that
    of the global model and :math:`\tilde z_i` the one that is remembered of the client,

    1. *across rounds*: i is a suspect if
       :math:`\cos(z_i, \tilde z_i) < \gamma` or :math:`\cos(z_i, z_w) < \gamma`; in the first round
       everybody is. Without a suspect all clients are aggregated, and nothing is remembered.
    2. *across clients*: with the distances :math:`d_i = \|z_i - c\|_2` of all clients from a
       reference c, suspects with :math:`d_i > \mathrm{mean}(d) + \lambda \, \mathrm{std}(d)` are
       dropped (n - 1 in the deviation). c is, the first time, the mean of the ceil(n/2) - 1
       features with the lowest Krum scores over as many neighbours, afterwards the mean of the
       clients that the last such check left.
    3. The features of all clients that were not dropped are remembered. A client without any, met
       in a later round, has those of the global model of that round.

    .. math:: agg = \sum_{i \in S} \frac{n_i}{\sum_{j \in S} n_j} u_i

    over the clients S that were not dropped. `updates [K, D] -> [D]`; `kept` is 1 in S. The memory
    is N F numbers, F those of the kernel. Clients whose update is not finite are left out, and keep
    what is remembered of them. In `aggregate`, a first round, gamma is not read; the last layer is
    the last leaf with two axes of the clients' pytrees, and of plain vectors the whole vector.

    `convention="fedsecurity"` follows FedML where it is at fault: it remembers by the position in
    the round, which is another client's where clients are sampled; and the cosine of a zero vector
    is not a number, so a client that sends the zero model is no suspect after the first round. Here
    that cosine is zero.

    Raises: `ConfigError` with fewer than 3 clients, and behind a stage that merges clients.

    Source: Han et al. 2023, "Kick Bad Guys Out!", arXiv:2310.04055, as FedML computes it
    (`outlier_detection.py`, `cross_round_defense.py`, `three_sigma_defense.py`); lambda = 0.5 is
    that code's. gamma (`cosine_similarity_bound`) has no default there; 0.5 is that of FedML's one
    example configuration of this defence. Rounding in step 2 as in `three_sigma`.

    Example:
        >>> import fedjax_sec
        >>> updates = [[1.0], [1.1], [0.9], [1.0], [9.0]]
        >>> print(fedjax_sec.aggregate(updates, "cross_round").round(3))
        [1.]
    """

    stage = "aggregate"
    needs = frozenset({"space"})
    min_cosine: float = numeric(
        0.5, "gamma, the cosine below which a client is a suspect.", low=-1, high=1
    )
    num_deviations: float = numeric(
        0.5, "lambda, standard deviations that a distance may exceed the mean by.", low=0, high=1e6
    )
    weighted: bool = static(True, "Weight clients by their example counts.")
    convention: str = static(
        "corrected",
        "`fedsecurity`: memory by position, and zero models are no suspects.",
        choices=("corrected", "fedsecurity"),
    )

    def check(self, path, setting):
        if setting.num_clients < 3:
            raise ConfigError(
                f"{path}: cross_round needs at least 3 clients, got K = {setting.num_clients}."
            )
        if setting.merged:
            raise ConfigError(
                f"{path}: cross_round remembers each client's model, and a stage before it merges "
                f"clients; leave that stage out."
            )

    def init(self, num_clients, dim, space=None):
        place = last_layer(space, dim)
        features = place.stop - place.start
        return Memory(
            jnp.zeros((num_clients, features)),
            jnp.zeros(num_clients, bool),
            jnp.zeros(features),
            jnp.array(False),
            jnp.array(False),
        )

    def apply(self, key, updates, state, view):
        features, place = last_layers(updates, view)
        features = features.astype(state.cache.dtype)
        model = view.params[place].astype(features.dtype)
        ids = view.client_ids
        if self.convention == "fedsecurity":
            ids = jnp.arange(updates.shape[0])

        last = jnp.where(state.cached[ids][:, None], state.cache[ids], model[None])
        units = [unit_rows(rows, row_norms(rows)) for rows in (features, last)]
        with_last = jnp.sum(units[0] * units[1], axis=1)
        turned = with_last < self.min_cosine
        away = cosines_to(features, model, view.valid) < self.min_cosine
        if self.convention == "fedsecurity":
            is_zero = ~jnp.any(features != 0, axis=1)
            turned &= ~is_zero & jnp.any(last != 0, axis=1)
            away &= ~is_zero & jnp.any(model != 0)
        suspects = view.valid & (~state.started | turned | away)
        alarm = suspects.any()

        first = _anomaly.krum_reference(features, view.valid)
        reference = jnp.where(state.known, state.reference, first)
        distances = _anomaly.distances_to(features, reference, view.valid)
        far = _anomaly.exceeds(
            distances, _anomaly.summary(distances, view.valid), self.num_deviations
        )
        kept = view.valid & ~(suspects & far)

        renewed = kept & alarm
        remembered = jnp.where(renewed[:, None], features, last)
        has_any = renewed | (view.valid & state.started)  # then it is the global model's
        write = has_any[:, None]
        state = Memory(
            state.cache.at[ids].set(jnp.where(write, remembered, state.cache[ids])),
            state.cached.at[ids].set(state.cached[ids] | has_any),
            jnp.where(alarm, _anomaly.mean_of(features, kept), state.reference),
            state.known | alarm,
            state.started | view.valid.any(),
        )
        weights = view.weights if self.weighted else jnp.ones_like(view.weights)
        aggregate = weighted_mean(updates, jnp.where(kept, weights, 0.0))
        metrics = {"kept": kept.astype(updates.dtype), "suspects": suspects.astype(updates.dtype)}
        return aggregate, state, metrics

"""The cross-client check of FedML's anomaly detection (Han et al., 2023), and its variants."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sec.core import (
    COUNT,
    ConfigError,
    Stage,
    last_layer,
    numeric,
    refuse_unread,
    registry,
    static,
)
from fedjax_sec.defenses import _anomaly, _fedsecurity, _foolsgold
from fedjax_sec.defenses._layers import last_layers
from fedjax_sec.ops.moments import finite_rows, weighted_mean

#: lambda, by variant.
DEVIATIONS = {"krum": 0.5, "geometric_median": 1.0, "foolsgold": 2.0}


class Memory(NamedTuple):
    """The reference [F], whether there is one, the scores' distribution, and the rounds in it.

    For `foolsgold` the reference is the sum of each registered client's features, [N, F].
    """

    reference: Any
    known: Any
    scores: _anomaly.Scores
    rounds: Any


@registry.defenses.register("three_sigma")
class ThreeSigma(Stage):
    r"""Mean of the clients whose last layer is not too far from the others'.

    With z_i the flattened kernel of the last layer of client i's *model*, :math:`w + u_i`, and a
    reference c,

    .. math:: d_i = \|z_i - c\|_2, \qquad
              agg = \sum_{i \in S} \frac{n_i}{\sum_{j \in S} n_j} u_i, \quad
              S = \{i : d_i \le \mathrm{mean}(d) + \lambda \, \mathrm{std}(d)\}

    `updates [K, D] -> [D]`. The standard deviation is that of a sample (n - 1), and only far
    clients are dropped, never near ones. By `variant`:

    - `krum` (FedML's `3sigma`): c is in the first round the mean of the ceil(n/2) - 1 features with
      the lowest Krum scores, over as many neighbours, afterwards the mean of the last survivors.
      Mean and deviation are those of the round. lambda = 0.5, in spite of the name: of normal
      scores 31% exceed it.
    - `geometric_median` (`3sigma_geo`): c is a geometric median of the first round's features, and
      mean and deviation are those of the first `calibration_rounds` rounds; neither changes later.
      lambda = 1. As models move on, all of them leave the ball in the end.
    - `foolsgold` (`3sigma_foolsgold`): d are FoolsGold's logits, not cut off, of the sums of each
      client's features over the rounds; clients *below* mean - lambda std of the first
      `calibration_rounds` rounds are dropped. lambda = 2.

    Where nobody is left the aggregate is zero (FedML stops with an error). `kept` is 1 for
    survivors. Clients whose update is not finite are left out. A score that exceeds the threshold
    by a millionth of the mean is equal to it, a choice: rounding would otherwise drop all of
    several equal clients; likewise FoolsGold's alpha is the largest where it is so but for a
    hundred-thousandth, else rounding would tell two clients apart that are nearest to each other.
    In `aggregate` the last layer is the last leaf with two axes of the clients' pytrees; of plain
    vectors the whole vector. Without `params` there, w is zero.

    Raises: `ConfigError` with fewer than 3 clients; for `foolsgold` behind a stage that merges
    clients; for `calibration_rounds` where nothing is calibrated.

    Source: FedML's code, `three_sigma_defense.py`, `three_sigma_geomedian_defense.py` and
    `three_sigma_defense_foolsgold.py` (with buckets of one), whose constants these are; it numbers
    clients by their position in the round, here by their id. The geometric median is the one that
    FedML computes, see `geometric_median` with `convention: fedsecurity`. The method is from Han et
    al. 2023, "Kick Bad Guys Out!", arXiv:2310.04055, which adds proofs that the server computes it.

    Example:
        >>> import fedjax_sec
        >>> updates = [[1.0], [1.1], [0.9], [1.0], [9.0]]
        >>> print(fedjax_sec.aggregate(updates, "three_sigma").round(3))
        [1.]
    """

    stage = "aggregate"
    needs = frozenset({"space"})
    variant: str = static(
        "krum", "Where reference and scores come from.", choices=tuple(DEVIATIONS)
    )
    num_deviations: float | None = numeric(
        None,
        "lambda, standard deviations that a score may lie off (null: 0.5, 1 or 2, by variant).",
        low=0,
        high=1e6,
    )
    calibration_rounds: int = numeric(
        1, "Rounds from which mean and deviation are taken, unless `krum`.", low=1, high=COUNT
    )
    weighted: bool = static(True, "Weight survivors by their example counts.")

    def check(self, path, setting):
        if setting.num_clients < 3:
            raise ConfigError(
                f"{path}: three_sigma needs at least 3 clients, got K = {setting.num_clients}."
            )
        if self.variant == "foolsgold" and setting.merged:
            raise ConfigError(
                f"{path}: three_sigma adds up each client's models with variant 'foolsgold', and a "
                f"stage before it merges clients; leave that stage out."
            )
        if self.variant == "krum":  # its threshold is that of each round
            refuse_unread(self, path, ("calibration_rounds",), "with variant 'krum'")

    def init(self, num_clients, dim, space=None):
        place = last_layer(space, dim)
        features = place.stop - place.start
        shape = (num_clients, features) if self.variant == "foolsgold" else (features,)
        return Memory(
            jnp.zeros(shape), jnp.array(False), _anomaly.no_scores(), jnp.zeros((), jnp.int32)
        )

    def apply(self, key, updates, state, view):
        features, _ = last_layers(updates, view)
        rows, some = view.valid, view.valid.any()
        reference, deviations = state.reference, self.num_deviations
        deviations = DEVIATIONS[self.variant] if deviations is None else deviations
        if self.variant == "foolsgold":
            history = reference[view.client_ids]
            history = jnp.where(rows[:, None], history + features.astype(history.dtype), history)
            reference = reference.at[view.client_ids].set(history)
            rows = rows & finite_rows(history)
            logit, _ = _foolsgold.logits(history, rows, "fedsecurity")
            scores = jnp.where(rows, -logit, 0.0)  # the low ones are far off
        else:
            reference = jnp.where(state.known, reference, self._reference(features, rows))
            scores = _anomaly.distances_to(features, reference, rows)
        now = _anomaly.summary(scores, rows)
        limits, rounds = now, state.rounds
        if self.variant != "krum":
            learning = (rounds < self.calibration_rounds) & some
            grown = _anomaly.pooled(state.scores, now)
            limits = jax.tree.map(partial(jnp.where, learning), grown, state.scores)
            rounds = rounds + learning
        kept = rows & ~_anomaly.exceeds(scores, limits, deviations)
        if self.variant == "krum":
            reference = jnp.where(some, _anomaly.mean_of(features, kept), reference)
        state = Memory(reference, state.known | some, limits, rounds)
        weights = view.weights if self.weighted else jnp.ones_like(view.weights)
        aggregate = weighted_mean(updates, jnp.where(kept, weights, 0.0))
        return aggregate, state, {"kept": kept.astype(updates.dtype)}

    def _reference(self, features, rows):
        if self.variant == "krum":
            return _anomaly.krum_reference(features, rows)
        alpha = rows / jnp.maximum(rows.sum(), 1).astype(features.dtype)
        whole = [slice(0, features.shape[1])]
        return _fedsecurity.layered_median(features, alpha, rows, whole)[0]

"""Centred clipping (Karimireddy, He and Jaggi, ICML 2021)."""

import jax
import jax.numpy as jnp

from fedjax_sec.core import (
    ANY_SCALE,
    COUNT,
    Stage,
    numeric,
    refuse_unread,
    registry,
    static,
    trained_part,
)
from fedjax_sec.defenses import _fedsecurity
from fedjax_sec.defenses._layers import trained_columns
from fedjax_sec.ops import iterative
from fedjax_sec.ops.moments import weighted_mean
from fedjax_sec.ops.precision import wide


@registry.defenses.register("centered_clipping")
class CenteredClipping(Stage):
    r"""The last aggregate, moved by the mean of the clipped differences from it.

    .. math:: v \leftarrow v + \frac{1}{n} \sum_i (u_i - v) \min(1, \tau / \|u_i - v\|)

    `updates [K, D] -> [D]`, unweighted. The centre v is the previous round's aggregate, zero in
    the first round. `kept` is each client's last factor. Clients whose update is not finite are
    left out. With `bucketing` before it, rows are buckets. Running statistics do not count towards
    the norm, and follow the factors, as in FedML.

    `convention="fedsecurity"` is FedML's (`cclip_defense.py`): buckets of `bucket_size` clients in
    the round's order, without a shuffle, each the mean by numbers of examples; the centre v is a
    bucket drawn at random in every round; and with the buckets' numbers of examples n_b

    .. math:: agg = v + \sum_b \frac{n_b}{\sum_c n_c} (y_b - v)
              \min(1, \tau / (\|y_b - v\| + 10^{-8}))

    It reads neither `num_iterations` nor `start`, and draws the centre from the key, where FedML
    takes NumPy's unseeded generator.

    Raises: `ConfigError` for fields that the convention does not read.

    Source: Karimireddy et al. 2021, arXiv:2012.10333, Algorithm 2; one iteration a round, and the
    previous aggregate as the centre, are the paper's. It clips worker momenta and tunes tau for
    each task, so the default radius is a choice (and FedML's default). `start="zero"` forgets the
    previous aggregate. A `bucket_size` of 2 is that of FedML's example configuration.

    Example:
        >>> import fedjax_sec
        >>> defense = {"name": "centered_clipping", "radius": 3.0}
        >>> print(fedjax_sec.aggregate([[1.0], [2.0], [999.0]], defense).round(3))
        [2.]
    """

    stage = "aggregate"
    radius: float = numeric(
        10.0, "tau, the largest L2 distance from the centre.", above=0, unbounded=ANY_SCALE
    )
    num_iterations: int = static(1, "Iterations in a round.", low=1, high=10**6)
    start: str = static("previous", "The centre at the start.", choices=("previous", "zero"))
    convention: str = static(
        "paper", "`fedsecurity`: as FedML computes it.", choices=("paper", "fedsecurity")
    )
    bucket_size: int | None = static(
        None, "With `fedsecurity`, clients in a bucket (null: 2).", low=1, high=COUNT
    )

    def check(self, path, setting):
        unread = ("bucket_size",) if self.convention == "paper" else ("num_iterations", "start")
        refuse_unread(self, path, unread, f"with convention {self.convention!r}")

    @property
    def _remembers(self) -> bool:
        return self.start == "previous" and self.convention == "paper"

    def init(self, num_clients, dim):
        return jnp.zeros(dim) if self._remembers else ()

    def apply(self, key, updates, state, view):
        if self.convention == "fedsecurity":
            return self._of_buckets(key, updates, state, view)
        begin = jnp.zeros(updates.shape[1], updates.dtype) if self.start == "zero" else state
        measured = trained_part(view.space, updates.shape[1])
        aggregate, factor = iterative.centered_clip(
            updates, view.valid, begin, self.num_iterations, self.radius, measured
        )
        # Without a single valid row there is nothing to move the centre: the aggregate is zero.
        aggregate = jnp.where(view.valid.any(), aggregate, 0.0)
        state = aggregate if self._remembers else state
        return aggregate, state, {"kept": factor}

    def _of_buckets(self, key, updates, state, view):
        size = self.bucket_size or 2
        count = -(-updates.shape[0] // size)
        rows, weights, members = _fedsecurity.buckets(
            updates, view.weights, view.valid, size, count
        )
        used = members.any(axis=1)
        chosen = jnp.floor(jax.random.uniform(key) * used.sum()).astype(jnp.int32)
        center = rows[jnp.minimum(chosen, count - 1)]
        moves = jnp.where(used[:, None], rows - center[None], 0.0)
        learned = trained_columns(moves, view)
        zero = jnp.zeros(learned.shape[1], moves.dtype)
        distance = iterative.distances_from(learned, zero).astype(wide(rows.dtype))
        factor = jnp.minimum(1.0, self.radius / (distance + 1e-8)).astype(rows.dtype)
        moved = weighted_mean(moves * factor[:, None], jnp.where(used, weights, 0.0))
        return center + moved, state, {"kept": jnp.where(used, factor, 0.0) @ members}

"""Centred clipping (Karimireddy, He and Jaggi, ICML 2021)."""

import jax.numpy as jnp

from fedjax_sec.core import ANY_SCALE, Stage, numeric, registry, static
from fedjax_sec.ops import iterative


@registry.defenses.register("centered_clipping")
class CenteredClipping(Stage):
    r"""The last aggregate, moved by the mean of the clipped differences from it.

    .. math:: v \leftarrow v + \frac{1}{n} \sum_i (u_i - v) \min(1, \tau / \|u_i - v\|)

    `updates [K, D] -> [D]`, unweighted. The centre v is the previous round's aggregate, zero in
    the first round. `kept` is each client's last factor. Clients whose update is not finite are
    left out.

    Source: Karimireddy et al. 2021, arXiv:2012.10333, Algorithm 2; one iteration a round, and the
    previous aggregate as the centre, are the paper's. It clips worker momenta and tunes tau for
    each task, so the default radius is a choice. `start="zero"` forgets the previous aggregate.

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

    def init(self, num_clients, dim):
        return jnp.zeros(dim) if self.start == "previous" else ()

    def apply(self, key, updates, state, view):
        begin = jnp.zeros(updates.shape[1], updates.dtype) if self.start == "zero" else state
        aggregate, factor = iterative.centered_clip(
            updates, view.valid, begin, self.num_iterations, self.radius
        )
        # Without a single valid row there is nothing to move the centre: the aggregate is zero.
        aggregate = jnp.where(view.valid.any(), aggregate, 0.0)
        state = aggregate if self.start == "previous" else state
        return aggregate, state, {"kept": factor}

"""Sign aggregation: the majority of the updates' signs (Bernstein et al., ICLR 2019)."""

import jax.numpy as jnp

from fedjax_sec.core import Stage, registry
from fedjax_sec.ops.signs import sign_votes


@registry.defenses.register("sign")
class Sign(Stage):
    r"""In every coordinate the sign that most clients send, or zero where they are even.

    .. math:: agg_j = \mathrm{sgn} \sum_i \mathrm{sgn}(u_{ij})

    `updates [K, D] -> [D]` with values -1, 0 and 1, unweighted: how far to go is the server's
    learning rate (`server.optimizer`), which is the eta of the equation. `kept` is the share of
    coordinates in which a client's sign is the result. Clients whose update is not finite are left
    out.

    Source: Bernstein et al. 2019, "signSGD with Majority Vote is Communication Efficient and Fault
    Tolerant", Algorithm 1; Ozdayi et al. 2021 (RLR), Equation 4.

    Example:
        >>> import fedjax_sec
        >>> print(fedjax_sec.aggregate([[1.0, 3.0], [2.0, -1.0], [-9.0, 0.0]], "sign"))
        [1. 0.]
    """

    stage = "aggregate"
    keeps_scale = False

    def apply(self, key, updates, state, view):
        aggregate = jnp.sign(sign_votes(updates, view.valid))
        agree = (jnp.sign(updates) == aggregate[None, :]) & view.valid[:, None]
        kept = agree.mean(axis=1, dtype=updates.dtype)
        return aggregate, state, {"kept": kept}

"""FLTrust: clients are weighed by how well they agree with the server's own update."""

import jax
import jax.numpy as jnp

from fedjax_sec.core import Stage, registry
from fedjax_sec.defenses._layers import trained_columns
from fedjax_sec.ops.distances import cosines_to
from fedjax_sec.ops.moments import row_norms, weighted_mean


@registry.defenses.register("fltrust")
class FLTrust(Stage):
    r"""The mean of updates brought to the server update's length, weighted by their cosine to it.

    With the server update g_0, what the server itself learns in the round from its root data set,

    .. math:: TS_i = \mathrm{ReLU}\left(\frac{\langle u_i, g_0\rangle}{\|u_i\| \|g_0\|}\right),
              \qquad \frac{1}{\sum_j TS_j} \sum_i TS_i \frac{\|g_0\|}{\|u_i\|} u_i

    `updates [K, D] -> [D]`. `kept` is the trust score. Where all scores are zero the global model
    stays as it is; the metric `fltrust/no_trust` is 1 in such a round. An update of length zero has
    no direction and no trust. Clients' numbers of examples are not used. Running statistics count
    neither towards cosines nor lengths, and follow the weights.

    Raises: `ConfigError` without `server.root`, or in `fedjax_sec.aggregate` without
    `server_update`.

    Source: Cao, Fang, Liu, Gong 2021 (FLTrust, NDSS), Algorithm 2. The author code divides by the
    sum of scores plus 1e-9, which in float32 is the sum itself unless it is tiny.

    Example:
        >>> import fedjax_sec
        >>> updates = [[4.0, 0.0], [0.0, 1.0], [-9.0, 0.0]]
        >>> print(fedjax_sec.aggregate(updates, "fltrust", server_update=[1.0, 1.0]))
        [0.70710677 0.70710677]
    """

    stage = "aggregate"
    needs = frozenset({"root"})

    def apply(self, key, updates, state, view):
        server = view.root.update()
        rows = trained_columns(updates, view)
        learned = trained_columns(server[None], view)[0]
        norms = row_norms(rows).astype(server.dtype)
        trusted = view.valid & (norms > 0)
        score = jax.nn.relu(cosines_to(rows, learned, trusted))
        total = score.sum()
        weight = score * jnp.linalg.norm(learned) / jnp.where(trusted, norms, 1.0)
        mean = weighted_mean(updates, weight)
        aggregate = mean * (weight.sum() / jnp.where(total > 0, total, 1.0)).astype(mean.dtype)
        return aggregate, state, {"kept": score, "no_trust": (total == 0).astype(jnp.float32)}

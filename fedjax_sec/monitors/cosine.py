"""Each client's direction beside that of the honest clients."""

import jax.numpy as jnp

from fedjax_sec.core import Monitor, registry, static, trained_part
from fedjax_sec.ops.distances import cosines_to
from fedjax_sec.ops.moments import finite_rows, weighted_mean


@registry.monitors.register("cosine")
class Cosine(Monitor):
    r"""The cosine of what each client sent with the mean of the honest clients' updates.

    .. math:: c_i = \frac{\langle u_i, h \rangle}{\|u_i\| \|h\|}, \qquad
              h = \frac{1}{|H|} \sum_{i \in H} u_i

    with H the honest clients that took part and whose update is finite. Metrics: `cosine/client`
    [K], 0 for a client that sent nothing, zeros or NaN, and the means over the honest and the
    malicious clients, `cosine/honest` and `cosine/malicious` (NaN where there are none). An honest
    client's own update is a part of h. Running statistics are left out.

    Source: none, a choice; FoolsGold and FLTrust judge clients by such cosines.

    Example:
        >>> import fedjax_sec
        >>> evaluation = {"monitors": "cosine"}
        >>> result = fedjax_sec.run({"evaluation": evaluation, "rounds": 1})
        >>> result.metrics["cosine/client"].shape
        (2, 20)
    """

    when: str = static(
        "last",
        "Rounds in which it looks: `every`, or the `last` before an evaluation.",
        choices=("last", "every"),
    )

    def observe(self, key, state, trace, task):
        sent = trace.sent.vector
        updates = sent[:, trained_part(task.space, sent.shape[1])]
        there = trace.present & finite_rows(updates)
        honest, malicious = there & ~trace.malicious, there & trace.malicious
        safe = jnp.where(there[:, None], updates, 0.0)
        mean = weighted_mean(safe, honest.astype(updates.dtype))
        cosine = cosines_to(updates, mean, there)
        return state, {
            "client": cosine,
            "honest": _mean_over(cosine, honest),
            "malicious": _mean_over(cosine, malicious),
        }


def _mean_over(values, mask):
    """Mean over the clients of `mask`; NaN (null in the results) when there are none."""
    return jnp.sum(jnp.where(mask, values, 0.0)) / mask.sum()

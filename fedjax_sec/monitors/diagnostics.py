"""Why a defence held or failed: what it kept, and how long updates are."""

import jax.numpy as jnp

from fedjax_sec.core import ConfigError, Monitor, registry, static, trained_part
from fedjax_sec.ops.moments import row_norms


@registry.monitors.register("diagnostics")
class Diagnostics(Monitor):
    r"""Norms of the updates, the share of each client that the defence kept, and detection rates.

    `update_norm [K]`, `kept [K]` and their means over honest and malicious clients;
    `detection/true_positive_rate` and `detection/false_positive_rate`: of the malicious and of the
    honest clients that took part, the share of which nothing was kept; `attack_shift`, how far the
    attack moved its rows; the scalars that attack and defence report. `clients [K]` says whose
    entries they are where clients are sampled, `malicious [K]` who is where that is redrawn.

    Norms are without running statistics, as the rules measure.

    They cost several passes over the stack, so they are computed in the last round before an
    evaluation; `evaluation.diagnostics: false` leaves them out.

    Source: none, a choice.

    Example:
        >>> import fedjax_sec
        >>> result = fedjax_sec.run({"data": {"num_clients": 3}, "rounds": 1})
        >>> result.metrics["kept"][-1].tolist()
        [1.0, 1.0, 1.0]
    """

    prefix = ""
    when: str = static(
        "last",
        "Rounds in which it looks: `every`, or the `last` before an evaluation.",
        choices=("last", "every"),
    )

    def observe(self, key, state, trace, task):
        metrics = trace.explain()
        if "kept" not in metrics:
            raise ConfigError(
                "defense: its rule reports no 'kept', which diagnostics show; let its apply return "
                "it in the metrics, each row's share in [0, 1], such as "
                "view.valid.astype(updates.dtype) where all rows count, or set "
                "evaluation.diagnostics=false."
            )
        sent, honestly = trace.sent.vector, trace.honest.vector
        learned = trained_part(task.space, sent.shape[1])
        kept, norms = metrics["kept"], row_norms(sent[:, learned])
        malicious, honest = trace.malicious, trace.present & ~trace.malicious
        removed = (kept == 0).astype(norms.dtype)
        shown = {
            "update_norm": norms,
            "kept": kept,
            "update_norm_honest": _mean_over(norms, honest),
            "update_norm_malicious": _mean_over(norms, malicious),
            "kept_honest": _mean_over(kept, honest),
            "kept_malicious": _mean_over(kept, malicious),
            "detection/true_positive_rate": _mean_over(removed, malicious),
            "detection/false_positive_rate": _mean_over(removed, honest),
        }
        if sent is not honestly:
            shift = row_norms((sent - honestly)[:, learned])
            shown["attack_shift"] = _mean_over(shift, malicious)
        for extra in (trace.attack, metrics):
            shown |= {name: v for name, v in extra.items() if "/" in name and jnp.ndim(v) == 0}
        if trace.sampled:
            shown["clients"] = trace.ids
        if trace.redrawn:
            shown["malicious"] = malicious
        return state, shown


def _mean_over(values, mask):
    """Mean over the clients of `mask`; NaN (null in the results) when there are none."""
    return jnp.sum(jnp.where(mask, values, 0.0)) / mask.sum()

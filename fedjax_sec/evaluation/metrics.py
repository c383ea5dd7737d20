"""Metrics of a model on test data, streamed as sums. Nothing here ever sees training labels."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fedjax_sec.core.types import BoundTask, Metrics
from fedjax_sec.evaluation.batches import in_batches, sum_in_batches


def task_metrics(params: Float[Array, " D"], x, y, task: BoundTask, batch_size: int) -> Metrics:
    """The task's own metrics on the examples (x as stored, y).

    Each is the sum of its numerators over the batches divided by that of its denominators, so that
    batches of unequal size weigh as their examples do; NaN where nothing counts.
    """

    def sums(x, y):
        outputs = task.outputs(params, task.inputs.decode(x))
        return task.task.sums(outputs, y, jnp.ones(y.shape[0], bool))

    totals = sum_in_batches(sums, batch_size, x, y)
    return {name: top / bottom for name, (top, bottom) in totals.items()}


def backdoor_metrics(
    params: Float[Array, " D"],
    x,
    y,
    task: BoundTask,
    backdoor,
    state,
    batch_size: int,
    exclude_target: bool,
) -> Metrics:
    r"""The backdoor's success and loss.

    .. math:: asr = \frac{\sum_t c_t [\hat y(trigger(x_t)) = target_t]}{\sum_t c_t}

    with c_t = 1 for the probes that count (of a backdoor with a base class: that class);
    `exclude_target` leaves out those whose true label is the attacker's. `backdoor_loss` is the
    mean loss of the same probes to the attacker's labels. Shares in [0, 1]. Of a backdoor with
    several base classes, `per_base_attack_success_rate` holds the success for each of them, in the
    order of `bases`; NaN where nothing counts.
    """
    probes, target, include = backdoor.probes(state, task.inputs.decode(x), y, task)

    def answers(inputs, labels):
        outputs = task.outputs(params, inputs)
        return task.task.right(outputs, labels), task.losses(outputs, labels)[0]

    right, losses = in_batches(answers, batch_size, probes, target)
    if exclude_target and backdoor.probes_are_tests and probes.shape[0] == y.shape[0]:
        include = include & (y != target)
    count = jnp.maximum(include.sum(), 1)
    metrics = {
        "attack_success_rate": jnp.sum(include & right) / count,
        "backdoor_loss": jnp.sum(jnp.where(include, losses, 0.0)) / count,
    }
    if len(backdoor.bases or ()) > 1:  # its probes are the test examples
        truth, bases = task.task.labels_of(y)[None], jnp.array(backdoor.bases)[:, None]
        each = include[None] & (truth == bases)
        hits = (each & right[None]).sum(axis=1)
        metrics["per_base_attack_success_rate"] = hits / each.sum(axis=1)
    return metrics


def over_classes(shares: Float[Array, " B"], counts: Int[Array, " B"]) -> Float[Array, ""]:
    """The share over the examples of several classes, from each class's share and number.

    A class without examples, whose share is NaN, does not count. One class's share stays as it is.

    >>> shares, counts = jnp.array([0.5, 1.0, jnp.nan]), jnp.array([30, 10, 0])
    >>> over_classes(shares, counts).item()
    0.625
    """
    if shares.shape[0] == 1:
        return shares[0]
    return jnp.sum(jnp.where(counts > 0, shares * counts, 0.0)) / counts.sum()

"""Metrics of a model on test data. Nothing here ever sees training labels as a test set."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from fedjax_sec.core.types import Metrics, Task, to_pixels
from fedjax_sec.evaluation.batches import in_batches


class TestSet(NamedTuple):
    """Held-out examples as stored: integers and labels."""

    __test__ = False  # not a test case, whatever pytest thinks of the name

    x: UInt8[Array, " T *shape"]
    y: Int[Array, " T"]


def evaluate(
    params: Float[Array, " D"],
    test: TestSet,
    task: Task,
    pixel_scale: float,
    backdoor: Any,
    batch_size: int,
    exclude_target: bool,
) -> Metrics:
    r"""Accuracy, loss and per-class accuracy on the test set, and the backdoor's success and loss.

    .. math:: accuracy = \frac{1}{T} \sum_t [\hat y_t = y_t], \qquad
              asr = \frac{\sum_t c_t [\hat y(trigger(x_t)) = target_t]}{\sum_t c_t}

    with c_t = 1 for the probes that count (of a backdoor with a base class: that class);
    `exclude_target` leaves out those whose true label is the attacker's. `backdoor_loss` is the
    mean cross-entropy of the same probes to the attacker's labels. Shares in [0, 1];
    `per_class_accuracy` is [C]. `attack_success_rate` and `backdoor_loss` are there only when
    there is a backdoor, and `base_class_accuracy`, on clean test examples of its base class, only
    when it has one.
    """

    def predict(x):
        return task.logits(params, x)

    logits = in_batches(lambda x: predict(to_pixels(x, pixel_scale)), batch_size, test.x)
    correct = (jnp.argmax(logits, axis=-1) == test.y).astype(jnp.float32)
    log_probs = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_probs, test.y[..., None], axis=-1)
    member = jax.nn.one_hot(test.y.reshape(-1), task.num_classes)  # [T], or [T, ...] flattened
    metrics = {
        "accuracy": correct.mean(),
        "loss": -picked.mean(),
        "per_class_accuracy": correct.reshape(-1) @ member / member.sum(0),
    }
    if backdoor is not None:
        x, target, include = backdoor.probes(to_pixels(test.x, pixel_scale), test.y, task)
        logits = in_batches(predict, batch_size, x)
        predicted, log_probs = jnp.argmax(logits, axis=-1), jax.nn.log_softmax(logits)
        picked = jnp.take_along_axis(log_probs, target[:, None], axis=1)[:, 0]
        if exclude_target and x.shape[0] == test.y.shape[0]:
            include = include & (test.y != target)
        count = jnp.maximum(include.sum(), 1)
        metrics["attack_success_rate"] = jnp.sum(include & (predicted == target)) / count
        metrics["backdoor_loss"] = -jnp.sum(jnp.where(include, picked, 0.0)) / count
        if backdoor.base is not None:
            metrics["base_class_accuracy"] = metrics["per_class_accuracy"][backdoor.base]
    return metrics

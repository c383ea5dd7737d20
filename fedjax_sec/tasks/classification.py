"""Classification by cross-entropy: one class for each example."""

import math

import jax
import jax.numpy as jnp

from fedjax_sec.core import Task, registry


@registry.tasks.register("classification")
class Classification(Task):
    r"""Outputs are logits `[B, C]`, targets class numbers `[B]`; the loss is the cross-entropy.

    .. math:: \ell_i = -\log \mathrm{softmax}(z_i)_{y_i}, \qquad
              accuracy = \frac{1}{T} \sum_i [\arg\max_c z_{ic} = y_i]

    Targets may be `[B, ...]` with logits `[B, ..., C]`: then every one of them is a unit of the
    mean. Metrics: `accuracy`, `loss` and `per_class_accuracy` [C].

    Source: none needed; the headline is the accuracy on the test examples.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedjax_sec.core import registry
        >>> task = registry.tasks.build("classification")
        >>> outputs, y = jnp.array([[2.0, 0.0], [2.0, 0.0]]), jnp.array([0, 1])
        >>> print(task.sums(outputs, y, jnp.ones(2, bool))["accuracy"][0])
        1.0
    """

    headline = "accuracy"

    def losses(self, outputs, y):
        log_probs = jax.nn.log_softmax(outputs)
        # A product with the one-hot label: its gradient needs no scatter.
        total = -jnp.sum(jax.nn.one_hot(y, outputs.shape[-1]) * log_probs, axis=-1)
        units = jnp.full(y.shape[:1], float(math.prod(y.shape[1:])))
        return total.reshape(y.shape[0], -1).sum(axis=1) if y.ndim > 1 else total, units

    def sums(self, outputs, y, mask):
        each = jnp.broadcast_to(mask.reshape(-1, *[1] * (y.ndim - 1)), y.shape).astype(jnp.float32)
        right = self.right(outputs, y).astype(jnp.float32) * each
        log_probs = jax.nn.log_softmax(outputs)
        picked = jnp.take_along_axis(log_probs, y[..., None], axis=-1)[..., 0]
        member = jax.nn.one_hot(y.reshape(-1), outputs.shape[-1])  # [B], or [B, ...] flattened
        count = each.sum()
        return {
            "accuracy": (right.sum(), count),
            "loss": (-jnp.sum(jnp.where(each > 0, picked, 0.0)), count),
            "per_class_accuracy": (right.reshape(-1) @ member, each.reshape(-1) @ member),
        }

    def right(self, outputs, y):
        return jnp.argmax(outputs, axis=-1) == y

    def labels_of(self, y):
        return y

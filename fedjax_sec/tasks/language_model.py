"""Language modelling: the next token at every place of a sequence."""

import jax
import jax.numpy as jnp

from fedjax_sec.core import Task, registry


@registry.tasks.register("language_model")
class LanguageModel(Task):
    r"""Outputs are logits `[B, L, V]`, targets the next tokens `[B, L]`, -1 where a sequence ended.

    The unit of the loss is the token, so a batch's loss is the mean over all of its tokens,

    .. math:: \ell = -\frac{\sum_{b, l} [y_{bl} \ge 0] \log \mathrm{softmax}(z_{bl})_{y_{bl}}}
                         {\sum_{b, l} [y_{bl} \ge 0]}

    and no mean of examples' means. Metrics: `next_token_accuracy` and `loss` (nats a token, whose
    exponential is the perplexity). An example has no class, so label partitions and attacks on
    classes are refused.

    Source: McMahan et al. 2017, Section 3 (Shakespeare, next character), reports the accuracy over
    all predicted characters, the headline here.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedjax_sec.core import registry
        >>> task = registry.tasks.build("language_model")
        >>> total, units = task.losses(jnp.zeros((1, 3, 4)), jnp.array([[1, 2, -1]]))
        >>> print(units)
        [2.]
    """

    headline = "next_token_accuracy"
    inputs = frozenset({"tokens"})

    def losses(self, outputs, y):
        inside = y >= 0
        chosen = jax.nn.one_hot(y, outputs.shape[-1])  # zeros for -1
        total = -jnp.sum(chosen * jax.nn.log_softmax(outputs), axis=(1, 2))
        return total, inside.sum(axis=1).astype(jnp.float32)

    def sums(self, outputs, y, mask):
        inside = (y >= 0) & mask[:, None]
        total, _ = self.losses(outputs, y)
        count = inside.sum().astype(jnp.float32)
        right = (self.right(outputs, y) & inside).sum().astype(jnp.float32)
        return {
            "next_token_accuracy": (right, count),
            "loss": (jnp.sum(jnp.where(mask, total, 0.0)), count),
        }

    def right(self, outputs, y):
        return (jnp.argmax(outputs, axis=-1) == y) & (y >= 0)

"""Logistic regression, FLTrust's model for human activities."""

from flax import linen as nn

from fedjax_sec.core import Network, registry, static
from fedjax_sec.models._common import INITS, dense, flax_model


class _Network(nn.Module):
    num_classes: int
    scheme: str

    @nn.compact
    def __call__(self, x):
        return dense(self.num_classes, x.reshape(x.shape[0], -1), self.scheme, "output")


@registry.models.register("logistic_regression")
class LogisticRegression(Network):
    """One linear layer with a bias, trained by cross-entropy: `x [B, ...] -> logits [B, C]`.

    On 561 features and 6 classes 3,372 parameters.

    Source: Cao et al. 2021 (FLTrust), Section VI-A, "LR" for HAR. The initialisation is a choice.

    Example:
        >>> import jax
        >>> from fedjax_sec.core import registry
        >>> model = registry.models.build("logistic_regression").make((561,), 6)
        >>> sum(p.size for p in jax.tree.leaves(model.init(jax.random.key(0))))
        3372
    """

    inputs = frozenset({"pixels", "features"})
    init: str = static("glorot", "Initial weights and biases.", choices=INITS)

    def make(self, input_shape, num_classes):
        return flax_model(_Network(num_classes, self.init), input_shape)

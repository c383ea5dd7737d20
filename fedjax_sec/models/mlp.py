"""The multi-layer perceptron of ALIE's MNIST experiments."""

from flax import linen as nn

from fedjax_sec.core import COUNT, Network, registry, static
from fedjax_sec.models._common import INITS, dense, flax_model


class _Network(nn.Module):
    hidden: tuple[int, ...]
    num_classes: int
    scheme: str
    first_scheme: str

    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.hidden):
            kernel = self.first_scheme if i == 0 else self.scheme
            x = nn.relu(dense(width, x, self.scheme, f"hidden_{i}", kernel))
        return dense(self.num_classes, x, self.scheme, "output")


@registry.models.register("mlp")
class Mlp(Network):
    """Fully connected ReLU network on flattened inputs; 784-100-10 is ALIE's MNIST perceptron.

    `x [B, ...] -> logits [B, C]`; 784-100-10 has 79,510 parameters ("d equals almost 80k").

    Source: Baruch et al. 2019, Section 4, Models. The text gives no initialisation; the author
    code uses PyTorch's defaults with a Glorot-uniform first kernel, which are the defaults here.

    Example:
        >>> import jax
        >>> from fedjax_sec.core import registry
        >>> model = registry.models.build("mlp").make((28, 28, 1), 10)
        >>> sum(p.size for p in jax.tree.leaves(model.init(jax.random.key(0))))
        79510
    """

    inputs = frozenset({"pixels", "features"})
    hidden: tuple[int, ...] = static((100,), "Widths of the hidden layers.", low=1, high=COUNT)
    init: str = static("pytorch", "Initial weights and biases.", choices=INITS)
    first_init: str = static("glorot", "Initial weights of the first layer.", choices=INITS)

    def make(self, input_shape, num_classes):
        network = _Network(self.hidden, num_classes, self.init, self.first_init)
        return flax_model(network, input_shape)

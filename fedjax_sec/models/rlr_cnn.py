"""The convolutional network of the RLR paper's Fashion-MNIST and Federated EMNIST experiments."""

from flax import linen as nn

from fedjax_sec.core import ConfigError, Network, registry, static
from fedjax_sec.models._common import INITS, Convolutional, convolution_field, flax_model


class _Network(nn.Module):
    num_classes: int
    dropout: float
    scheme: str
    lowering: str

    @nn.compact
    def __call__(self, x, train=False):
        images = Convolutional(self.lowering, self.scheme)
        x = images.enter(x, 2)
        for i, width in enumerate((32, 64)):
            x = images.relu(images.conv(width, 3, x, f"conv_{i}"))
        # After flattening, so that the masks do not depend on the order of axes.
        x = images.flat(images.max_pool(x, 2))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = nn.relu(images.dense(128, x, "hidden"))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return images.dense(self.num_classes, x, "output")


@registry.models.register("rlr_cnn")
class RlrCnn(Network):
    """RLR's CNN: conv 3x3x32, conv 3x3x64, pool 2, dropout, dense 128, dropout, classes.

    `x [B, 28, 28, 1] -> logits [B, 10]`, 1,199,882 parameters, convolutions without padding. The
    dropout masks are drawn anew for every client and local step, and there are none in evaluation.

    Raises: `ConfigError` for images smaller than 6 x 6, which leave nothing to pool.

    Source: Ozdayi et al. 2021, Experiments ("5-layer convolutional neural network consisting of
    about 1.2M parameters"); widths, padding, dropout 0.5 and PyTorch's initialisation from the
    author code.

    Example:
        >>> import jax
        >>> from fedjax_sec.core import registry
        >>> model = registry.models.build("rlr_cnn").make((28, 28, 1), 10)
        >>> sum(p.size for p in jax.tree.leaves(model.init(jax.random.key(0))))
        1199882
    """

    inputs = frozenset({"pixels"})
    dropout: float = static(0.5, "Share of the activations dropped in training.", low=0, below=1)
    init: str = static("pytorch", "Initial weights and biases.", choices=INITS)
    convolution: str = convolution_field()

    def make(self, input_shape, num_classes):
        if len(input_shape) != 3 or min(input_shape[:2]) < 6:
            raise ConfigError(
                f"model: rlr_cnn needs images of at least 6 x 6 pixels, got {input_shape}; "
                f"choose another model such as 'mlp'."
            )
        network = _Network(num_classes, self.dropout, self.init, self.convolution)
        return flax_model(network, input_shape, convolves=True, trains_differently=True)

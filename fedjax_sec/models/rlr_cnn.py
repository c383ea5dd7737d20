"""The convolutional network of the RLR paper's Fashion-MNIST and Federated EMNIST experiments."""

from fedjax_sec.core import ConfigError, Network, registry, static
from fedjax_sec.models._common import INITS, convolution_field, flax_model
from fedjax_sec.models._dropout_cnn import DropoutCnn


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
        drops = (self.dropout, self.dropout)
        network = DropoutCnn(num_classes, drops, False, self.init, self.convolution)
        return flax_model(network, input_shape, convolves=True, trains_differently=True)

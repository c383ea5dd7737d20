"""The convolutional network of FLTrust's MNIST and Fashion-MNIST experiments."""

from flax import linen as nn

from fedjax_sec.core import ConfigError, Network, registry, static
from fedjax_sec.models._common import INITS, Convolutional, convolution_field, flax_model


class _Network(nn.Module):
    num_classes: int
    scheme: str
    lowering: str

    @nn.compact
    def __call__(self, x):
        images = Convolutional(self.lowering, self.scheme)
        x = images.enter(x, 4)
        for i, width in enumerate((30, 50)):
            x = images.relu(images.max_pool(images.conv(width, 3, x, f"conv_{i}"), 2))
        x = images.flat(x)
        x = nn.relu(images.dense(100, x, "hidden"))
        return images.dense(self.num_classes, x, "output")


@registry.models.register("fltrust_cnn")
class FltrustCnn(Network):
    """FLTrust's CNN: conv 3x3x30, pool 2, conv 3x3x50, pool 2, dense 100, classes.

    `x [B, 28, 28, 1] -> logits [B, 10]`, 139,960 parameters. Convolutions without padding and with
    stride 1, which the table leaves open, give the author code's number of parameters.

    Raises: `ConfigError` for images smaller than 10 x 10, which the poolings reduce to nothing.

    Source: Cao et al. 2021, Table II. The initialisation is a choice: the author code's Xavier
    draw with magnitude 2.24 is MXNet's, and close to `glorot` here, the default.

    Example:
        >>> import jax
        >>> from fedjax_sec.core import registry
        >>> model = registry.models.build("fltrust_cnn").make((28, 28, 1), 10)
        >>> sum(p.size for p in jax.tree.leaves(model.init(jax.random.key(0))))
        139960
    """

    inputs = frozenset({"pixels"})
    init: str = static("glorot", "Initial weights and biases.", choices=INITS)
    convolution: str = convolution_field()

    def make(self, input_shape, num_classes):
        if len(input_shape) != 3 or min(input_shape[:2]) < 10:
            raise ConfigError(
                f"model: fltrust_cnn needs images of at least 10 x 10 pixels, got {input_shape}; "
                f"choose another model such as 'mlp'."
            )
        network = _Network(num_classes, self.init, self.convolution)
        return flax_model(network, input_shape, convolves=True)

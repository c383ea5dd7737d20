"""The CIFAR10 network of ALIE, as the text gives it."""

from flax import linen as nn

from fedjax_sec.core import ConfigError, Network, registry, static
from fedjax_sec.models._common import INITS, Convolutional, convolution_field, flax_model


class _Network(nn.Module):
    num_classes: int
    scheme: str
    first_scheme: str
    lowering: str

    @nn.compact
    def __call__(self, x):
        images = Convolutional(self.lowering, self.scheme)
        x = images.conv(16, 3, images.enter(x, 3), "conv_0", self.first_scheme)
        x = images.relu(images.max_pool(x, 3))
        x = images.conv(64, 4, images.enter(x, 4), "conv_1")
        x = images.flat(images.relu(images.max_pool(x, 4)))
        x = nn.relu(images.dense(384, x, "hidden_0"))
        x = nn.relu(images.dense(192, x, "hidden_1"))
        return images.dense(self.num_classes, x, "output")


@registry.models.register("alie_cifar10")
class AlieCifar10(Network):
    """ALIE's CIFAR10 network: conv 3x3x16, pool 3, conv 4x4x64, pool 4, dense 384, 192, classes.

    `x [B, 32, 32, 3] -> logits [B, C]`. The paper says "d ~ 1M", but these layers count 117,706
    parameters for 10 classes; the author code builds the same layers, so they are kept.

    Raises: `ConfigError` for images smaller than 24 x 24, which the two poolings reduce to nothing.

    Source: Baruch et al. 2019, Section 4, Models; initialisation (PyTorch's defaults, first kernel
    Glorot-uniform) from the author code, since the text gives none.

    Example:
        >>> import jax
        >>> from fedjax_sec.core import registry
        >>> model = registry.models.build("alie_cifar10").make((32, 32, 3), 10)
        >>> sum(p.size for p in jax.tree.leaves(model.init(jax.random.key(0))))
        117706
    """

    inputs = frozenset({"pixels"})
    init: str = static("pytorch", "Initial weights and biases.", choices=INITS)
    first_init: str = static("glorot", "Initial weights of the first layer.", choices=INITS)
    convolution: str = convolution_field()

    def make(self, input_shape, num_classes):
        if len(input_shape) != 3 or min(input_shape[:2]) < 24:
            raise ConfigError(
                f"model: alie_cifar10 needs images of at least 24 x 24 pixels, got {input_shape}; "
                f"choose another model such as 'mlp'."
            )
        network = _Network(num_classes, self.init, self.first_init, self.convolution)
        return flax_model(network, input_shape, convolves=True)

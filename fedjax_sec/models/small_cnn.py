"""A small convolutional network for small images such as scikit-learn's digits."""

from flax import linen as nn

from fedjax_sec.core import COUNT, ConfigError, Network, registry, static
from fedjax_sec.models._common import INITS, Convolutional, convolution_field, flax_model


class _Network(nn.Module):
    channels: tuple[int, ...]
    hidden: int
    num_classes: int
    scheme: str
    lowering: str

    @nn.compact
    def __call__(self, x):
        images = Convolutional(self.lowering, self.scheme)
        x = images.enter(x, 2)
        for i, width in enumerate(self.channels):
            x = images.relu(images.conv(width, 3, x, f"conv_{i}"))
        x = images.flat(images.max_pool(x, 2))
        x = nn.relu(images.dense(self.hidden, x, "hidden"))
        return images.dense(self.num_classes, x, "output")


@registry.models.register("small_cnn")
class SmallCnn(Network):
    """3x3 convolutions, one 2x2 max-pooling, one hidden layer: for 8 x 8 digits and alike.

    `x [B, H, W, C] -> logits [B, classes]`. No paper's network: a choice, small enough for a demo.

    Raises: `ConfigError` when the convolutions leave less than 2 x 2 pixels.

    Source: none; valid 3x3 convolutions before one pooling are the common choice for tiny images.

    Example:
        >>> import jax
        >>> from fedjax_sec.core import registry
        >>> model = registry.models.build("small_cnn").make((8, 8, 1), 10)
        >>> sum(p.size for p in jax.tree.leaves(model.init(jax.random.key(0))))
        9090
    """

    inputs = frozenset({"pixels"})
    channels: tuple[int, ...] = static(
        (16, 16), "Feature maps of each convolution.", low=1, high=COUNT
    )
    hidden: int = static(88, "Width of the hidden layer.", low=1, high=COUNT)
    init: str = static("pytorch", "Initial weights and biases.", choices=INITS)
    convolution: str = convolution_field()

    def make(self, input_shape, num_classes):
        side = min(input_shape[:2]) - 2 * len(self.channels)
        if len(input_shape) != 3 or side < 2:
            raise ConfigError(
                f"model.channels: {len(self.channels)} convolutions leave no 2 x 2 pixels of "
                f"images of shape {input_shape}; give fewer, or choose another model such as 'mlp'."
            )
        network = _Network(self.channels, self.hidden, num_classes, self.init, self.convolution)
        return flax_model(network, input_shape, convolves=True)

"""The convolutional network of the RLR paper's CIFAR10 experiments."""

import functools

from flax import linen as nn

from fedjax_sec.core import COUNT, ConfigError, Network, registry, static
from fedjax_sec.models._common import INITS, Convolutional, convolution_field, flax_model


class _Network(nn.Module):
    channels: tuple[int, ...]
    hidden: tuple[int, ...]
    num_classes: int
    dropout: float
    scheme: str
    lowering: str

    @nn.compact
    def __call__(self, x, train=False):
        images = Convolutional(self.lowering, self.scheme)
        x = images.enter(x, 8)
        for i, width in enumerate(self.channels):
            x = images.relu(images.max_pool(images.conv(width, 3, x, f"conv_{i}"), 2))
        # After flattening, so that the masks do not depend on the order of axes.
        x = images.flat(x)
        for i, width in enumerate(self.hidden):
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
            x = nn.relu(images.dense(width, x, f"hidden_{i}"))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return images.dense(self.num_classes, x, "output")


@registry.models.register("rlr_cifar10")
class RlrCifar10(Network):
    """RLR's CIFAR10 network: conv 3x3x64, 3x3x128, 3x3x256, each pooled; dense 128, 256, classes.

    `x [B, 32, 32, 3] -> logits [B, 10]`, 537,610 parameters. Convolutions without padding, each
    followed by ReLU and a 2x2 max-pooling; dropout before every dense layer. The dropout masks are
    drawn anew for every client and local step, and there are none in evaluation.

    Raises: `ConfigError` for images that the poolings reduce to nothing (smaller than 22 x 22).

    Source: Ozdayi et al. 2021, author code (`src/models.py`, `CNN_CIFAR`); the text does not
    describe it. Initialisation as PyTorch's, dropout 0.5.

    Example:
        >>> import jax
        >>> from fedjax_sec.core import registry
        >>> model = registry.models.build("rlr_cifar10").make((32, 32, 3), 10)
        >>> sum(p.size for p in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))))
        537610
    """

    inputs = frozenset({"pixels"})
    channels: tuple[int, ...] = static(
        (64, 128, 256), "Feature maps of each convolution.", low=1, high=COUNT
    )
    hidden: tuple[int, ...] = static((128, 256), "Widths of the hidden layers.", low=1, high=COUNT)
    dropout: float = static(0.5, "Share of the activations dropped in training.", low=0, below=1)
    init: str = static("pytorch", "Initial weights and biases.", choices=INITS)
    convolution: str = convolution_field()

    def make(self, input_shape, num_classes):
        # A convolution takes two pixels of each side, a pooling half of the rest.
        least = functools.reduce(lambda size, _: 2 * size + 2, self.channels, 1)
        if len(input_shape) != 3 or min(input_shape[:2]) < least:
            raise ConfigError(
                f"model: rlr_cifar10 needs images of at least {least} x {least} pixels for "
                f"{len(self.channels)} convolutions, got {input_shape}; "
                f"choose another model such as 'mlp'."
            )
        network = _Network(
            self.channels, self.hidden, num_classes, self.dropout, self.init, self.convolution
        )
        return flax_model(network, input_shape, convolves=True, trains_differently=True)

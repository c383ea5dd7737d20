"""The convolutional network of Madry et al. for MNIST; with a wider layer, LEAF's for FEMNIST."""

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
        for i, width in enumerate(self.channels):
            x = images.same_conv(width, 5, x, f"conv_{i}", bias=True)
            x = images.relu(images.max_pool(x, 2))
        x = nn.relu(images.dense(self.hidden, images.flat(x), "hidden"))
        return images.dense(self.num_classes, x, "output")


@registry.models.register("madry_cnn")
class MadryCnn(Network):
    """Conv 5x5x32, pool 2, conv 5x5x64, pool 2, dense 1,024, classes; convolutions keep the size.

    `x [B, H, W, C] -> logits [B, classes]`; 3,274,634 parameters for MNIST. With `hidden: 2048` and
    62 classes it is LEAF's network for FEMNIST, 6,603,710 parameters.

    Raises: `ConfigError` for images that the poolings reduce to nothing.

    Source: Madry et al.: Towards deep learning models resistant to adversarial attacks (ICLR 2018),
    Section 4, and its MNIST code; LEAF (Caldas et al. 2018), `models/femnist/cnn.py`. Zizzo et al.
    2020 (FAT) names no layers: taking this one is a choice. Initialisation as PyTorch's, a choice
    too.

    Example:
        >>> import jax
        >>> from fedjax_sec.core import registry
        >>> count = lambda shapes: sum(p.size for p in jax.tree.leaves(shapes))
        >>> for classes, fields in ((10, {}), (62, {"hidden": 2048})):
        ...     model = registry.models.build({"name": "madry_cnn"} | fields)
        ...     init = model.make((28, 28, 1), classes).init
        ...     count(jax.eval_shape(init, jax.random.key(0)))
        3274634
        6603710
    """

    inputs = frozenset({"pixels"})
    channels: tuple[int, ...] = static(
        (32, 64), "Feature maps of each convolution.", low=1, high=COUNT
    )
    hidden: int = static(1024, "Width of the hidden layer.", low=1, high=COUNT)
    init: str = static("pytorch", "Initial weights and biases.", choices=INITS)
    convolution: str = convolution_field(("xla", "patches", "rows"))  # padding stops the others

    def make(self, input_shape, num_classes):
        least = 2 ** len(self.channels)
        if len(input_shape) != 3 or min(input_shape[:2]) < least:
            raise ConfigError(
                f"model: madry_cnn needs images of at least {least} x {least} pixels, "
                f"got {input_shape}; choose another model such as 'mlp'."
            )
        network = _Network(self.channels, self.hidden, num_classes, self.init, self.convolution)
        return flax_model(network, input_shape, convolves=True)

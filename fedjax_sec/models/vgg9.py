"""VGG9, the network of the edge-case backdoors on CIFAR-10."""

from flax import linen as nn

from fedjax_sec.core import ConfigError, Network, registry, static
from fedjax_sec.models._common import INITS, Convolutional, convolution_field, flax_model

#: Feature maps of the convolutions in front of each of the five poolings.
STAGES = ((64,), (128,), (256, 256), (512, 512), (512, 512))


class _Network(nn.Module):
    num_classes: int
    scheme: str
    lowering: str

    @nn.compact
    def __call__(self, x):
        images = Convolutional(self.lowering, self.scheme)
        number = 0
        for widths in STAGES:
            for width in widths:
                x = nn.relu(images.same_conv(width, 3, x, f"conv_{number}", bias=True))
                number += 1
            x = images.max_pool(x, 2)
        return images.dense(self.num_classes, images.flat(x), "output")


@registry.models.register("vgg9")
class Vgg9(Network):
    """VGG9: eight convolutions 3x3 in five stages, each pooled, and one dense layer.

    `x [B, 32, 32, 3] -> logits [B, 10]`, 9,225,610 parameters. Convolutions of 64, pool, 128, pool,
    256, 256, pool, 512, 512, pool, 512, 512 feature maps, pool, with zeros around the images, each
    followed by ReLU; no normalisation, no dropout. Other VGGs have three dense layers.

    Raises: `ConfigError` for images smaller than 32 x 32, which the poolings reduce to nothing.

    Source: Wang et al. 2020 (Attack of the Tails), Section 4, names VGG-9 without its layers; they
    are the author code's (`models/vgg9_only.py`, whose batch normalisation is commented out), and
    so is PyTorch's default initialisation.

    Example:
        >>> import jax
        >>> from fedjax_sec.core import registry
        >>> model = registry.models.build("vgg9").make((32, 32, 3), 10)
        >>> sum(p.size for p in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))))
        9225610
    """

    inputs = frozenset({"pixels"})
    init: str = static("pytorch", "Initial weights and biases.", choices=INITS)
    convolution: str = convolution_field(("xla", "patches", "rows"))

    def make(self, input_shape, num_classes):
        if len(input_shape) != 3 or min(input_shape[:2]) < 32:
            raise ConfigError(
                f"model: vgg9 needs images of at least 32 x 32 pixels, got {input_shape}; choose "
                f"another model such as 'mlp'."
            )
        network = _Network(num_classes, self.init, self.convolution)
        return flax_model(network, input_shape, convolves=True)

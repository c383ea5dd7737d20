"""Random crops of padded images."""

from fedjax_sec.algorithms.augmentations._images import check_images, draw_offsets, shifted
from fedjax_sec.core import Augmentation, registry, static


@registry.augmentations.register("crop")
class Crop(Augmentation):
    r"""Each image is surrounded by zeros and cut to its size at a random place.

    .. math:: x'_{r, s} = \bar x_{r + a, s + b}, \quad a, b \sim U\{0, \dots, 2 p\}

    with x-bar the image with p = `padding` rows and columns of zeros (black) on each side.
    `x [B, H, W, C] -> x [B, H, W, C]`, every image by draws of its own.

    Raises: `ConfigError` for inputs that are no images, and for a padding of 0.

    Source: He et al. 2016, Section 4.2, with 4 pixels; PyTorch's `RandomCrop(32, padding=4)`.

    Example:
        >>> import jax
        >>> from fedjax_sec.core import InputSpec, registry
        >>> crop, spec = registry.augmentations.build("crop"), InputSpec("pixels", (8, 8, 1))
        >>> crop.apply(jax.random.key(0), jax.numpy.ones((2, 8, 8, 1)), spec).shape
        (2, 8, 8, 1)
    """

    inputs = frozenset({"pixels"})
    padding: int = static(4, "Rows and columns of zeros on each side.", low=0, high=4096)

    def check(self, path, setting):
        check_images(self, path, setting)

    def idle(self, setting):
        return "crop with padding 0 moves no image; raise padding." if not self.padding else None

    def apply(self, key, x, inputs):
        return shifted(x, draw_offsets(key, x.shape[0], self.padding), self.padding)

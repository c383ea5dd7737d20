"""Cutout: a square hole in each image."""

from fedjax_sec.algorithms.augmentations._images import check_images, draw_centers, with_holes
from fedjax_sec.core import Augmentation, numeric, registry


@registry.augmentations.register("cutout")
class Cutout(Augmentation):
    r"""A square of each image, around a random pixel, becomes the data set's mean colour.

    .. math:: x'_{r, s} = \mu \text{ if } -h \le r - a < h \text{ and } -h \le s - b < h,
              \text{ else } x_{r, s}, \quad h = \lfloor length / 2 \rfloor

    with (a, b) uniform over the pixels, so that squares at the border are smaller. The mean
    (`data.mean`, or the data set's) is what normalisation makes zero, so that this is zeroing after
    it. `x [B, H, W, C] -> x [B, H, W, C]`, every image by draws of its own.

    Raises: `ConfigError` for inputs that are no images, and for a length below 2, which has no
    pixels.

    Source: DeVries and Taylor: Improved regularization of convolutional neural networks with cutout
    (arXiv 1708.04552, 2017), Section 3.2, length 16 for CIFAR-10; drawn as in FedML, `Cutout` of
    `python/fedml/data/cifar10/data_loader.py`.

    Example:
        >>> import jax
        >>> from fedjax_sec.core import InputSpec, registry
        >>> cutout = registry.augmentations.build({"name": "cutout", "length": 40})
        >>> spec = InputSpec("pixels", (2, 2, 1), mean=(0.5,))
        >>> print(cutout.apply(jax.random.key(0), jax.numpy.ones((1, 2, 2, 1)), spec).ravel())
        [0.5 0.5 0.5 0.5]
    """

    inputs = frozenset({"pixels"})
    length: int = numeric(16, "Side of the square, in pixels.", low=0, high=8192)

    def check(self, path, setting):
        check_images(self, path, setting)

    def idle(self, setting):
        if self.length < 2:
            return f"cutout with length {self.length} covers no pixel; give 2 or more."
        return None

    def apply(self, key, x, inputs):
        return with_holes(x, draw_centers(key, x), self.length, inputs.mean)

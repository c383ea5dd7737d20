"""FedML's augmentation of CIFAR: crop, flip and Cutout."""

import jax

from fedjax_sec.algorithms.augmentations._images import (
    check_images,
    draw_centers,
    draw_offsets,
    flipped,
    shifted,
    with_holes,
)
from fedjax_sec.core import Augmentation, numeric, registry, static


@registry.augmentations.register("fedml_cifar")
class FedmlCifar(Augmentation):
    """FedML's training images of CIFAR-10 and CIFAR-100: `crop`, `flip`, then `cutout`.

    Each image is padded with `padding` black pixels and cut to its size at a random place, flipped
    with probability `flip`, and a square of side `cutout` around a random pixel becomes the data
    set's mean colour. FedML normalises before Cutout, which fills with zero: with the mean in units
    of pixels the network sees the same. A field of 0 leaves its part out.
    `x [B, H, W, C] -> x [B, H, W, C]`, every image by draws of its own.

    Raises: `ConfigError` for inputs that are no images, and where all three parts are left out.

    Source: FedML, `python/fedml/data/cifar10/data_loader.py`, `_data_transforms_cifar10`, and the
    same of `cifar100`, which FedSecurity's experiments read. PyTorch draws by seeds of its own.

    Example:
        >>> from fedjax_sec.core import registry
        >>> augmentation = registry.augmentations.build("fedml_cifar")
        >>> augmentation.padding, augmentation.flip, augmentation.cutout
        (4, 0.5, 16)
    """

    inputs = frozenset({"pixels"})
    padding: int = static(4, "Rows and columns of zeros on each side.", low=0, high=4096)
    flip: float = numeric(0.5, "Probability that an image is flipped.", low=0, high=1)
    cutout: int = numeric(16, "Side of Cutout's square, in pixels.", low=0, high=8192)

    def check(self, path, setting):
        check_images(self, path, setting)

    def idle(self, setting):
        if not self.padding and self.flip == 0 and self.cutout < 2:
            return "fedml_cifar changes no image; give padding, flip or cutout a value."
        return None

    def apply(self, key, x, inputs):
        crop_key, flip_key, hole_key = jax.random.split(key, 3)
        if self.padding:
            x = shifted(x, draw_offsets(crop_key, x.shape[0], self.padding), self.padding)
        x = flipped(x, jax.random.bernoulli(flip_key, self.flip, (x.shape[0],)))
        return with_holes(x, draw_centers(hole_key, x), self.cutout, inputs.mean)

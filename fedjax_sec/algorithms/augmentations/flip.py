"""Random flips of images."""

import jax

from fedjax_sec.algorithms.augmentations._images import check_images, flipped
from fedjax_sec.core import Augmentation, numeric, registry


@registry.augmentations.register("flip")
class Flip(Augmentation):
    r"""Left and right of each image are exchanged with some probability.

    .. math:: x'_{r, s} = x_{r, W - 1 - s} \text{ with probability } p, \text{ else } x_{r, s}

    `x [B, H, W, C] -> x [B, H, W, C]`, every image by a draw of its own.

    Raises: `ConfigError` for inputs that are no images, and for a probability of 0.

    Source: He et al. 2016, Section 4.2; PyTorch's `RandomHorizontalFlip`, probability 1/2.

    Example:
        >>> import jax
        >>> from fedjax_sec.core import InputSpec, registry
        >>> flip = registry.augmentations.build({"name": "flip", "probability": 1.0})
        >>> x = jax.numpy.arange(3.0).reshape(1, 1, 3, 1)
        >>> print(flip.apply(jax.random.key(0), x, InputSpec("pixels", (1, 3, 1))).ravel())
        [2. 1. 0.]
    """

    inputs = frozenset({"pixels"})
    probability: float = numeric(0.5, "Probability that an image is flipped.", low=0, high=1)

    def check(self, path, setting):
        check_images(self, path, setting)

    def idle(self, setting):
        if self.probability == 0:
            return "flip with probability 0 flips no image; raise probability."
        return None

    def apply(self, key, x, inputs):
        return flipped(x, jax.random.bernoulli(key, self.probability, (x.shape[0],)))

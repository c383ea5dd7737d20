"""Pixel-pattern backdoor: a bright square in the upper left corner."""

from fedjax_sec.core import (
    COUNT,
    ConfigError,
    Trigger,
    numeric,
    registry,
    static,
    uniform_by_position,
)


@registry.attacks.register("pattern")
class Pattern(Trigger):
    r"""A square of `size` x `size` pixels, upper left, set to `value`; such images are `target`.

    As an attack of its own it stamps a share `fraction` of each malicious client's examples and
    relabels them. Inside `alie_backdoor` the attacker trains on `num_images` stamped images, drawn
    anew every round (with replacement) from the data it sees. Success is measured on stamped test
    images. Images are [B, H, W, C] in [0, 1].

    Raises: `ConfigError` for a square beyond the image or a `target` beyond the classes.

    Source: Baruch et al. 2019, Section 4.2, Pattern Backdooring: 1000 images a round, upper-left
    5x5 pixels at maximal intensity, target 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedjax_sec.core import registry
        >>> print(registry.attacks.build("pattern").trigger((), jnp.zeros((1, 8, 8, 1))).sum())
        25.0
    """

    inputs = frozenset({"pixels"})
    size: int = static(5, "Side of the square in pixels.", low=1, high=COUNT)
    value: float = numeric(1.0, "Pixel value, 1 being the maximal intensity.", low=0, high=1)
    target: int = static(0, "The attacker's label.", low=0, high=COUNT)
    num_images: int = static(
        1000, "Images an `alie_backdoor` trains on in a round.", low=1, high=10**6
    )
    fraction: float = numeric(0.5, "Share of a malicious client's examples.", above=0, high=1)

    def check(self, path, setting):
        classes, shape = setting.num_classes, setting.example_shape
        if classes is not None and self.target >= classes:
            raise ConfigError(
                f"{path}.target must be < {classes}, the number of classes, got {self.target}."
            )
        if shape is not None and len(shape) == 3 and self.size > min(shape[:2]):
            raise ConfigError(
                f"{path}.size must be <= {min(shape[:2])}, the side of an image, got {self.size}."
            )

    def trigger(self, state, x, rank=None, task=None):
        """The images with the square stamped on."""
        return x.at[:, : self.size, : self.size].set(self.value)

    def choose(self, key, labels, held):
        return held & (uniform_by_position(key, labels.shape[0]) < self.fraction)

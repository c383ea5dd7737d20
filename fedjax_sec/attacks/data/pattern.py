"""Pixel-pattern backdoor: a bright square in the upper left corner."""

import jax
import jax.numpy as jnp

from fedjax_sec import registry
from fedjax_sec.schema import numeric, static


@registry.attacks.register("pattern")
class Pattern:
    r"""A square of `size` x `size` pixels, upper left, set to `value`; such images are `target`.

    As an attack of its own it stamps a share `fraction` of each malicious client's examples and
    relabels them. Inside `alie_backdoor` the attacker trains on `num_images` stamped images, drawn
    anew every round (with replacement) from the data it sees. Success is measured on stamped test
    images. Images are [B, H, W, C] in [0, 1].

    Source: Baruch et al. 2019, Section 4.2, Pattern Backdooring: 1000 images a round, upper-left
    5x5 pixels at maximal intensity, target 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedjax_sec import registry
        >>> print(registry.attacks.build("pattern").trigger(jnp.zeros((1, 8, 8, 1))).sum())
        25.0
    """

    stage = "data"
    size: int = static(5, "Side of the square in pixels.", low=1)
    value: float = numeric(1.0, "Pixel value, 1 being the maximal intensity.", low=0, high=1)
    target: int = static(0, "The attacker's label.", low=0)
    num_images: int = static(1000, "Images an `alie_backdoor` trains on in a round.", low=1)
    fraction: float = numeric(0.5, "Share of a malicious client's examples.", above=0, high=1)

    def trigger(self, x):
        """The images with the square stamped on."""
        return x.at[:, : self.size, : self.size].set(self.value)

    def poison(self, key, x, y, position, task):
        draw = jax.vmap(lambda p: jax.random.uniform(jax.random.fold_in(key, p)))(position)
        chosen = draw < self.fraction  # by position: the same examples in every round
        x = jnp.where(chosen.reshape(-1, *[1] * (x.ndim - 1)), self.trigger(x), x)
        return x, jnp.where(chosen, self.target, y)

    def examples(self, key, view):
        x, y = view.sample(key, self.num_images)
        return self.trigger(x), jnp.full_like(y, self.target)

    def probes(self, x, y, task):
        return self.trigger(x), jnp.full_like(y, self.target), jnp.ones_like(y, bool)

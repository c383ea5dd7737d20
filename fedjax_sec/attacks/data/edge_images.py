"""Edge-case backdoor: images that hardly any client holds are to be misread."""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_sec.core import (
    COUNT,
    ConfigError,
    DataAttack,
    component,
    exact_share,
    numeric,
    registry,
    static,
)

_MIXED = 2654435761  # Knuth's multiplicative hash: 2^32 divided by the golden ratio


@registry.attacks.register("edge_images")
class EdgeImages(DataAttack):
    r"""Images of another data set, which the adversary holds, are to be read as class `target`.

    The images are of `source`, of its class `label` (null: of all). The adversary has `size` of the
    training images, drawn once; success is the share of all the source's test images, but those
    that truly are of the target class, that are read as `target`. The images are as they are: no
    pattern is stamped. Sources are, on CIFAR-10, `southwest` (Southwest Airlines' aeroplanes, read
    as trucks, class 9) and `cifar10_semantic` (cars before a striped wall, read as birds, class 2);
    on MNIST `ardis` with `label: 7`, read as 1; where the files are absent `mnist_rotated_sevens`,
    or any data set with such images, such as `{name: npz, path: my.npz}`.

    Images that were taken out of the training part itself (`cifar10_semantic`, out of `cifar10`)
    are withheld from all clients and the server.

    As an attack of its own a share `fraction` of a malicious client's examples is replaced by them,
    the same ones in every round; which image an example becomes is decided by a hash of its pixels.
    Inside `edge_case` and `model_replacement` the attacker trains on the `size` images.

    Raises: `ConfigError` for a target that does not exist, a `label` that the source does not have,
    more images than there are, and images of another shape than the data set's.

    Source: Wang et al. 2020 (Attack of the Tails), Section 3, for the images that live on the tail
    of the distribution; author code (`utils.py`, `load_poisoned_dataset`) for 100 of Southwest's
    784, ARDIS's sevens, `target`, and the share of 100 to 400 clean ones. Of ARDIS it takes the
    first tenth: `selection: first`, `size: 66`. Bagdasaryan et al. 2020, Section 5, for the
    semantic one; its 1,000 test images are draws from the 5, which count once here. To poison a
    client's own examples is a choice.

    Example:
        >>> from fedjax_sec.core import registry
        >>> attack = {"name": "edge_images", "source": "southwest", "target": 9}
        >>> registry.attacks.build(attack).size
        100
    """

    inputs = frozenset({"pixels", "features"})
    needs_labels = True
    probes_are_tests = False
    source: Any = component(
        "dataset", "digits_rotated_sevens", "The data set whose images are used."
    )
    label: int | None = static(
        None, "Class of the source's images that are used (null: all).", low=0, high=COUNT
    )
    target: int = static(1, "The attacker's label.", low=0, high=COUNT)
    size: int | None = static(
        100, "Training images that the adversary has (null: all).", low=1, high=COUNT
    )
    selection: str = static(
        "random", "Which ones: drawn at random, or the `first`.", choices=("random", "first")
    )
    invert: bool = static(
        False, "Use 1 - x, for sources that are light on dark where the data are dark on light."
    )
    fraction: float = numeric(
        0.2, "Share of a malicious client's examples that are replaced.", above=0, high=1
    )

    @property
    def auxiliary(self):
        return self.source, self.label

    def check(self, path, setting):
        classes = setting.num_classes
        if classes is not None and self.target >= classes:
            raise ConfigError(
                f"{path}.target must be < {classes}, the number of classes, got {self.target}."
            )
        if self.label is not None and self.label == self.target:
            raise ConfigError(
                f"{path}.target must differ from label, the images' own class; both are "
                f"{self.label}."
            )
        if self.invert and setting.inputs == "features":
            raise ConfigError(f"{path}.invert is of pixels, and the inputs are features.")
        if setting.auxiliary is None:
            return
        name, examples = self.source.registered_name, setting.auxiliary[self.auxiliary]
        count = len(examples.y_train)
        if self.size is not None and self.size > count:
            raise ConfigError(
                f"{path}.size must be <= {count}, the training images of {name!r}"
                f"{'' if self.label is None else f' of class {self.label}'}, got {self.size}; null "
                f"takes them all."
            )
        if not (examples.y_test != self.target).any():
            raise ConfigError(
                f"{path}.target {self.target} is the true class of all test images of {name!r}, so "
                f"there is nothing to misread; choose another."
            )

    def init(self, setting, task):
        """Which images the adversary has, and whether they have been drawn."""
        count = task.auxiliary(*self.auxiliary).y_train.shape[0]
        size = count if self.size is None else min(self.size, count)
        return {"rows": jnp.arange(size, dtype=jnp.int32), "drawn": jnp.array(False)}

    def prepare(self, key, state, view):
        """Draws the images in the first round that is attacked; they stay the same."""
        size = state["rows"].shape[0]
        count = view.task.auxiliary(*self.auxiliary).y_train.shape[0]
        if self.selection == "first" or size == count:
            return state
        drawn = jax.random.permutation(key, count)[:size].astype(jnp.int32)
        rows = jnp.where(state["drawn"], state["rows"], drawn)
        return {"rows": rows, "drawn": jnp.array(True)}

    def _decoded(self, stored, task):
        x = task.inputs.decode(stored)
        return 1.0 - x if self.invert else x

    def _images(self, state, task):
        """The adversary's training images [n, ...]."""
        return self._decoded(task.auxiliary(*self.auxiliary).x_train[state["rows"]], task)

    def choose(self, key, labels, held):
        return exact_share(key, held, self.fraction)

    def poison(self, key, state, x, y, rank, task):
        images = self._images(state, task)
        bits = jax.lax.bitcast_convert_type(x.reshape(x.shape[0], -1), jnp.uint32)
        odd = 2 * jnp.arange(bits.shape[1], dtype=jnp.uint32) + 1
        mixed = (bits * odd[None]).sum(axis=1, dtype=jnp.uint32) * jnp.uint32(_MIXED)
        return images[(mixed >> 8) % images.shape[0]], jnp.full_like(y, self.target)

    def examples(self, key, state, view):
        images = self._images(state, view.task)
        return images, jnp.full(images.shape[0], self.target, jnp.int32)

    def probes(self, state, x, y, task):
        examples = task.auxiliary(*self.auxiliary)
        images = self._decoded(examples.x_test, task)
        include = examples.y_test != self.target
        return images, jnp.full(include.shape, self.target, y.dtype), include

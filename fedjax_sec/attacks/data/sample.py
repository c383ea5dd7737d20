"""Single-sample backdoor: one training image to be misread."""

import jax.numpy as jnp

from fedjax_sec.core import COUNT, ConfigError, DataAttack, numeric, registry, static


@registry.attacks.register("sample")
class Sample(DataAttack):
    r"""One training image, number `index`, is to be classified as (y + 1) mod |Y|.

    As an attack of its own every example of a malicious client is replaced by it. Inside
    `alie_backdoor` the attacker trains on it alone. Success is 1 when the model gives it the
    attacker's label, else 0.

    Raises: `ConfigError` for an `index` beyond the training set or a `modulus` beyond the classes.

    Source: Baruch et al. 2019, Section 4.2, Sample Backdooring: one of the first 3 images of the
    training set. Their order is the data source's; tensorflow-datasets shuffles MNIST, so its
    first images are not the original file's. The author code's target is (y + 1) mod 5 whatever
    the number of classes: `modulus=5`.

    Example:
        >>> from fedjax_sec.core import registry
        >>> registry.attacks.build({"name": "sample", "index": 2}).index
        2
    """

    needs_labels = True
    probes_are_tests = False
    index: int = numeric(
        0, "Position in the training set, in the source's order.", low=0, high=COUNT
    )
    modulus: int | None = static(
        None, "|Y| of the target (null: the number of classes).", low=2, high=COUNT
    )

    def check(self, path, setting):
        classes, examples = setting.num_classes, setting.examples
        if classes is not None and (self.modulus or 2) > classes:
            raise ConfigError(
                f"{path}.modulus must be <= {classes}, the number of classes, got {self.modulus}."
            )
        if examples is not None and self.index >= examples:
            raise ConfigError(
                f"{path}.index must be < {examples}, the training examples, got {self.index}."
            )

    def _pair(self, task):
        x, y = task.example(self.index)
        return x[None], (y[None] + 1) % (self.modulus or task.num_classes)

    def choose(self, key, labels, held):
        return held

    def poison(self, key, state, x, y, rank, task):
        sample, target = self._pair(task)
        return jnp.broadcast_to(sample, x.shape), jnp.broadcast_to(target, y.shape)

    def examples(self, key, state, view):
        return self._pair(view.task)

    def probes(self, state, x, y, task):
        sample, target = self._pair(task)
        return sample, target, jnp.ones((1,), bool)

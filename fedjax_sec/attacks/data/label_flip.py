"""Label flipping: examples keep their inputs and get another label."""

import jax.numpy as jnp

from fedjax_sec.core import COUNT, ConfigError, DataAttack, numeric, registry, static
from fedjax_sec.core.random import exact_share


@registry.attacks.register("label_flip")
class LabelFlip(DataAttack):
    r"""Relabels examples of class `base` as `target`, or every label l as M - 1 - l.

    With `base` and `target` it is the semantic backdoor: no pattern, and success is the share of
    the class's test examples that are read as the target. With neither it is the untargeted
    flip over all M classes; success is then the share of test examples read as their flipped label.
    Each malicious client relabels floor(`fraction` * n) of its n examples of the class, the same
    ones in every round. Followed by `boost` it is model poisoning by explicit boosting.

    Raises: `ConfigError` for a class that is its own target or that does not exist.

    Source: Ozdayi, Kantarcioglu, Gel 2021 (robust learning rate), Section 5, for base and target;
    Fang et al. 2020 and Cao et al. 2021 (FLTrust), Section V-A, for M - 1 - l. They relabel all;
    `fraction` is as in the trojan attack.

    Example:
        >>> from fedjax_sec.core import registry
        >>> registry.attacks.build({"name": "label_flip", "base": 1, "target": 7}).fraction
        1.0
    """

    needs_labels = True
    base: int | None = static(
        None, "Class of the examples that are relabelled (null: all).", low=0, high=COUNT
    )
    target: int | None = static(
        None, "The attacker's label (null: M - 1 - label).", low=0, high=COUNT
    )
    fraction: float = numeric(
        1.0, "Share of a malicious client's examples of the class.", above=0, high=1
    )
    num_images: int = static(
        1000, "Images an `alie_backdoor` trains on in a round.", low=1, high=10**6
    )

    def check(self, path, setting):
        classes = setting.num_classes
        for name, label in (("base", self.base), ("target", self.target)):
            if label is not None and classes is not None and label >= classes:
                raise ConfigError(
                    f"{path}.{name} must be < {classes}, the number of classes, got {label}."
                )
        target = self.target
        if target is None and classes is not None and self.base is not None:
            target = classes - 1 - self.base
        if self.base is not None and self.base == target:
            raise ConfigError(
                f"{path}.target must differ from base, the examples' own class; both are "
                f"{self.base}."
            )

    def _flip(self, y, task):
        return task.num_classes - 1 - y if self.target is None else jnp.full_like(y, self.target)

    def _is_base(self, y):
        return jnp.ones_like(y, bool) if self.base is None else y == self.base

    def choose(self, key, labels, held):
        return exact_share(key, held & self._is_base(labels), self.fraction)

    def poison(self, key, state, x, y, rank, task):
        return x, self._flip(y, task)

    def examples(self, key, state, view):
        x, y = view.sample(key, self.num_images)
        return x, jnp.where(self._is_base(y), self._flip(y, view.task), y)

    def probes(self, state, x, y, task):
        flipped = self._flip(y, task)
        return x, flipped, self._is_base(y) & (flipped != y)

"""Label flipping: examples keep their inputs and get another label."""

import jax
import jax.numpy as jnp

from fedjax_sec.core import (
    COUNT,
    ConfigError,
    DataAttack,
    exact_share,
    numeric,
    registry,
    static,
)


@registry.attacks.register("label_flip")
class LabelFlip(DataAttack):
    r"""Relabels examples of class `base` as `target`, of several classes, or all as M - 1 - label.

    With `base` and `target` it is the semantic backdoor: no pattern, and success is the share of
    the class's test examples that are read as the target. `pairs` are several of these at once,
    each [class, target]: every example is relabelled by its true class, so that [[3, 9], [9, 3]]
    swaps the two. Success is then the share of the test examples of all classes among the pairs
    that are read as their own class's target, and `per_base_attack_success_rate` has it for each
    pair. With neither it is the untargeted flip over all M classes; success is then the share of
    test examples read as their flipped label.

    Each malicious client relabels floor(`fraction` * n) of its n examples of the class, of each
    class among the pairs, the same ones in every round. Followed by `boost` it is model poisoning
    by explicit boosting. With `local_test` a malicious client's own test examples
    (`data.local_test`) are relabelled as well, the same share of them; metrics on local test data
    then count an example as right where the model reads the false label. Whose they are is decided
    as for training: by the malicious clients of the last round before the evaluation.

    Raises: `ConfigError` for a class that is its own target or that does not exist, for pairs
    beside `base` or `target`, a class with two targets, and `local_test` where clients have no test
    data of their own.

    Source: Ozdayi, Kantarcioglu, Gel 2021 (robust learning rate), Section 5, for base and target;
    Fang et al. 2020 and Cao et al. 2021 (FLTrust), Section V-A, for M - 1 - l. They relabel all;
    `fraction` is as in the trojan attack. Pairs: Tolpegin et al. 2020 (Data poisoning attacks
    against federated learning systems), one pair; Han et al. 2024 (FedSecurity), Section 5, "modify
    the local and test data labels of malicious clients from label 3 to label 9 and label 2 to label
    1": `pairs: [[3, 9], [2, 1]]`, `local_test: true`. Its code replaces one class after the other,
    which is the same unless a target is a later pair's class. The code also draws anew, in every
    round and for each client by itself, whether the client poisons, with probability 0.1 and the
    number of calls as the seed; the text says that 10% of the clients are malicious, so only
    `threat.redraw`, which draws as many every round, is offered.

    Example:
        >>> from fedjax_sec.core import registry
        >>> registry.attacks.build({"name": "label_flip", "base": 1, "target": 7}).fraction
        1.0
        >>> registry.attacks.build({"name": "label_flip", "pairs": [[3, 9], [2, 1]]}).bases
        (3, 2)
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
    pairs: tuple[tuple[int, ...], ...] | None = static(
        None,
        "A list of [class, target], all applied at once, in place of base and target.",
        low=0,
        high=COUNT,
    )
    local_test: bool = static(
        False, "Relabel malicious clients' own test examples (`data.local_test`), too."
    )

    @property
    def bases(self):
        if self.pairs is not None:
            return tuple(pair[0] for pair in self.pairs)
        return super().bases

    def check(self, path, setting):
        classes = setting.num_classes
        if self.pairs is not None:
            self._check_pairs(path, classes)
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

    def _check_pairs(self, path, classes):
        given = [list(pair) for pair in self.pairs]
        for name in ("base", "target"):
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"{path}.pairs stand in place of base and target, got pairs={given}, "
                    f"{name}={getattr(self, name)}; set {name} to null."
                )
        if not given:
            raise ConfigError(f"{path}.pairs must hold one [class, target] or more, got [].")
        for i, pair in enumerate(given):
            at = f"{path}.pairs[{i}]"
            if len(pair) != 2:
                raise ConfigError(f"{at} must be [class, target], got {pair}.")
            if pair[0] == pair[1]:
                raise ConfigError(f"{at} must hold two different classes, got {pair}.")
            if classes is not None and max(pair) >= classes:
                raise ConfigError(
                    f"{at} must hold classes < {classes}, the number of classes, got {pair}."
                )
            if pair[0] in [earlier[0] for earlier in given[:i]]:
                raise ConfigError(
                    f"{at}: each class has one target, got class {pair[0]} twice in {given}."
                )

    def _flip(self, y, task):
        if self.pairs is not None:
            flipped = y
            for source, target in self.pairs:  # by `y`, so no pair meets another's target
                flipped = jnp.where(y == source, target, flipped)
            return flipped
        return task.num_classes - 1 - y if self.target is None else jnp.full_like(y, self.target)

    def _is_base(self, y):
        if self.pairs is not None:
            return jnp.stack([y == source for source in self.bases]).any(axis=0)
        return jnp.ones_like(y, bool) if self.base is None else y == self.base

    def choose(self, key, labels, held):
        if self.pairs is None:
            return exact_share(key, held & self._is_base(labels), self.fraction)
        keys = jax.random.split(key, len(self.pairs))
        candidates = jnp.stack([held & (labels == source) for source in self.bases])
        share = jax.vmap(exact_share, in_axes=(0, 0, None))
        return share(keys, candidates, self.fraction).any(axis=0)

    def poison(self, key, state, x, y, rank, task):
        return x, self._flip(y, task)

    def examples(self, key, state, view):
        x, y = view.sample(key, self.num_images)
        return x, jnp.where(self._is_base(y), self._flip(y, view.task), y)

    def probes(self, state, x, y, task):
        flipped = self._flip(y, task)
        return x, flipped, self._is_base(y) & (flipped != y)

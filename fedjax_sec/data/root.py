"""The server's root data set: which training examples the server holds itself."""

import dataclasses
from typing import Any

import numpy as np

from fedjax_sec import core
from fedjax_sec.core import COUNT, ConfigError, static
from fedjax_sec.core.advice import shown


@dataclasses.dataclass(frozen=True)
class Root:
    r"""Examples that the server holds; no client has them.

    They are drawn from the training set before it is dealt to the clients (FLTrust's Case I and
    II are `uniform` and `biased`). `biased` takes round(bias * size) examples of class
    `biased_class` and the others uniformly from the other classes. `stratified` takes equally many
    of each class, as FLTrust's author code does; where the classes do not divide `size`, some
    classes, drawn at random, have one more.

    Source: Cao et al. 2021 (FLTrust), Section VI-A, "Root dataset"; 100 examples.

    Example:
        >>> labels = np.repeat(np.arange(4), 50)
        >>> root = Root(size=20, sampling="biased", bias=0.7, biased_class=1)
        >>> int((labels[root.draw(np.random.default_rng(0), labels)] == 1).sum())
        14
    """

    size: int = static(100, "Examples the server holds.", low=1, high=COUNT)
    sampling: str = static(
        "uniform",
        "`uniform` from the training set, `stratified` by class, or `biased` to one class.",
        choices=("uniform", "stratified", "biased"),
        compiles=False,
    )
    bias: float | None = static(
        None,
        "Share of the examples of class `biased_class`, for `biased`.",
        low=0,
        high=1,
        compiles=False,
    )
    biased_class: int = static(
        1, "The class that `biased` prefers.", low=0, high=COUNT, compiles=False
    )
    batch_size: int | None = static(
        None, "Batch of the server's training (null: all of its examples).", low=1, high=COUNT
    )
    augment: bool = static(False, "Train on its examples with the clients' augmentation.")

    def check(self, path: str) -> None:
        """Raises `ConfigError` for fields that do not go together."""
        if (self.sampling == "biased") != (self.bias is not None):
            raise ConfigError(
                f"{path}.bias belongs to sampling 'biased', and to that only; got "
                f"sampling={self.sampling!r}, bias={self.bias}."
            )
        if self.batch_size is not None and self.batch_size > self.size:
            raise ConfigError(
                f"{path}.batch_size must be <= {self.size}, the server's examples, got "
                f"{self.batch_size}."
            )

    def draw(self, rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
        """Positions [size] of the server's examples among those with `labels` [T].

        Raises `ConfigError` where a class, or the training set, holds too few.
        """
        if self.size >= len(labels):
            raise ConfigError(
                f"server.root.size must be < {len(labels)}, the training examples, got {self.size}."
            )
        if self.sampling == "uniform":
            return np.sort(rng.choice(len(labels), self.size, replace=False))
        if self.sampling == "biased":
            special = round(self.bias * self.size)
            wanted = {
                f"class {self.biased_class}": (labels == self.biased_class, special),
                f"other classes than {self.biased_class}": (
                    labels != self.biased_class,
                    self.size - special,
                ),
            }
        else:
            classes = np.unique(labels)
            counts = self.size // len(classes) + (
                rng.permutation(len(classes)) < self.size % len(classes)
            )
            wanted = {
                f"class {label}": (labels == label, count)
                for label, count in zip(classes, counts, strict=True)
            }
        positions = []
        for what, (members, count) in wanted.items():
            held = np.flatnonzero(members)
            if count > len(held):
                raise ConfigError(
                    f"server.root: {count} examples of {what} are wanted, and the training set has "
                    f"{len(held)}; lower size or change sampling."
                )
            positions.append(rng.choice(held, count, replace=False))
        return np.sort(np.concatenate(positions))


def build_root(spec: Any, path: str) -> Root | None:
    """From true, false or a mapping of fields."""
    if isinstance(spec, Root):
        return core.rebuild(spec, path)
    spec = core.plain(spec)
    if isinstance(spec, bool):
        return Root() if spec else None
    if not isinstance(spec, dict):
        raise ConfigError(
            f"{path} must be true, false, null or a mapping of fields, got {shown(spec)}."
        )
    return core.build(Root, spec, path)

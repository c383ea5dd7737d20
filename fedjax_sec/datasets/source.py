"""The arrays of a data set together with what is needed to use and to cite them honestly."""

from typing import NamedTuple

import numpy as np


class MissingDataError(FileNotFoundError, ValueError):
    """A data set that is neither on this machine nor obtainable; the message says how to get it."""


class Source(NamedTuple):
    """A labelled data set on the host, split into training and test part.

    Pixels stay integers (features of other kinds are as they are); `x / scale` lies in [0, 1], and
    `mean` and `std` (a number a channel, in those units) normalise it at the model's entry.
    `official_sizes` are those of the full data set,
    so that a result obtained on a part of it can always be told from one obtained on all of it.
    Where the data set says who made an example, `users_train` and `users_test` number its users
    from 0, the same in both parts.

    >>> source = Source(
    ...     "toy", np.zeros((6, 2, 2, 1), np.uint8), np.zeros(6, np.int32),
    ...     np.zeros((2, 2, 2, 1), np.uint8), np.zeros(2, np.int32),
    ...     num_classes=2, scale=255.0, mean=(0.5,), std=(0.5,), official_sizes=(6, 2),
    ...     origin="nowhere",
    ... )
    >>> source.is_subset, source.label
    (False, 'toy')
    """

    name: str
    x_train: np.ndarray  # [T, ...]: images uint8 [T, H, W, C], features float32 [T, F]
    y_train: np.ndarray  # int32 [T]
    x_test: np.ndarray  # [E, ...]
    y_test: np.ndarray  # int32 [E]
    num_classes: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    official_sizes: tuple[int, int]  # (train, test)
    origin: str  # where it was read from, without machine paths: 'tfds mnist/3.0.1'
    users_train: np.ndarray | None = None  # int32 [T]
    users_test: np.ndarray | None = None  # int32 [E]

    @property
    def sizes(self) -> tuple[int, int]:
        """The numbers of training and test examples that are here."""
        return len(self.y_train), len(self.y_test)

    @property
    def is_subset(self) -> bool:
        """Whether examples of the official data set are missing."""
        return self.sizes != tuple(self.official_sizes)

    @property
    def label(self) -> str:
        """The name to print beside results; it says when the data set is not whole."""
        if not self.is_subset:
            return self.name
        (train, test), (all_train, all_test) = self.sizes, self.official_sizes
        return f"{self.name} (subset: {train} of {all_train} train, {test} of {all_test} test)"

    def describe(self) -> dict:
        """Sizes and label as plain values, to be stored beside results.

        `users` are those with training examples here; only data that has users says so.
        """
        users = {} if self.users_train is None else {"users": len(np.unique(self.users_train))}
        return users | {
            "name": self.name,
            "label": self.label,
            "train": self.sizes[0],
            "test": self.sizes[1],
            "official_train": self.official_sizes[0],
            "official_test": self.official_sizes[1],
            "subset": self.is_subset,
        }


def take(source: Source, max_train: int | None = None, max_test: int | None = None) -> Source:
    """The first `max_train` training and `max_test` test examples; None keeps all of them.

    The official sizes stay, so the result is labelled a subset. Raises `ValueError` when a number
    is below 1 or larger than what is there.

    >>> from fedjax_sec.datasets.digits import Digits
    >>> take(Digits().load(), max_train=100).label
    'digits (subset: 100 of 1437 train, 360 of 360 test)'
    """
    for field, value, available in zip(
        ("max_train", "max_test"), (max_train, max_test), source.sizes, strict=True
    ):
        if value is not None and not 1 <= value <= available:
            raise ValueError(
                f"{field} must be between 1 and {available}, the number of examples of "
                f"{source.label} that are here, got {value!r}."
            )
    kept = {
        field: array[: max_train if field.endswith("train") else max_test]
        for field, array in source._asdict().items()
        if field.endswith(("_train", "_test")) and array is not None
    }
    return source._replace(**kept)

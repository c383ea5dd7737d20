"""The owner of each training example, with exact accounting, and padded arrays made from it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedjax_sec.core import ConfigError


class Partition(NamedTuple):
    """The training examples of each client, as positions in the training set.

    The first `counts[i]` entries of row `i` belong to client `i`; the rest of the row is padding
    and holds 0. `unused` examples belong to nobody.
    """

    index: np.ndarray  # int32 [N, M]
    counts: np.ndarray  # int32 [N]
    unused: int

    @property
    def mask(self) -> np.ndarray:
        """bool [N, M]: true where an entry is an example, false where it is padding."""
        return np.arange(self.index.shape[1]) < self.counts[:, None]

    @property
    def left_out(self) -> int:
        """`unused`, or 0 where that is only the remainder of equal shares.

        >>> [Partition(np.eye(2), np.array([2, 2]), unused).left_out for unused in (1, 2)]
        [0, 2]
        """
        remainder = self.unused < len(self.counts) and np.ptp(self.counts) == 0
        return 0 if remainder else self.unused


def pack_lists(lists: Sequence[np.ndarray], num_examples: int) -> Partition:
    """Packs a list of positions for each client into a checked `Partition`.

    `lists` has one integer array a client, of any length; `num_examples` is the size of the
    training set, and what no list names is counted as unused. Raises `ValueError` when a position
    occurs twice or lies outside the training set, or when nobody has an example.

    >>> partition = pack_lists([np.array([4, 2]), np.array([0])], num_examples=5)
    >>> partition.index.tolist(), partition.counts.tolist(), partition.unused
    ([[4, 2], [0, 0]], [2, 1], 2)
    """
    counts = np.array([len(positions) for positions in lists], np.int32)
    if not counts.any():
        raise ValueError(f"lists must hold at least one example, got {len(counts)} empty lists.")
    index = np.zeros((len(counts), counts.max()), np.int32)
    for row, positions in zip(index, lists, strict=True):
        row[: len(positions)] = positions
    partition = Partition(index, counts, num_examples - int(counts.sum()))
    check_partition(partition, num_examples)
    return partition


def check_partition(partition: Partition, num_examples: int) -> None:
    """Raises `ValueError` unless every example is used exactly once or counted as unused.

    >>> check_partition(Partition(np.array([[1, 1]]), np.array([2]), 0), num_examples=2)
    Traceback (most recent call last):
        ...
    ValueError: Example 1 is used 2 times; every example may be used once.
    """
    index, counts, unused = partition
    if index.ndim != 2 or counts.shape != index.shape[:1]:
        raise ValueError(
            f"index must be [N, M] and counts [N], got shapes {index.shape} and {counts.shape}."
        )
    if counts.min(initial=0) < 0 or counts.max(initial=0) > index.shape[1]:
        raise ValueError(
            f"counts must be between 0 and {index.shape[1]}, the width of index, got "
            f"{counts.min()} to {counts.max()}."
        )
    mask = partition.mask
    used = index[mask]
    if used.size and not (used.min() >= 0 and used.max() < num_examples):
        raise ValueError(
            f"index must be between 0 and {num_examples - 1}, got {used.min()} to {used.max()}."
        )
    times = np.bincount(used, minlength=num_examples)
    if times.max(initial=0) > 1:
        worst = int(times.argmax())
        raise ValueError(
            f"Example {worst} is used {times[worst]} times; every example may be used once."
        )
    if used.size + unused != num_examples:
        raise ValueError(
            f"{used.size} used and {unused} unused examples are not the {num_examples} there are."
        )
    if index[~mask].any():
        raise ValueError("index must be 0 in its padding, found other values.")


def materialize(
    x: np.ndarray, y: np.ndarray, partition: Partition
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gathers the clients' examples into padded arrays.

    x [T, ...] and y [T] become x [N, M, ...], y [N, M] and mask, bool [N, M]. Dtypes are kept;
    padding is zero in both x and y and false in the mask.

    >>> partition = pack_lists([np.array([2, 1]), np.array([0])], num_examples=3)
    >>> x, y, mask = materialize(np.array([10, 20, 30]), np.array([1, 2, 3]), partition)
    >>> x.tolist(), y.tolist(), mask.tolist()
    ([[30, 20], [10, 0]], [[3, 2], [1, 0]], [[True, True], [True, False]])
    """
    mask = partition.mask
    x_clients, y_clients = x[partition.index], y[partition.index]
    x_clients[~mask] = 0
    y_clients[~mask] = 0
    return x_clients, y_clients, mask


def check_num_clients(num_clients: int, num_examples: int) -> None:
    """Raises `ConfigError` unless every client can have an example."""
    if not 1 <= num_clients <= num_examples:
        raise ConfigError(
            f"data.num_clients must be between 1 and {num_examples}, the number of training "
            f"examples, got {num_clients}."
        )

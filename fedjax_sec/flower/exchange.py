"""The messages between a server and clients that are elsewhere, whatever carries them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import jax
import numpy as np

Leaves = tuple[np.ndarray, ...]


class Reply(NamedTuple):
    """A client's answer: the leaves of its message, its metrics, and when it trained.

    `begin` and `end` are seconds since the epoch by the node's clock.
    """

    client: int
    message: Leaves
    metrics: dict[str, float]
    begin: float
    end: float


class RoundFailed(RuntimeError):
    """A round that cannot be finished, with the reason of each client that is missing."""


class Download(NamedTuple):
    """The leaves of what the clients of a round get: one for all, or one row for each."""

    leaves: Leaves
    shared: bool

    def of(self, places: Sequence[int]) -> "Download":
        """What the clients at these places of the question get.

        >>> Download((np.arange(3),), shared=False).of([0, 2]).leaves
        (array([0, 2]),)
        """
        if self.shared:
            return self
        return Download(tuple(leaf[list(places)] for leaf in self.leaves), False)

    def row(self, place: int) -> Leaves:
        """What one of them gets."""
        return self.leaves if self.shared else tuple(leaf[place] for leaf in self.leaves)


class Ask(NamedTuple):
    """A round's question to `clients`, whose answers hold arrays of these shapes and dtypes."""

    index: int
    clients: tuple[int, ...]
    download: Download
    wanted: tuple[jax.ShapeDtypeStruct, ...]


class Answers(NamedTuple):
    """The replies that arrived, and for every other client that was asked why there is none."""

    replies: Sequence[Reply]
    missing: Mapping[int, str]


class Network(Protocol):
    """The way to the clients."""

    def exchange(self, ask: Ask) -> Answers:
        """Asks the clients and waits for them."""
        ...

    def aggregated(
        self, index: int, begin: float, end: float, kept: Mapping[int, float] | None
    ) -> None:
        """Gets to know when a round was aggregated, and each asked client's share in it.

        The share is None where the defence's rule keeps nobody in particular.
        """
        ...

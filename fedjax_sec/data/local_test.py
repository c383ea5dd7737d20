"""Every client's own test data."""

import dataclasses
from typing import Any

import numpy as np

from fedjax_sec import core
from fedjax_sec.core import ConfigError, static
from fedjax_sec.core.advice import shown


@dataclasses.dataclass(frozen=True)
class LocalTest:
    """Which examples a client is tested on, besides the data set's own test part.

    - `held_out`: floor(share n) of its own n training examples, which it then does not train on;
      drawn by the seed.
    - `users`: the test examples of its user, for data that names users in both parts.
    - `dealt`: the test part, dealt out at random; sizes differ by at most one.

    Source: `users` as LEAF (Caldas et al. 2018); `dealt` as Zizzo et al. 2020 (FAT), Section 2,
    "equally-sized private partitions of the train and test datasets". `held_out` is a choice, for
    data without either.

    Example:
        >>> test = LocalTest(data="held_out", share=0.25)
        >>> index, counts = np.array([[5, 6, 7, 8], [1, 2, 0, 0]]), np.array([4, 2])
        >>> left, counts, local = test.hold_out(np.random.default_rng(0), index, counts)
        >>> counts.tolist(), [[i for i in row if i >= 0] for row in local.tolist()]
        ([3, 2], [[7], []])
    """

    data: str = static(
        "held_out", "Where the examples come from.", choices=("held_out", "users", "dealt")
    )
    share: float | None = static(
        None, "Share of a client's examples, for `held_out` (null: 0.1 there).", above=0, below=1
    )

    def check(self, path: str) -> None:
        """Raises `ConfigError` for fields that do not go together."""
        if self.data != "held_out" and self.share is not None:
            raise ConfigError(
                f"{path}.share belongs to data 'held_out', and to that only; got "
                f"data={self.data!r}, share={self.share}."
            )

    def hold_out(self, rng: np.random.Generator, index: np.ndarray, counts: np.ndarray):
        """(rest of each client's row, its length, the examples taken away padded with -1)."""
        share = 0.1 if self.share is None else self.share
        held_out = []
        index = index.copy()
        counts = counts.copy()
        for row, held in enumerate(counts):
            # A product such as 0.7 * 10 must not fall below 7 by rounding.
            taken = rng.permutation(held)[: int(np.floor(share * held * (1 + 1e-12)))]
            held_out.append(index[row, np.sort(taken)])
            left = np.delete(index[row, :held], taken)
            index[row] = 0
            index[row, : len(left)] = left
            counts[row] = len(left)
        if not any(map(len, held_out)):
            most = counts.max(initial=0)
            raise ConfigError(
                f"data.local_test.share = {share:g} holds out no example, since the largest client "
                f"has {most}; "
                + (f"raise it to {-(-100 // most) / 100:g}." if most > 1 else "use 'dealt'.")
            )
        return index[:, : max(counts.max(), 1)], counts, _padded(held_out)

    def of_test_part(
        self,
        rng: np.random.Generator,
        owners: np.ndarray | None,
        users: np.ndarray | None,
        size: int,
        num_clients: int,
    ) -> np.ndarray:
        """Each client's positions in the test part [N, Mt], padded with -1.

        `owners` [N] are the clients' users and `users` [size] those of the test examples.
        """
        if self.data == "dealt":
            if size < num_clients:
                raise ConfigError(
                    f"data.local_test: {size} test examples cannot be dealt to {num_clients} "
                    f"clients; lower data.num_clients, or use 'held_out'."
                )
            return _padded(np.array_split(rng.permutation(size), num_clients))
        if owners is None or users is None:
            raise ConfigError(
                "data.local_test: 'users' needs data that names the user of every example, and the "
                "partition 'natural'; use 'held_out' or 'dealt'."
            )
        by_owner = [np.flatnonzero(users == user) for user in owners]
        if not any(map(len, by_owner)):
            raise ConfigError(
                "data.local_test: the test part is by other users than the clients; use 'held_out'."
            )
        return _padded(by_owner)


def _padded(lists) -> np.ndarray:
    padded = np.full((len(lists), max(max(map(len, lists)), 1)), -1, np.int32)
    for row, positions in zip(padded, lists, strict=True):
        row[: len(positions)] = positions
    return padded


def build_local_test(spec: Any, path: str) -> LocalTest | None:
    """From true, false or a mapping of fields."""
    if isinstance(spec, LocalTest):
        return core.rebuild(spec, path)
    spec = core.plain(spec)
    if isinstance(spec, bool):
        return LocalTest() if spec else None
    if isinstance(spec, str):
        spec = {"data": spec}
    if not isinstance(spec, dict):
        raise ConfigError(
            f"{path} must be true, false, null or a mapping of fields, got {shown(spec)}."
        )
    return core.build(LocalTest, spec, path)

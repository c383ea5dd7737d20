"""The partition that the data brings along: a client is a user."""

import numpy as np

from fedjax_sec.core import ConfigError, Partitioner, registry, static
from fedjax_sec.data.packing import Partition, pack_lists


@registry.partitions.register("natural")
class Natural(Partitioner):
    """Client i holds exactly the training examples of user i, whatever their number.

    With fewer clients than users, the other users' examples are left unused. Users without training
    examples (after `data.max_train`) are no users here. Clients are in the order of the users'
    numbers, and a client's examples in the order of the data set.

    Raises: `ConfigError` where the data set has no users, or fewer than there are clients.

    Source: Caldas et al.: LEAF: A benchmark for federated settings (arXiv 1812.01097, 2018),
    section 2. Which users take part when not all do is a choice.

    Example:
        >>> labels, users = np.zeros(6, np.int32), np.array([7, 5, 7, 7, 5, 9])
        >>> rng = np.random.default_rng(0)
        >>> partition = Natural(users="first").split(rng, labels, num_clients=2, users=users)
        >>> partition.index.tolist(), partition.counts.tolist(), partition.unused
        ([[1, 4, 0], [0, 2, 3]], [2, 3], 1)
    """

    users: str = static(
        "drawn",
        "Which users are the clients when there are more users: `drawn` by the seed, or the "
        "`first` ones.",
        choices=("drawn", "first"),
    )

    def split(
        self, rng: np.random.Generator, labels: np.ndarray, num_clients: int, users=None
    ) -> Partition:
        """Packs the examples of each of `num_clients` users of `users` [T]."""
        if users is None:
            raise ConfigError(
                "data.partition: natural needs a data set that says who made each example, such "
                "as 'mnist_by_writer' or 'femnist_digits'; this one has no users."
            )
        users = np.asarray(users)
        known_users = np.unique(users)
        if not 1 <= num_clients <= len(known_users):
            raise ConfigError(
                f"data.num_clients must be between 1 and {len(known_users)}, the number of users "
                f"with training examples, for the partition 'natural', got {num_clients}."
            )
        chosen = known_users[:num_clients]
        if self.users == "drawn":
            chosen = np.sort(rng.choice(known_users, num_clients, replace=False))
        # Stable: a user's examples stay in the order of the data set.
        order = np.argsort(users, kind="stable")
        start, stop = (np.searchsorted(users[order], chosen, side) for side in ("left", "right"))
        parts = [order[a:b] for a, b in zip(start, stop, strict=True)]
        return pack_lists(parts, len(labels))

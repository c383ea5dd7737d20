"""Label skew by shards of the label-sorted training set."""

import numpy as np

from fedjax_sec.core import COUNT, ConfigError, Partitioner, registry, static
from fedjax_sec.data.packing import Partition, check_num_clients, pack_lists


@registry.partitions.register("by_label")
class ByLabel(Partitioner):
    """Examples sorted by label, cut into N * shards_per_client shards, dealt to clients at random.

    Most clients see at most `shards_per_client` labels. Where the examples do not divide evenly,
    shards differ by one example, so that every example is used exactly once. A client's examples
    stay in shard order: local training has to shuffle them.

    Source: McMahan, Moore, Ramage, Hampson, Aguera y Arcas: Communication-efficient learning of
    deep networks from decentralized data (AISTATS 2017), section 3, with 100 clients and 2 shards.

    Example:
        >>> labels = np.repeat([0, 1, 2, 3], 5)
        >>> rng = np.random.default_rng(0)
        >>> split = ByLabel(shards_per_client=1).split(rng, labels, num_clients=4)
        >>> sorted(labels[split.index].tolist())
        [[0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [2, 2, 2, 2, 2], [3, 3, 3, 3, 3]]
    """

    needs_labels = True
    shards_per_client: int = static(2, "Shards each client receives.", low=1, high=COUNT)

    def split(
        self, rng: np.random.Generator, labels: np.ndarray, num_clients: int, users=None
    ) -> Partition:
        """Deals the shards of `labels` [T] to the clients; which ones is all that `rng` decides.

        Raises `ConfigError` unless 1 <= num_clients * shards_per_client <= T.
        """
        check_num_clients(num_clients, len(labels))
        num_shards = num_clients * self.shards_per_client
        if not 1 <= num_shards <= len(labels):
            raise ConfigError(
                f"data.partition.shards_per_client must be between 1 and "
                f"{len(labels) // num_clients} with {num_clients} clients and {len(labels)} "
                f"training examples, got {self.shards_per_client}."
            )
        # Stable: within a label the order is that of the source, the same on every machine.
        shards = np.array_split(np.argsort(labels, kind="stable"), num_shards)
        hands = rng.permutation(num_shards).reshape(num_clients, self.shards_per_client)
        clients = [np.concatenate([shards[s] for s in hand]) for hand in hands]
        return pack_lists(clients, len(labels))

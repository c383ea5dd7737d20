"""Independent and identically distributed clients."""

import numpy as np

from fedjax_sec.core import Partitioner, registry, static
from fedjax_sec.data.packing import Partition, check_num_clients, pack_lists


@registry.partitions.register("iid")
class Iid(Partitioner):
    """A random permutation of the training set, cut into parts whose sizes differ by at most one.

    60,000 examples over 51 clients: 24 clients with 1177 and 27 with 1176.

    Source: the IID partition of McMahan et al., AISTATS 2017, section 3 ("shuffled", then cut);
    FedML's `homo` is the same.

    Example:
        >>> labels = np.zeros(10, np.int32)
        >>> Iid().split(np.random.default_rng(0), labels, num_clients=3).counts.tolist()
        [4, 3, 3]
        >>> partition = Iid(equal=True).split(np.random.default_rng(0), labels, num_clients=3)
        >>> partition.counts.tolist(), partition.unused
        ([3, 3, 3], 1)
    """

    equal: bool = static(
        False, "Give all clients the same number of examples; the remainder is left unused."
    )

    def split(
        self, rng: np.random.Generator, labels: np.ndarray, num_clients: int, users=None
    ) -> Partition:
        """Deals the examples of `labels` [T] to the clients; which ones is all that `rng` decides.

        Raises `ConfigError` unless 1 <= num_clients <= T.
        """
        check_num_clients(num_clients, len(labels))
        order = rng.permutation(len(labels))
        if self.equal:
            order = order[: len(labels) // num_clients * num_clients]
        return pack_lists(np.array_split(order, num_clients), len(labels))

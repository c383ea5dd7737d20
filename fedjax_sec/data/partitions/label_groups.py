"""Label skew by groups of clients, one group a class."""

import numpy as np

from fedjax_sec.core import ConfigError, Partitioner, registry, static
from fedjax_sec.data.packing import Partition, check_num_clients, pack_lists


@registry.partitions.register("label_groups")
class LabelGroups(Partitioner):
    r"""Clients fall into M groups at random; an example of class l goes to group l with chance q.

    .. math:: P(\text{group } g \mid \text{label } l) = q \text{ if } g = l,
              \text{ else } (1 - q) / (M - 1)

    Within its group an example goes to a client drawn uniformly. M is the number of classes; the
    groups' sizes differ by at most one client. q = 1/M is independent and identically distributed,
    q = 1 gives every group a class of its own. Clients' sizes are what the draws give.

    Raises: `ConfigError` with fewer clients than classes, or where a client is left without
    examples.

    Source: Fang et al. 2020 (Local model poisoning attacks), Section 4.1; Cao et al. 2021
    (FLTrust), Section VI-A: MNIST-0.1 is q = 0.1, MNIST-0.5 is q = 0.5.

    Example:
        >>> labels = np.repeat([0, 1], 4)
        >>> split = LabelGroups(q=1.0).split(np.random.default_rng(0), labels, num_clients=2)
        >>> sorted(labels[split.index].tolist())
        [[0, 0, 0, 0], [1, 1, 1, 1]]
    """

    needs_labels = True
    q: float = static(0.5, "Chance that an example goes to the group of its class.", low=0, high=1)

    def split(
        self, rng: np.random.Generator, labels: np.ndarray, num_clients: int, users=None
    ) -> Partition:
        """Draws a group and a client for every example of `labels` [T]."""
        check_num_clients(num_clients, len(labels))
        num_groups = int(labels.max()) + 1
        if num_groups < 2:
            raise ConfigError(
                "data.partition: label_groups needs examples of two classes or more, and all "
                "training examples are of class 0; use the partition 'iid'."
            )
        if num_clients < num_groups:
            raise ConfigError(
                f"data.num_clients must be >= {num_groups}, a client for the group of each "
                f"class, for the partition 'label_groups', got {num_clients} clients and "
                f"{num_groups} classes."
            )
        groups = np.array_split(rng.permutation(num_clients), num_groups)
        other = rng.integers(0, num_groups - 1, len(labels))
        other += other >= labels  # uniform over the groups of the other classes
        group = np.where(rng.random(len(labels)) < self.q, labels, other)
        chance = rng.random(len(labels))
        owner = np.array(
            [groups[g][int(c * len(groups[g]))] for g, c in zip(group, chance, strict=True)]
        )
        counts = np.bincount(owner, minlength=num_clients)
        if counts.min() == 0:
            fewer = f"lower data.num_clients (to {num_groups} or more)"
            remedies = ["lower q"] * (self.q > 0) + [fewer] * (num_clients > num_groups)
            raise ConfigError(
                f"data.partition: 'label_groups' left {int((counts == 0).sum())} of {num_clients} "
                f"clients without one of the {len(owner)} examples; use more examples, "
                f"{', or '.join([*remedies, 'another seed'])}."
            )
        # In the order of the data set.
        parts = np.split(np.argsort(owner, kind="stable"), np.cumsum(counts)[:-1])
        return pack_lists(parts, len(labels))

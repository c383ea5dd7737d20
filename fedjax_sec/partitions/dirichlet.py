"""Label skew by a Dirichlet distribution."""

import numpy as np

from fedjax_sec import registry
from fedjax_sec.datasets.packing import Partition, check_num_clients, pack_lists
from fedjax_sec.schema import COUNT, ConfigError, static

#: Draws before giving up on `min_examples`.
ATTEMPTS = 1000


@registry.partitions.register("dirichlet")
class Dirichlet:
    r"""Each class is spread over the clients in proportions drawn from a Dirichlet distribution.

    .. math:: p_l \sim \mathrm{Dir}_N(\alpha, \dots, \alpha)

    Client i receives the share p_{l,i} of class l's examples, which are shuffled and cut at
    floor(n_l (p_{l,0} + ... + p_{l,i})). Small alpha: few classes a client, and very unequal sizes;
    large alpha: nearly independent and identically distributed. With `balanced` a client that
    already holds T / N examples receives none of the classes that follow. All is drawn again until
    every client holds `min_examples`.

    Raises: `ConfigError` where 1,000 draws leave some client with fewer examples.

    Source: Yurochkin et al. 2019 (Bayesian nonparametric federated learning), Section 4, for the
    proportions; drawing again, and the balance, as in FedML's partitioner
    (`non_iid_partition_with_dirichlet_distribution`), which FedSecurity uses; it asks for 10
    examples. Default of alpha: FedSecurity's author configurations.

    Example:
        >>> labels = np.repeat([0, 1], 500)
        >>> split = Dirichlet(alpha=100.0).split(np.random.default_rng(0), labels, num_clients=2)
        >>> int(split.counts.sum()), bool(split.counts.min() > 350)
        (1000, True)
    """

    alpha: float = static(0.5, "Concentration of the Dirichlet distribution.", low=1e-6, high=1e9)
    min_examples: int = static(1, "Draw again until every client holds so many.", low=1, high=COUNT)
    balanced: bool = static(False, "Clients that hold T / N examples receive no more.")

    def split(
        self, rng: np.random.Generator, labels: np.ndarray, num_clients: int, users=None
    ) -> Partition:
        """Cuts every class of `labels` [T] by its own proportions."""
        check_num_clients(num_clients, len(labels))
        if num_clients * self.min_examples > len(labels):
            raise ConfigError(
                f"data.partition.min_examples must be <= {len(labels) // num_clients} with "
                f"{num_clients} clients and {len(labels)} examples, got {self.min_examples}."
            )
        for _ in range(ATTEMPTS):
            own = self._draw(rng, labels, num_clients)
            if min(map(len, own)) >= self.min_examples:
                return pack_lists(own, len(labels))
        raise ConfigError(
            f"data.partition: {ATTEMPTS} draws with alpha {self.alpha} left a client with fewer "
            f"than {self.min_examples} of {len(labels)} examples; raise alpha, or lower "
            f"min_examples or data.num_clients."
        )

    def _draw(self, rng, labels, num_clients) -> list[np.ndarray]:
        own = [[] for _ in range(num_clients)]
        held = np.zeros(num_clients, int)
        for label in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == label))
            shares = rng.dirichlet(np.full(num_clients, self.alpha))
            if self.balanced:
                shares = shares * (held < len(labels) / num_clients)
                shares = shares / shares.sum()
            cuts = (np.cumsum(shares)[:-1] * len(members)).astype(int)
            for client, part in enumerate(np.split(members, cuts)):
                own[client].append(part)
                held[client] += len(part)
        return [np.concatenate(parts) for parts in own]

"""Label skew by a Dirichlet distribution."""

import numpy as np

from fedjax_sec.core import COUNT, ConfigError, Partitioner, registry, static
from fedjax_sec.data.packing import Partition, check_num_clients, pack_lists

#: Draws before giving up on `min_examples`.
ATTEMPTS = 1000
#: With a smaller chance that one draw does, none is made.
HOPELESS = 1e-9


@registry.partitions.register("dirichlet")
class Dirichlet(Partitioner):
    r"""Each class is spread over the clients in proportions drawn from a Dirichlet distribution.

    .. math:: p_l \sim \mathrm{Dir}_N(\alpha, \dots, \alpha)

    Client i receives the share p_{l,i} of class l's examples, which are shuffled and cut at
    floor(n_l (p_{l,0} + ... + p_{l,i})). Small alpha: few classes a client, and very unequal sizes;
    large alpha: nearly independent and identically distributed. With `balanced` a client that
    already holds T / N examples receives none of the classes that follow. All is drawn again until
    every client holds `min_examples`.

    Raises: `ConfigError` where 1,000 draws leave some client with fewer examples, or would; the
    message names an alpha and a number of clients that allow it.

    Source: Yurochkin et al. 2019 (Bayesian nonparametric federated learning), Section 4, for the
    proportions; drawing again, and the balance, as in FedML's partitioner
    (`python/fedml/core/data/noniid_partition.py`, `non_iid_partition_with_dirichlet_distribution`),
    which FedSecurity uses: it is `balanced: true, min_examples: 10`, as FedML's `hetero` (whose
    `homo` is the partition `iid`). FedML seeds it with a constant, so its runs share one partition;
    here the experiment's seed draws it. Where a class would go to clients that hold enough only,
    FedML divides by zero; here the balance is left out for that class. FedML also shuffles each
    client's list at the end, which changes the order alone. Default of alpha: FedSecurity's author
    configurations.

    Example:
        >>> labels = np.repeat([0, 1], 500)
        >>> split = Dirichlet(alpha=100.0).split(np.random.default_rng(0), labels, num_clients=2)
        >>> int(split.counts.sum()), bool(split.counts.min() > 350)
        (1000, True)
    """

    needs_labels = True
    alpha: float = static(0.5, "Concentration of the Dirichlet distribution.", low=1e-6, high=1e9)
    min_examples: int = static(1, "Draw again until every client holds so many.", low=1, high=COUNT)
    balanced: bool = static(False, "Clients that hold T / N examples receive no more.")

    def split(
        self, rng: np.random.Generator, labels: np.ndarray, num_clients: int, users=None
    ) -> Partition:
        """Cuts every class of `labels` [T] by its own proportions."""
        total = len(labels)
        check_num_clients(num_clients, total)
        if num_clients * self.min_examples > total:
            raise ConfigError(
                f"data.partition.min_examples must be <= {total // num_clients} with "
                f"{num_clients} clients and {total} examples, got {self.min_examples}."
            )
        members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        chance = self._chance(members, num_clients, self.alpha)
        for _ in range(ATTEMPTS if self.balanced or chance > HOPELESS else 0):
            drawn, cuts = self._draw(rng, members, num_clients)
            counts = sum(np.diff(cut, prepend=0) for cut in cuts)
            if counts.min() >= self.min_examples:
                split = [np.split(m, cut[:-1]) for m, cut in zip(drawn, cuts, strict=True)]
                return pack_lists(
                    [np.concatenate(parts) for parts in zip(*split, strict=True)], total
                )
        raise ConfigError(
            f"data.partition: alpha {self.alpha:g} leaves some of {num_clients} clients fewer than "
            f"{self.min_examples} of {total} examples, however often it is drawn; "
            f"{self._remedies(members, num_clients)}."
        )

    def _draw(self, rng, members, num_clients) -> tuple[list, list]:
        """Every class's examples in a random order, and where each client's share of them ends."""
        total = sum(map(len, members))
        drawn, cuts, held = [], [], np.zeros(num_clients, int)
        for positions in members:
            drawn.append(rng.permutation(positions))
            shares = rng.dirichlet(np.full(num_clients, self.alpha))
            if self.balanced:
                open_to = shares * (held < total / num_clients)
                # With a tiny alpha the whole class may fall to clients that hold enough.
                shares = open_to / open_to.sum() if open_to.sum() > 0 else shares
            cut = (np.cumsum(shares) * len(positions)).astype(int)
            cut[-1] = len(positions)
            cuts.append(cut)
            held += np.diff(cut, prepend=0)
        return drawn, cuts

    def _chance(self, members, num_clients: int, alpha: float) -> float:
        """About the chance that a draw leaves everybody enough; with `balanced` a lower bound.

        (1 - p)^N with p that of one client, whose share of a class is Beta(alpha, (N - 1) alpha):
        an upper bound, since shares are negatively associated. p is estimated by a stream of its
        own, so the partition does not depend on it.
        """
        if num_clients == 1:
            return 1.0
        rng, sizes = np.random.default_rng(0), np.array([len(m) for m in members])
        shares = rng.beta(alpha, (num_clients - 1) * alpha, (ATTEMPTS, len(sizes)))
        counts = np.floor(shares * sizes + rng.random(shares.shape)).sum(axis=1)
        return float(np.mean(counts >= self.min_examples) ** num_clients)

    def _remedies(self, members, num_clients: int) -> str:
        likely, alpha, fewer = 0.1, self.alpha, num_clients
        while self._chance(members, num_clients, alpha) < likely and alpha < 1e3:
            alpha *= 2
        while self._chance(members, fewer, self.alpha) < likely:
            fewer = fewer * 3 // 4
        remedies = [f"lower data.num_clients (to {fewer})"]
        if alpha < 1e3:
            remedies.insert(0, f"raise alpha (to {alpha:.2g})")
        if self.min_examples > 1:
            remedies.append("lower min_examples")
        return ", or ".join(remedies)

"""FedML's `hetero` and `homo`: our partitions against copies written from their description."""

import numpy as np
import pytest

from fedjax_sec.core import registry

HETERO = {"name": "dirichlet", "balanced": True, "min_examples": 10}


def fedml_hetero(rng, labels, clients, alpha, smallest=10):
    """Lists of positions a client, by plain loops, and how often it was drawn.

    Class by class: shuffle its examples; draw a proportion for each client; drop the proportions of
    clients that hold as many as N / clients; scale them to one; cut the examples where the running
    sums of the proportions, times their number, round down. Again until everybody holds 10.
    """
    total, draws = len(labels), 0
    while True:
        draws += 1
        held = [[] for _ in range(clients)]
        for label in range(int(labels.max()) + 1):
            examples = np.array([i for i, y in enumerate(labels) if y == label])
            rng.shuffle(examples)
            shares = rng.dirichlet([alpha] * clients)
            for client in range(clients):
                if not len(held[client]) < total / clients:
                    shares[client] = 0.0
            shares = shares / shares.sum()
            begin, running = 0, 0.0
            for client in range(clients):
                running += shares[client]
                last = client == clients - 1
                end = len(examples) if last else int(running * len(examples))
                held[client] += examples[begin:end].tolist()
                begin = end
        if min(map(len, held)) >= smallest:
            return held, draws


def owned(partition):
    pairs = zip(partition.index, partition.counts, strict=True)
    return [row[:count].tolist() for row, count in pairs]


@pytest.mark.parametrize(
    ("alpha", "clients", "classes", "total"),
    [(0.5, 10, 10, 2000), (0.5, 10, 100, 2000), (0.5, 40, 10, 2000), (0.1, 10, 10, 1500)],
)
def test_balanced_dirichlet_is_fedmls_hetero(alpha, clients, classes, total):
    labels = np.random.default_rng(1).integers(0, classes, total).astype(np.int32)
    again = 0
    for seed in range(8):
        expected, draws = fedml_hetero(np.random.default_rng(seed), labels, clients, alpha)
        partition = registry.partitions.build(HETERO | {"alpha": alpha})
        split = partition.split(np.random.default_rng(seed), labels, clients)
        assert owned(split) == expected
        again += draws > 1
    if (alpha, clients) == (0.1, 10):
        assert again > 0  # the loop that draws again was needed, and agrees


def test_the_balance_is_what_makes_it_fedmls():
    """Without it the same draws give other clients, so the test above could have failed."""
    labels = np.random.default_rng(1).integers(0, 10, 2000).astype(np.int32)
    expected, _ = fedml_hetero(np.random.default_rng(0), labels, 10, 0.5)
    free = registry.partitions.build({"name": "dirichlet", "alpha": 0.5, "min_examples": 10})
    assert owned(free.split(np.random.default_rng(0), labels, 10)) != expected
    # Nobody starts a class with more than its part, so nobody holds more than that and a class.
    assert max(map(len, expected)) <= 2000 / 10 + np.bincount(labels).max()


def test_a_full_client_gets_nothing_more():
    """By hand: two clients, 12 examples; who holds 6 or more after a class is left out."""

    class Draws:
        def __init__(self):
            self.shares = iter([[0.9, 0.1], [0.9, 0.1], [0.5, 0.5]])

        def permutation(self, x):
            return np.array(x)

        def dirichlet(self, alpha):
            return np.array(next(self.shares))

    labels = np.repeat([0, 1, 2], [7, 3, 2]).astype(np.int32)
    partition = registry.partitions.build(HETERO | {"min_examples": 1})
    split = partition.split(Draws(), labels, 2)
    # 0.9 * 7 = 6.3: six to the first, which is full; all of class 1 to the second, which then holds
    # 1 + 3 = 4, so class 2 is its as well.
    assert owned(split) == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]


def test_iid_is_fedmls_homo():
    """A random permutation, cut into parts of which the first are one longer."""
    for total, clients in ((2000, 10), (1009, 7)):
        order = np.random.default_rng(3).permutation(total).tolist()
        sizes = [total // clients + (i < total % clients) for i in range(clients)]
        expected, begin = [], 0
        for size in sizes:
            expected.append(order[begin : begin + size])
            begin += size
        labels = np.zeros(total, np.int32)
        split = registry.partitions.build("iid").split(np.random.default_rng(3), labels, clients)
        assert owned(split) == expected

"""Partitioners: exact accounting, reproducibility, label skew, padding and error messages."""

import dataclasses
import re

import numpy as np
import pytest

import fedjax_sec
from fedjax_sec.core import ConfigError, registry
from fedjax_sec.data.packing import Partition, check_partition, materialize, pack_lists
from fedjax_sec.data.partitions.by_label import ByLabel
from fedjax_sec.data.partitions.dirichlet import Dirichlet
from fedjax_sec.data.partitions.iid import Iid
from fedjax_sec.data.partitions.label_groups import LabelGroups
from fedjax_sec.data.partitions.natural import Natural

PARTITIONERS = {
    "iid": Iid(),
    "iid_equal": Iid(equal=True),
    "by_label": ByLabel(),
    "by_label_3": ByLabel(shards_per_client=3),
    "dirichlet": Dirichlet(alpha=5.0),
    "dirichlet_balanced": Dirichlet(alpha=5.0, balanced=True),
    "label_groups": LabelGroups(q=0.3),
}
#: Partitions that draw each client's size leave some without, where there are few examples each.
DRAWN_SIZES = {"dirichlet", "dirichlet_balanced", "label_groups"}


def rng(seed=0):
    return np.random.default_rng(seed)


def some_labels(total, seed=1):
    return rng(seed).integers(0, 10, total).astype(np.int32)


def owned(partition):
    """The positions each client holds, counted out by hand."""
    index, counts, _ = partition
    return [row[:count].tolist() for row, count in zip(index, counts, strict=True)]


@pytest.mark.parametrize(
    ("name", "num_clients"),
    [
        (name, number)
        for name in PARTITIONERS
        for number in (1, 2, 3, 7, 10, 31, 51, 97, 100, 333)
        if name not in DRAWN_SIZES or 10 <= number <= 51
    ],
)
def test_every_example_is_used_once_or_counted(name, num_clients):
    total = 1009  # prime, so nothing divides
    partition = PARTITIONERS[name].split(rng(), some_labels(total), num_clients)
    positions = [p for client in owned(partition) for p in client]
    assert len(set(positions)) == len(positions)
    assert set(positions) <= set(range(total))
    assert len(positions) + partition.unused == total
    assert partition.counts.shape == (num_clients,) and partition.counts.min() >= 1
    assert partition.index.shape == (num_clients, partition.counts.max())
    assert partition.index.dtype == partition.counts.dtype == np.int32
    if name != "iid_equal":
        assert partition.unused == 0
    padding = np.arange(partition.index.shape[1]) >= partition.counts[:, None]
    assert not partition.index[padding].any()


@pytest.mark.parametrize("num_clients", [1, 7, 51, 97, 1000])
def test_iid_sizes_differ_by_at_most_one(num_clients):
    counts = Iid().split(rng(), some_labels(1009), num_clients).counts
    assert counts.max() - counts.min() <= 1


def test_sixty_thousand_over_fifty_one():
    partition = Iid().split(rng(), np.zeros(60000, np.int32), 51)
    assert np.unique(partition.counts, return_counts=True)[1].tolist() == [27, 24]
    assert set(partition.counts.tolist()) == {1176, 1177}
    equal = Iid(equal=True).split(rng(), np.zeros(60000, np.int32), 51)
    assert set(equal.counts.tolist()) == {1176} and equal.unused == 60000 - 51 * 1176


def test_iid_clients_see_the_labels_in_the_proportions_of_the_whole():
    labels = np.repeat(np.arange(10), 1000)  # sorted: an unshuffled cut would give single labels
    partition = Iid().split(rng(), labels, 10)
    for client in owned(partition):
        assert np.bincount(labels[client], minlength=10).min() > 60  # 100 expected, deviation 9


@pytest.mark.parametrize("name", PARTITIONERS)
def test_the_seed_decides_and_nothing_else(name):
    def split(seed):
        return PARTITIONERS[name].split(rng(seed), some_labels(1009), 31)

    first, again, other = split(0), split(0), split(1)
    np.testing.assert_array_equal(first.index, again.index)
    np.testing.assert_array_equal(first.counts, again.counts)
    assert owned(first) != owned(other)


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_by_label_gives_few_labels_a_client(shards):
    labels = rng().permutation(np.repeat(np.arange(10), 100))
    partition = ByLabel(shards_per_client=shards).split(rng(), labels, 20)
    seen = [len(set(labels[client].tolist())) for client in owned(partition)]
    assert max(seen) <= shards
    assert partition.counts.tolist() == [50] * 20
    # The shards are those of the sorted data, so each label is on exactly its own shards.
    holders = [sum(k in labels[client] for client in owned(partition)) for k in range(10)]
    assert max(holders) <= 2 * shards


def test_by_label_deals_different_shards_to_a_client():
    labels = np.repeat(np.arange(10), 100)
    partition = ByLabel().split(rng(), labels, 50)  # 10 shards a label
    pairs = {tuple(sorted(set(labels[client].tolist()))) for client in owned(partition)}
    assert len(pairs) > 10  # dealt in order, there would be the 10 single labels only


def test_by_label_client_sizes_differ_by_at_most_a_shards_remainder():
    counts = ByLabel(shards_per_client=3).split(rng(), some_labels(1009), 31).counts
    assert counts.max() - counts.min() <= 3


@pytest.mark.parametrize("num_clients", [0, -1, 11])
@pytest.mark.parametrize("name", ["iid", "by_label"])
def test_impossible_numbers_of_clients_are_named(name, num_clients):
    with pytest.raises(ValueError, match=f"num_clients .*between 1 and 10.*got {num_clients}"):
        PARTITIONERS[name].split(rng(), some_labels(10), num_clients)


def test_impossible_numbers_of_shards_are_named():
    with pytest.raises(ValueError, match=r"shards_per_client .*between 1 and 2 .*got 3"):
        ByLabel(shards_per_client=3).split(rng(), some_labels(10), 4)
    with pytest.raises(ValueError, match="shards_per_client"):
        registry.partitions.build({"name": "by_label", "shards_per_client": 0})


# --- By class, drawn ----------------------------------------------------------------------------


def chi_square(counts, chances):
    """The statistic of observed counts [n] against chances [n]; n - 1 degrees of freedom."""
    expected = np.asarray(chances) * np.sum(counts)
    return float(((counts - expected) ** 2 / expected).sum())


# 99.9% quantiles of chi-square with 9 and 19 degrees of freedom: with the seeds fixed the tests
# give the same answer every time, and a right partitioner would have failed for one seed in 1,000.
QUANTILE = {9: 27.88, 19: 43.82}


@pytest.mark.parametrize("q", [0.1, 0.5, 0.9])
def test_label_groups_follow_their_distribution(q):
    labels, clients = np.repeat(np.arange(10), 3000), 20
    partition = LabelGroups(q=q).split(rng(3), labels, clients)
    table = np.stack([np.bincount(labels[mine], minlength=10) for mine in owned(partition)])
    # Which clients form the group of a class: for q > 1/M those who hold most of it.
    order = np.random.default_rng(3).permutation(clients)
    groups = np.array_split(order, 10)
    for label in range(10):
        by_group = np.array([table[group, label].sum() for group in groups])
        chances = np.where(np.arange(10) == label, q, (1 - q) / 9)
        assert chi_square(by_group, chances) < QUANTILE[9], label
    # Within a group every client is as likely: the twenty clients of the pairs.
    within = np.stack([table[group].sum(1) for group in groups])
    assert ((within[:, 0] - within[:, 1]) ** 2 / within.sum(1)).sum() < 29.59  # 10 degrees


def test_label_groups_at_one_tenth_are_uniform_over_clients():
    labels = np.repeat(np.arange(10), 1000)
    counts = LabelGroups(q=0.1).split(rng(4), labels, 20).counts
    assert chi_square(counts, np.full(20, 1 / 20)) < QUANTILE[19]


def test_label_groups_at_one_give_a_class_to_its_group():
    labels = np.repeat(np.arange(10), 100)
    partition = LabelGroups(q=1.0).split(rng(), labels, 30)
    assert all(len(set(labels[mine].tolist())) == 1 for mine in owned(partition))


def test_dirichlet_shares_have_the_right_mean_and_variance():
    """A share of Dir(a, ..., a) over N: mean 1/N, variance (1/N)(1 - 1/N) / (N a + 1)."""
    clients, alpha, per_class = 5, 0.7, 1000
    labels = np.repeat(np.arange(400), per_class)
    partition = Dirichlet(alpha=alpha).split(rng(5), labels, clients)
    mine = [np.bincount(labels[o], minlength=400) for o in owned(partition)]
    shares = np.stack(mine) / per_class
    variance = (1 / clients) * (1 - 1 / clients) / (clients * alpha + 1)
    # 400 classes: the mean's standard error is sqrt(variance / 400) = 0.0094, the variance's about
    # a twelfth of it.
    np.testing.assert_allclose(shares.mean(1), 1 / clients, atol=0.035)
    np.testing.assert_allclose(shares.var(1), variance, rtol=0.3)


def test_dirichlet_balance_keeps_clients_near_one_size():
    labels = np.repeat(np.arange(10), 500)
    free, held = (
        Dirichlet(alpha=0.3, balanced=b).split(rng(6), labels, 10).counts for b in (False, True)
    )
    assert held.max() < free.max() and held.max() <= 500 + 500


def test_dirichlet_draws_again_until_everybody_has_enough():
    labels = np.repeat(np.arange(10), 100)
    once = Dirichlet(alpha=0.3).split(rng(7), labels, 20).counts
    again = Dirichlet(alpha=0.3, min_examples=15).split(rng(7), labels, 20).counts
    assert once.min() < 15 <= again.min()


@pytest.mark.parametrize(
    ("partition", "clients", "message"),
    [
        (LabelGroups(), 5, "num_clients must be >= 10, a client for the group of each class"),
        (LabelGroups(q=1.0), 300, "clients without one .* lower q, or lower data.num_clients"),
        (LabelGroups(q=0.0), 1009, "use more examples, lower data.num_clients"),
        (Dirichlet(min_examples=60), 20, "min_examples must be <= 50"),
        (Dirichlet(alpha=0.01, min_examples=40), 20, "alpha 0.01 leaves some of 20"),
        (Iid(), 1010, "data.num_clients must be between 1 and 1009"),
        (ByLabel(9), 200, "data.partition.shards_per_client must be between 1 and 5"),
    ],
)
def test_partitions_by_class_say_what_they_cannot_do(partition, clients, message):
    with pytest.raises(ConfigError, match=message):
        partition.split(rng(), some_labels(1009), clients)


@pytest.mark.parametrize(
    ("partition", "clients"),
    [
        (Dirichlet(alpha=0.01), 100),
        (Dirichlet(alpha=1e-6), 20),
        (Dirichlet(alpha=0.01, balanced=True), 100),
        (Dirichlet(alpha=0.01, min_examples=40), 20),
        (Dirichlet(alpha=0.5), 1000),
    ],
)
def test_what_dirichlet_advises_can_be_done(partition, clients):
    """At the smallest `min_examples` too, which nobody can lower, and without a thousand draws."""
    labels = some_labels(1009)
    with pytest.raises(ConfigError) as caught:
        partition.split(rng(), labels, clients)
    message = str(caught.value)
    assert ("min_examples" in message) == (partition.min_examples > 1)
    alpha = re.search(r"raise alpha \(to ([\d.e+]+)\)", message)
    fewer = int(re.search(r"lower data.num_clients \(to (\d+)\)", message)[1])
    assert (alpha is None) == (clients == 1000)  # as good as an example each: no alpha helps
    if alpha:
        more = dataclasses.replace(partition, alpha=float(alpha[1]))
        assert more.split(rng(), labels, clients).counts.min() >= partition.min_examples
    assert partition.split(rng(), labels, fewer).counts.min() >= partition.min_examples


def test_dirichlet_without_hope_draws_nothing(monkeypatch):
    monkeypatch.setattr(Dirichlet, "_draw", lambda *_: pytest.fail("drew"))
    with pytest.raises(ConfigError, match="however often"):
        Dirichlet(alpha=1e-6).split(rng(), some_labels(1009), 100)


def test_dirichlet_draws_as_ever():
    """Recorded before the sizes were looked at first: drawing again must not shift a stream."""
    labels = np.repeat(np.arange(10), 100)
    counts = Dirichlet(alpha=0.3, min_examples=15).split(rng(7), labels, 20).counts
    assert counts.tolist() == [
        59,
        60,
        28,
        25,
        92,
        60,
        45,
        29,
        97,
        83,
        16,
        47,
        79,
        36,
        34,
        33,
        38,
        37,
        51,
        51,
    ]
    counts = Dirichlet(alpha=0.3, min_examples=20, balanced=True).split(rng(8), labels, 20).counts
    assert counts.tolist() == [
        22,
        58,
        64,
        50,
        55,
        58,
        59,
        48,
        25,
        68,
        40,
        74,
        37,
        73,
        60,
        69,
        22,
        20,
        51,
        47,
    ]


def test_label_groups_need_two_classes():
    with pytest.raises(ConfigError, match="label_groups needs examples of two classes or more"):
        LabelGroups().split(rng(), np.zeros(50, np.int32), 5)


# --- By user ------------------------------------------------------------------------------------

USERS = np.array([3, 8, 3, 5, 5, 3, 8, 3, 12], np.int32)  # user 12 has one example, 4 has none


@pytest.mark.parametrize("users", ["drawn", "first"])
def test_a_client_is_a_user(users):
    partition = Natural(users=users).split(rng(), np.zeros(9, np.int32), 4, USERS)
    assert owned(partition) == [[0, 2, 5, 7], [3, 4], [1, 6], [8]]
    assert partition.counts.tolist() == [4, 2, 2, 1] and partition.unused == 0


def test_fewer_clients_than_users_are_the_first_or_drawn_ones():
    users = rng(5).integers(0, 60, 1009)
    by_user = [np.flatnonzero(users == user).tolist() for user in np.unique(users)]
    first = Natural(users="first").split(rng(), np.zeros(1009, np.int32), 20, users)
    assert owned(first) == by_user[:20] and first.unused == 1009 - sum(map(len, by_user[:20]))
    drawn = [
        owned(Natural().split(rng(seed), np.zeros(1009, np.int32), 20, users)) for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2] and drawn[0] != by_user[:20]
    for clients in drawn:  # whole users, none twice, in the order of their numbers
        places = [by_user.index(client) for client in clients]
        assert places == sorted(set(places))


@pytest.mark.parametrize("num_clients", [0, 5])
def test_numbers_of_clients_beyond_the_users_are_named(num_clients):
    message = f"data.num_clients must be between 1 and 4, .* got {num_clients}"
    with pytest.raises(ConfigError, match=message):
        Natural().split(rng(), np.zeros(9, np.int32), num_clients, USERS)


def test_data_without_users_has_no_natural_partition():
    with pytest.raises(ConfigError, match=r"data.partition: natural needs .*'mnist_by_writer'"):
        Natural().split(rng(), np.zeros(9, np.int32), 4)
    experiment = {"data": {"name": "digits", "partition": "natural"}, "rounds": 1}
    with pytest.raises(ConfigError, match="this one has no users"):
        fedjax_sec.run(experiment)


def test_registered_names_build_what_they_say():
    assert registry.partitions.build({"name": "iid", "equal": True}) == Iid(equal=True)
    assert registry.partitions.build("by_label") == ByLabel(shards_per_client=2)


# --- Packing ------------------------------------------------------------------------------------


def test_pack_lists_counts_what_nobody_has():
    partition = pack_lists([np.array([5]), np.array([], int), np.array([0, 3])], 7)
    assert partition.index.tolist() == [[5, 0], [0, 0], [0, 3]]
    assert partition.counts.tolist() == [1, 0, 2]
    assert partition.unused == 4
    assert partition.mask.tolist() == [[True, False], [False, False], [True, True]]


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ([[0, 1], [1]], "Example 1 is used 2 times"),
        ([[0, 3]], "between 0 and 2, got 0 to 3"),
        ([[0, -1]], "between 0 and 2, got -1 to 0"),
        ([[], []], "at least one example"),
        ([], "at least one example"),
    ],
)
def test_pack_lists_refuses_impossible_lists(lists, message):
    with pytest.raises(ValueError, match=message):
        pack_lists([np.array(positions, int) for positions in lists], 3)


@pytest.mark.parametrize(
    ("index", "counts", "unused", "message"),
    [
        ([[0, 1], [2, 0]], [2, 1], 1, "3 used and 1 unused"),
        ([[0, 1], [2, 0]], [2, 0], 0, "2 used and 0 unused"),
        ([[0, 1], [2, 1]], [2, 1], 0, "padding"),
        ([[0, 1], [2, 0]], [2, 3], 0, "counts must be between 0 and 2, .* 2 to 3"),
        ([[0, 1], [2, 0]], [2, -1], 1, "counts must be between 0 and 2, .* -1 to 2"),
        ([[0, 1], [2, 0]], [2, 1, 0], 0, "shapes"),
    ],
)
def test_check_partition_finds_what_does_not_add_up(index, counts, unused, message):
    check_partition(Partition(np.array([[0, 1], [2, 0]]), np.array([2, 1]), 0), 3)
    with pytest.raises(ValueError, match=message):
        check_partition(Partition(np.array(index), np.array(counts), unused), 3)


def test_materialize_puts_every_example_in_its_place_and_zeroes_padding():
    total = 23
    x = rng(2).integers(1, 256, (total, 3, 2, 1), np.uint8)  # no zeros: padding is recognisable
    y = np.arange(1, total + 1, dtype=np.int32)
    x_before = x.copy()
    partition = Iid().split(rng(), y, 5)
    x_clients, y_clients, mask = materialize(x, y, partition)
    assert x_clients.shape == (5, 5, 3, 2, 1) and y_clients.shape == mask.shape == (5, 5)
    assert (x_clients.dtype, y_clients.dtype, mask.dtype) == (np.uint8, np.int32, bool)
    for i, client in enumerate(owned(partition)):
        for j in range(5):
            if j < len(client):
                assert mask[i, j] and y_clients[i, j] == y[client[j]]
                np.testing.assert_array_equal(x_clients[i, j], x[client[j]])
            else:
                assert not mask[i, j] and y_clients[i, j] == 0 and not x_clients[i, j].any()
    assert mask.sum() == total
    np.testing.assert_array_equal(x, x_before)

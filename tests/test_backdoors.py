"""Trojans, shared-out patterns, label flips and boosting: pixels, shares, labels, measurement."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CLASSES, SHAPE, NumpyMlp, same_bits, sample, small, tiny_task
from jax.flatten_util import ravel_pytree
from programs import averaging, classification, problem_of

import fedjax_sec
from fedjax_sec import core
from fedjax_sec.attacks.update.scaling import CORNER
from fedjax_sec.core import ConfigError, Setting, registry
from fedjax_sec.core.optimizers import build as build_optimizer
from fedjax_sec.data.source import Source
from fedjax_sec.ops.client_axis import Layout
from fedjax_sec.report import inspection, plotting
from fedjax_sec.round import (
    Components,
    Pool,
    Population,
    Replica,
    make_task,
    train_clients,
)
from fedjax_sec.round.pipeline import Attack, Defense
from fedjax_sec.runs import checks, config
from fedjax_sec.runs.prepare import bound_task, prepare
from fedjax_sec.runs.source import load_source, network_of

OPTIMIZER = build_optimizer({"name": "sgd", "learning_rate": 1.0})

# Written down from the authors' constants, not from our code.
FASHION = {(5, 5), (6, 5), (7, 5), (8, 5), (9, 5), (7, 3), (7, 4), (7, 6), (7, 7)}
EMNIST = {(8, 8), (9, 8), (10, 8), (11, 8), (12, 8), (10, 6), (10, 7), (10, 9), (10, 10)}
CIFAR = {(row, 5) for row in range(5, 12)} | {(8, column) for column in range(2, 9)}
SQUARE = set(itertools.product(range(21, 26), range(21, 26)))
CIFAR_PARTS = [
    {(5, 5), (6, 5), (7, 5), (8, 5)},
    {(9, 5), (10, 5), (11, 5)},
    {(8, 2), (8, 3), (8, 4), (8, 5), (8, 6)},
    {(8, 5), (8, 6), (8, 7), (8, 8)},
]


def trojan(**fields):
    return registry.attacks.build({"name": "trojan"} | fields)


def images(shape, count=3, seed=0):
    """Random images without black or white pixels, in steps of 1/255."""
    drawn = np.random.default_rng(seed).integers(1, 255, (count, *shape))
    return (drawn / 255).astype(np.float32)


def changed(before, after):
    """The pixels that differ in every image and channel; no other may differ anywhere."""
    differs = np.asarray(before) != np.asarray(after)
    everywhere = differs.all(axis=(0, 3))
    np.testing.assert_array_equal(differs, np.broadcast_to(everywhere[..., None], differs.shape))
    return {tuple(map(int, pixel)) for pixel in np.argwhere(everywhere)}


@pytest.mark.parametrize(
    ("shape", "fields", "pixels", "value"),
    [
        ((28, 28, 1), {}, FASHION, 1.0),
        ((28, 28, 1), {"place": [8, 6], "size": 5, "value": 0}, EMNIST, 0.0),
        ((28, 28, 1), {"place": [8, 6], "size": 5}, EMNIST, 1.0),
        ((32, 32, 3), {}, CIFAR, 0.0),
        ((28, 28, 1), {"pattern": "square"}, SQUARE, 1.0),
        (
            (28, 28, 1),
            {"pattern": "pixels", "pixels": [[26, 26], [24, 26], [26, 24], [25, 25]]},
            {(26, 26), (24, 26), (26, 24), (25, 25)},
            1.0,
        ),
    ],
    ids=["fashion", "emnist", "digits", "cifar", "square", "own"],
)
def test_golden_pixels(shape, fields, pixels, value):
    x = images(shape)
    stamped = np.asarray(trojan(**fields).trigger((), x))
    assert changed(x, stamped) == pixels
    for row, column in pixels:
        assert (stamped[:, row, column] == value).all()


GOLDEN_MARKS = {
    "copyright": [
        "..............",
        "...#######....",
        "..##......#...",
        ".##...##...#..",
        ".#..#####..##.",
        ".#..#.......#.",
        ".#.##.......#.",
        ".#.##.......#.",
        ".#..##..#...#.",
        ".#...####..#..",
        "..#.......##..",
        "...##....##...",
        "....#####.....",
        "..............",
    ],
    "apple": [
        "..............",
        "......##......",
        ".......##.....",
        ".......##.....",
        "..............",
        "...#######....",
        "..########....",
        "..########....",
        "..########....",
        "..##########..",
        "..#########...",
        "....##.###....",
        "..............",
        "..............",
    ],
}


def picture(mark):
    """Rows of text, `#` where the mark covers at least half, every second pixel."""
    return ["".join("#" if v >= 0.5 else "." for v in row) for row in mark[1::2, 1::2]]


def test_golden_marks():
    marks = {name: trojan(pattern=name).marks(28, 28)[0] for name in ("copyright", "apple")}
    for name, mark in marks.items():
        assert picture(mark) == GOLDEN_MARKS[name], "\n".join(picture(mark))
        assert mark.min() == 0 and mark.max() == 1
        assert trojan(pattern=name).marks(32, 48).shape == (1, 32, 48)


@pytest.mark.parametrize("pattern", ["copyright", "apple"])
def test_marks_are_added_as_the_author_adds_them(pattern):
    x = images((28, 28, 1))
    bytes_ = np.round(x * 255).astype(np.uint8)
    part = trojan(pattern=pattern)
    mark = part.marks(28, 28)[0][None, :, :, None]
    added = np.asarray(part.trigger((), x))
    np.testing.assert_allclose(added, np.minimum(x + mark, 1), atol=1e-6)
    taken = np.asarray(trojan(pattern=pattern, value=0).trigger((), x))
    np.testing.assert_allclose(taken, np.maximum(x - mark, 0), atol=1e-6)
    assert (added > x).mean() > 0.1 and (taken < x).mean() > 0.1
    with np.errstate(over="ignore"):
        sums = bytes_ + np.round(mark * 255).astype(np.uint8)  # uint8: modulo 256
    assert sums.dtype == np.uint8 and (sums < bytes_).any()
    wrapped = np.asarray(trojan(pattern=pattern, overflow="wrap").trigger((), x)) * 255
    np.testing.assert_array_equal(np.round(wrapped), sums)


# --- Distributed backdoors ----------------------------------------------------------------------


def part_of(attack, rank, shape):
    x = images(shape)
    poisoned, _ = attack.poison(
        jax.random.key(0), (), x, jnp.zeros(3, int), jnp.array(rank), tiny_task()
    )
    return changed(x, poisoned)


@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        ({"split": 4}, (32, 32, 3)),
        ({"split": 4}, (28, 28, 1)),
        ({"split": 2}, (28, 28, 1)),
        ({"split": 3, "pattern": "square"}, (28, 28, 1)),
        ({"split": 2, "pattern": "pixels", "pixels": [[0, 1], [3, 3], [2, 0]]}, SHAPE),
    ],
)
def test_parts_are_a_partition_of_the_whole(fields, shape):
    attack = trojan(**fields)
    parts = [part_of(attack, rank, shape) for rank in range(attack.split)]
    x = images(shape)
    assert set().union(*parts) == changed(x, attack.trigger((), x))
    assert all(parts) and sum(map(len, parts)) == len(set().union(*parts))
    assert part_of(attack, attack.split + 1, shape) == parts[1]


def test_the_four_equal_parts_of_a_plus_are_its_arms():
    parts = [part_of(trojan(split=4), rank, (32, 32, 3)) for rank in range(4)]
    assert parts[0] == CIFAR_PARTS[0] and parts[1] == CIFAR_PARTS[1]
    assert parts[2] == {(8, 2), (8, 3), (8, 4)} and parts[3] == {(8, 6), (8, 7), (8, 8)}


def test_the_authors_parts_overlap_and_unite_to_the_whole():
    attack = trojan(split=4, parts="author")
    assert [part_of(attack, rank, (32, 32, 3)) for rank in range(4)] == CIFAR_PARTS
    x = images((32, 32, 3))
    assert changed(x, attack.trigger((), x)) == CIFAR == set().union(*CIFAR_PARTS)


@pytest.mark.parametrize("pattern", ["copyright", "apple"])
def test_bands_of_a_mark_unite_to_the_whole(pattern):
    bands = trojan(pattern=pattern, split=4).marks(28, 28)
    np.testing.assert_array_equal(bands.sum(0), trojan(pattern=pattern).marks(28, 28)[0])
    assert (bands.reshape(4, -1).sum(1) > 0).all()


# --- Inside the round ---------------------------------------------------------------------------


@core.pytree
class Reveals(core.Client):
    """A client whose "update" are its images, and whose metrics are its labels."""

    def apply(self, key, params, state, local, task, hooks=core.NO_HOOKS):
        x, y = local.fetch(jnp.arange(local.capacity))
        return core.Trained(x.reshape(-1), (), 1, None, {"y": y})


def local_examples(attack, malicious, labels, round=0, seed=0):
    """The training images of clients with the labels [N, M], and their clean images."""
    clients, each = labels.shape
    x = np.random.default_rng(1).integers(1, 255, (labels.size, *SHAPE), np.uint8)
    pool = Pool(jnp.asarray(x), jnp.asarray(labels.ravel(), jnp.int32))
    model = registry.models.build({"name": "mlp", "hidden": [5]}).make(SHAPE, CLASSES)
    problem = problem_of(
        model, SHAPE, CLASSES, 255.0, (0.5,), (0.5,), clients, clients, False, Layout(clients)
    )
    counts = jnp.full(clients, each).at[0].set(each - 1)  # the first client's row is padded
    index = jnp.arange(labels.size, dtype=jnp.int32).reshape(labels.shape)
    parts = Components(averaging(Reveals()), Attack.build(attack), Defense(()), None)
    replica = Replica(jax.random.key(seed), parts, Population(index, counts, malicious))
    task = make_task(problem, pool, classification())
    server = parts.algorithm.start(jnp.zeros(x[0].size * each))
    state = parts.attack.init(clients, task.dim, parts, task)
    message, _, metrics = jax.jit(
        lambda i: train_clients(
            problem, task, pool, replica, server, state, (), jnp.arange(clients), i
        )
    )(jnp.int32(round))
    shown = message.vector
    clean = np.asarray(x.reshape(clients, each, *SHAPE), np.float32) * np.float32(1 / 255)
    return np.asarray(shown).reshape(clean.shape), np.asarray(metrics["y"]), clean


LABELS = np.random.default_rng(2).integers(0, CLASSES, (5, 40))
MALICIOUS = jnp.array([True, False, True, False, True])


@pytest.mark.parametrize("share", [0.3, 0.5, 1.0])
def test_an_exact_share_of_base_class_images_is_poisoned(share):
    spec = {"name": "trojan", "base": 1, "target": 2, "fraction": share}
    x, y, clean = local_examples(spec, MALICIOUS, LABELS)
    stamped = (x != clean).any(axis=(2, 3, 4))
    assert not stamped[~np.asarray(MALICIOUS)].any()
    same_bits(y[~stamped], LABELS[~stamped])
    assert (LABELS[stamped] == 1).all() and (y[stamped] == 2).all()
    for client in np.flatnonzero(MALICIOUS):
        held = LABELS[client, : 39 if client == 0 else 40]
        assert stamped[client].sum() == np.floor(share * (held == 1).sum())
    assert not stamped[0, 39], "padding is stamped"
    whole = np.asarray(registry.attacks.build(spec).trigger((), clean[stamped]))
    np.testing.assert_allclose(x[stamped], whole)
    # The same examples in every round, others for another seed.
    again = local_examples(spec, MALICIOUS, LABELS, round=7)
    same_bits(again[0], x)
    if share < 1:
        assert not np.array_equal(local_examples(spec, MALICIOUS, LABELS, seed=1)[0], x)


def test_malicious_clients_share_the_pattern_out_by_their_rank():
    pixels = [[0, 0], [1, 3], [3, 2]]
    spec = {"name": "trojan", "pattern": "pixels", "pixels": pixels, "split": 3, "fraction": 1.0}
    x, y, clean = local_examples(spec, MALICIOUS, LABELS)
    for rank, client in enumerate((0, 2, 4)):
        images_ = slice(0, 39 if client == 0 else 40)
        assert changed(clean[client, images_], x[client, images_]) == {tuple(pixels[rank])}
        assert (y[client, images_] == 0).all()
    same_bits(x[[1, 3]], clean[[1, 3]])


def test_label_flip_relabels_and_leaves_images():
    flip = {"name": "label_flip", "base": 2, "target": 0, "fraction": 0.5}
    x, y, clean = local_examples(flip, MALICIOUS, LABELS)
    same_bits(x, clean)
    relabelled = y != LABELS
    assert (LABELS[relabelled] == 2).all() and (y[relabelled] == 0).all()
    assert relabelled[2].sum() == (LABELS[2] == 2).sum() // 2 and not relabelled[[1, 3]].any()
    _, y, _ = local_examples("label_flip", MALICIOUS, LABELS)
    same_bits(y[2], CLASSES - 1 - LABELS[2])
    same_bits(y[3], LABELS[3])


def test_data_attacks_act_one_after_the_other():
    """Each chooses by the true labels; the second sees what the first made of the images."""
    first = {"name": "trojan", "base": 1, "target": 2, "fraction": 1.0}
    second = {"name": "label_flip", "base": 1, "target": 0, "fraction": 0.5}
    third = {"name": "label_flip", "base": 2, "target": 1}
    x, y, clean = local_examples([first, second, third], MALICIOUS, LABELS)
    y, labels, stamped = y[2], LABELS[2], (x[2] != clean[2]).any(axis=(1, 2, 3))
    same_bits(stamped, labels == 1)
    assert set(y[labels == 1]) == {0, 2} and (y[labels == 1] == 0).sum() == (labels == 1).sum() // 2
    assert (y[labels == 2] == 1).all() and (y[labels == 0] == 0).all()


def test_probes_are_the_base_class_with_the_whole_pattern():
    x, y = sample(jax.random.key(0), 30)
    attack = trojan(base=1, target=2, split=3)
    probes, target, include = attack.probes((), x, y, tiny_task())
    same_bits(include, np.asarray(y) == 1)
    assert (np.asarray(target) == 2).all()
    same_bits(probes, attack.trigger((), x))
    flip = registry.attacks.build("label_flip")
    probes, target, include = flip.probes((), x, y, tiny_task())
    same_bits(probes, x)
    same_bits(target, CLASSES - 1 - np.asarray(y))
    same_bits(include, np.asarray(y) != 1)  # the middle class is its own flip
    part = registry.attacks.build({"name": "label_flip", "base": 1, "target": 0})
    same_bits(part.probes((), x, y, tiny_task())[2], np.asarray(y) == 1)


def test_examples_for_an_update_attack_keep_other_classes_clean():
    class View:
        task = tiny_task()

        @staticmethod
        def sample(key, num):
            return sample(key, num)

    clean, labels = sample(jax.random.key(5), 50)
    attack = trojan(base=1, target=2, num_images=50)
    x, y = attack.examples(jax.random.key(5), (), View)
    base = np.asarray(labels) == 1
    same_bits(np.asarray(x)[base], np.asarray(attack.trigger((), clean))[base])
    same_bits(np.asarray(x)[~base], np.asarray(clean)[~base])
    same_bits(y, np.where(base, 2, labels))


# --- Boosting -----------------------------------------------------------------------------------


def test_boost_multiplies_malicious_rows_only():
    stack = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    mask = np.arange(6) % 2 == 0
    for factor, expected in ((3.5, 3.5), (None, 6)):
        sent = np.asarray(fedjax_sec.attack(stack, "boost", malicious=mask, factor=factor))
        np.testing.assert_allclose(sent[mask], np.float32(expected) * stack[mask], rtol=1e-6)
        same_bits(sent[~mask], stack[~mask])


def test_a_boosted_label_flip_moves_the_model_further():
    flip = {"name": "label_flip", "base": 3, "target": 8}
    spec = small(
        rounds=20,
        threat={"num_malicious": 1},
        evaluation={"every": 20},
        data={"max_train": None},
        client={"name": "sgd", "steps": 2, "batch_size": 64},
    )
    success = {}
    for name, attack in (("alone", flip), ("boosted", [flip, "boost"])):
        result = fedjax_sec.run(spec, attack=attack)
        success[name] = result.metrics["attack_success_rate"][-1]
    assert success["boosted"] > 0.8 and success["alone"] < 0.3


# --- What is measured ---------------------------------------------------------------------------

BACKDOOR = {"name": "trojan", "base": 5, "target": 7}
LARGE = {"place": [0, 0], "size": 5}  # three pixels of the digits' empty margin teach little
QUICK = {
    "data": {"max_train": None},
    "client": {
        "name": "sgd",
        "steps": 4,
        "batch_size": 64,
        "optimizer": {"name": "sgd", "learning_rate": 0.4},
    },
    "evaluation": {"every": 60},
    "rounds": 60,
}


def by_hand(result):
    """ASR, loss of the backdoor and accuracy of the base class, from the final parameters."""
    source = load_source(result.experiment)
    mlp = NumpyMlp(64, 6, 10, source.mean[0], source.std[0])
    params = np.asarray(ravel_pytree(result.params)[0])
    base = source.x_test[source.y_test == 5] / source.scale
    clean = mlp.forward(params, base)[2].argmax(1)
    stamped = base.copy()
    stamped[:, :5, 2] = 1.0
    stamped[:, 2, :5] = 1.0
    read = mlp.forward(params, stamped)[2].argmax(1)
    loss = mlp.loss_and_gradient(params, stamped, np.full(len(base), 7))[0]
    return (read == 7).mean(), loss, (clean == 5).mean()


@pytest.mark.parametrize("attacked", [True, False])
def test_the_backdoor_is_measured_with_and_without_an_attack(attacked):
    changes = {"attack": BACKDOOR | LARGE, "threat": {"num_malicious": 3}}
    if not attacked:
        changes = {"evaluation.backdoor": BACKDOOR | LARGE}
    result = fedjax_sec.run(small(**QUICK), **changes)
    success, loss, accuracy = by_hand(result)
    final = {name: values[-1] for name, values in result.metrics.items()}
    assert final["attack_success_rate"] == pytest.approx(success, abs=1e-6)
    assert final["backdoor_loss"] == pytest.approx(loss, rel=1e-4)
    assert final["base_class_accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert final["base_class_accuracy"] == final["per_class_accuracy"][5]
    assert accuracy > 0.8 and (success > 0.8 if attacked else success < 0.2)


def test_a_backdoor_for_all_classes_has_no_base_class_accuracy():
    result = fedjax_sec.run(small(rounds=1, attack="trojan", threat={"num_malicious": 1}))
    assert "base_class_accuracy" not in result.metrics and "backdoor_loss" in result.metrics


# --- Pictures -----------------------------------------------------------------------------------


def pictures_of(attack, count=3, **changes):
    return inspection.backdoor_pictures(
        config.from_mapping(small(attack=attack, threat={"num_malicious": 5}, **changes)), count
    )


def test_pictures_show_whole_and_parts():
    outcome = pictures_of(BACKDOOR | {"split": 4})
    assert outcome.clean.shape == outcome.stamped.shape == (3, 8, 8, 1)
    assert (outcome.labels == 5).all() and (outcome.targets == 7).all()
    plus = {(1, 2), (2, 2), (3, 2), (2, 1), (2, 3)}
    assert changed_anywhere(outcome.clean, outcome.stamped) <= plus
    assert list(outcome.parts) == [(0, 4), (1,), (2,), (3,)]
    union = np.max([part - outcome.clean for part in outcome.parts.values()], axis=0)
    np.testing.assert_allclose(outcome.clean + union, outcome.stamped, atol=1e-6)


def changed_anywhere(before, after):
    return {tuple(map(int, p)) for p in np.argwhere((before != after).any(axis=(0, 3)))}


@pytest.mark.parametrize("attack", ["pattern", "sample", "label_flip", "alie_backdoor"])
def test_pictures_of_any_backdoor(attack, tmp_path):
    outcome = pictures_of(attack)
    assert len(outcome.clean) == len(outcome.stamped) == (1 if attack == "sample" else 3)
    assert (outcome.parts == {}) and np.isfinite(outcome.stamped).all()
    paths = plotting.trigger_pictures(outcome, attack, tmp_path / "picture.png")
    assert all(path.stat().st_size > 1000 for path in paths)


def test_no_backdoor_no_picture():
    with pytest.raises(ConfigError, match="no backdoor to show; the attack is \\['zero'\\]"):
        pictures_of("zero")


# --- Errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pattern": "crss"}, "attack.pattern must be one of 'plus'"),
        ({"base": 3, "target": 3}, "attack.target must differ from base, .* both are 3"),
        ({"pattern": "pixels"}, "attack.pixels belongs to pattern 'pixels'"),
        ({"pixels": [[1, 1]]}, "attack.pixels belongs to pattern 'pixels'"),
        ({"pattern": "pixels", "pixels": [[1, 1], [2]]}, r"pixels\[1\] must be \[row, column\]"),
        ({"pattern": "pixels", "pixels": [[1, 1], [1, 1]]}, "must hold pixels, each once"),
        ({"pattern": "pixels", "pixels": []}, "must hold pixels, each once"),
        ({"pattern": "apple", "place": [1, 1]}, "attack.place is read by the patterns plus, squ"),
        ({"place": [1, 1]}, "give both of place and size or neither"),
        ({"place": [1], "size": 3}, r"attack.place must be \[row, column\], got \[1\]"),
        ({"place": [1, 1], "size": 4}, "size of a plus must be odd and >= 3, got 4"),
        ({"overflow": "wrap"}, "attack.overflow is read by the patterns copyright, apple only"),
        ({"parts": "author"}, "parts 'author' are 4 parts of a plus"),
        ({"split": 4}, "attack.split must be <= 3, the malicious clients, got 4"),
        ({"fraction": 0}, "attack.fraction must be > 0 and <= 1, got 0"),
        ({"value": 255}, "attack.value must be >= 0 and <= 1, got 255"),
        ({"name": "label_flip", "base": 3, "target": 3}, "must differ from base"),
        ({"name": "boost", "factor": 0}, "attack.factor must be > 0"),
    ],
)
def test_refused_before_the_data_is_read(fields, message):
    with pytest.raises(ConfigError, match=message):
        config.from_mapping(small(attack={"name": "trojan"} | fields, threat={"num_malicious": 3}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"place": [5, 0], "size": 5}, r"reaches pixel \[8, 2\] and does not fit images of 8 x 8"),
        ({"pattern": "pixels", "pixels": [[0, 8]]}, r"reaches pixel \[0, 8\] and does not fit"),
        ({"pattern": "square", "split": 2}, "attack.split must be <= 1, what the pattern can"),
        ({"target": 10}, "attack.target must be < 10, the number of classes, got 10"),
        ({"base": 11}, "attack.base must be < 10, the number of classes, got 11"),
        ({"name": "label_flip", "target": 10}, "attack.target must be < 10"),
    ],
)
def test_refused_once_the_data_is_known(fields, message):
    spec = small(attack={"name": "trojan"} | fields, threat={"num_malicious": 3})
    with pytest.raises(ConfigError, match=message):
        prepare(config.from_mapping(spec))


def test_the_middle_class_cannot_be_flipped_onto_itself():
    part = registry.attacks.build({"name": "label_flip", "base": 1})
    with pytest.raises(ConfigError, match="must differ from base"):
        part.check("attack", Setting(4, num_classes=3))
    assert part.check("attack", Setting(4, num_classes=10)) is None


def test_the_check_of_a_nested_backdoor_runs():
    attack = {"name": "alie_backdoor", "backdoor": {"name": "trojan", "base": 0}}
    with pytest.raises(ConfigError, match="attack.backdoor.target must differ from base"):
        config.from_mapping(small(attack=attack, threat={"num_malicious": 2}))


def test_a_class_that_no_malicious_client_holds_is_refused():
    spec = small(
        data={"num_clients": 43},
        client={"name": "sgd", "steps": 1, "batch_size": 1},
        threat={"num_malicious": 1},
    )
    refused = 0
    for base in range(10):
        one = config.from_mapping(spec, {"attack": {"name": "label_flip", "base": base}})
        try:
            prepare(one)
        except ConfigError as error:
            assert f"no malicious client holds an example of base class {base}" in str(error)
            refused += 1
    assert refused == 9  # its only example is of one class
    spec["data"] |= {"max_test": 1}
    with pytest.raises(ConfigError, match="has no test example of base class"):
        for base in (0, 1):
            attack = {"name": "label_flip", "base": base}
            prepare(config.from_mapping(spec, {"attack": attack}))


def test_evaluation_backdoor_must_be_an_attack_on_data():
    with pytest.raises(ConfigError, match="evaluation.backdoor must be an attack on data"):
        config.from_mapping(small(), {"evaluation.backdoor": "zero"})


# --- A trigger that the network does not see ----------------------------------------------------


def with_trigger(pixels, model="fltrust_cnn"):
    backdoor = {"name": "trojan", "pattern": "pixels", "pixels": pixels, "target": 0}
    return config.from_mapping(
        {
            "data": {"name": "mnist", "num_clients": 4},
            "model": model,
            "attack": {"name": "scaling", "backdoor": backdoor},
            "threat": {"num_malicious": 1},
        }
    )


def blank_source():
    x, y = np.zeros((4, 28, 28, 1), np.uint8), np.zeros(4, np.int32)
    return Source("mnist", x, y, x, y, 10, 255.0, (0.0,), (1.0,), (4, 4), "nowhere")


def pixels_of(experiment):
    source, setting = blank_source(), experiment.setting()
    network = network_of(experiment, source)
    task = bound_task(experiment, source, network, classification(), setting)
    return checks.trigger_pixels(experiment, source, task, setting)


def test_the_pixels_of_a_trigger_that_the_network_sees_are_counted():
    # Table II: 28 -> 26 -> 13 -> 11 -> 5, which needs 10 of the 11, 12 of the 13, 24 of the 26.
    known = np.zeros((28, 28), bool)
    known[:26, :26] = True
    built = registry.models.build("fltrust_cnn")
    np.testing.assert_array_equal(checks._seen_pixels(built, (28, 28, 1), 10), known)
    for pixels, expected in ((CORNER["pixels"], (1, 4)), ([[24, 24], [25, 25]], (2, 2))):
        outcome = pixels_of(with_trigger(pixels))
        assert outcome == expected
    assert pixels_of(with_trigger([[27, 27]], "mlp")) is None
    with pytest.raises(ConfigError, match="sees none of the 2 pixels of 'trojan'"):
        experiment = with_trigger([[26, 3], [3, 27]])
        checks.check_trigger(experiment, pixels_of(experiment))


def test_a_run_refuses_an_unseen_trigger_and_warns_of_a_part(monkeypatch):
    seen = np.ones((8, 8), bool)
    monkeypatch.setattr(checks, "_seen_pixels", lambda *_: seen)
    attack = {"name": "pattern", "size": 2}
    given = small(model="small_cnn", attack=attack, threat={"num_malicious": 1}, rounds=1)
    prepare(config.from_mapping(given))
    seen[0, 0] = False
    assert "sees 3 of the 4 pixels" in fedjax_sec.run(given).summary["warnings"][-1]
    seen[:2, :2] = False
    with pytest.raises(ConfigError, match="none of the 4 pixels"):
        prepare(config.from_mapping(given))


# --- Attacks that would poison nothing ----------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "label_flip", "fraction": 0.1},
        {"name": "trojan", "fraction": 0.1},
        {"name": "feature_trigger", "fraction": 0.1},
        {"name": "pattern", "fraction": 1e-6},
        {"name": "scaling", "backdoor": {"name": "pattern", "fraction": 1e-6}},
        {
            "name": "label_flip",
            "fraction": {"schedule": "steps", "values": {0: 0.01, 2: 0.1}},
        },
    ],
)
def test_a_share_of_less_than_one_example_is_refused(spec):
    """Of 9 examples a tenth is none; before anything is written or compiled."""
    one = config.from_mapping(small(attack=spec, threat={"num_malicious": 2}))
    with pytest.raises(ConfigError, match="would poison nothing: .* none of them has more than 9"):
        prepare(one)


def test_a_share_of_one_example_in_some_round_is_enough():
    later = {"schedule": "steps", "values": {0: 0.1, 2: 0.12}}  # 1.08 of 9 examples
    spec = {"name": "label_flip", "fraction": later}
    prepare(config.from_mapping(small(attack=spec, threat={"num_malicious": 5})))


def test_a_pattern_s_class_must_exist():
    one = small(attack={"name": "pattern", "target": 10}, threat={"num_malicious": 2})
    with pytest.raises(ConfigError, match="attack.target must be < 10, the number of classes, got"):
        prepare(config.from_mapping(one))

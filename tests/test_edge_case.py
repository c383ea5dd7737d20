"""Edge cases: their images, who may hold them, and the attack against a version in NumPy."""

import os
import pickle
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small, tiny_mlp

import fedjax_sec
from fedjax_sec.core import (
    AttackerView,
    Auxiliary,
    ConfigError,
    Message,
    Setting,
    check_components,
    registry,
)
from fedjax_sec.data import MissingDataError, Source, checked
from fedjax_sec.data.sources import _edge_cases, _rotated, ardis, southwest
from fedjax_sec.data.sources._edge_cases import read_pickle
from fedjax_sec.evaluation.metrics import backdoor_metrics
from fedjax_sec.runs import config
from fedjax_sec.runs import source as source_lib
from fedjax_sec.runs.prepare import make_population, prepare
from fedjax_sec.runs.source import load_auxiliary, load_source
from fedjax_sec.testing.worlds import world

DATA = os.environ.get("FEDJAX_SEC_TEST_DATA")
with_data = pytest.mark.skipif(DATA is None, reason="FEDJAX_SEC_TEST_DATA is not set")


def load(spec, folder=None):
    component = registry.datasets.build(spec)
    folder = Path(DATA) / "tfds" if folder is None else folder
    return checked(component.load(str(folder), download=False), component.registered_name)


# --- The images, where the files are there --------------------------------------------------------


@pytest.mark.data
@with_data
def test_southwest():
    source = load("southwest")
    assert source.sizes == (784, 196) and not source.is_subset
    assert set(source.y_train) == set(source.y_test) == {0}
    for x in (source.x_train, source.x_test):  # each picture and its rotations
        for i in range(0, len(x), 4):
            for quarter in range(1, 4):
                np.testing.assert_array_equal(x[i + quarter], np.rot90(x[i], quarter))


@pytest.mark.data
@with_data
def test_ardis():
    source = load("ardis")
    assert np.bincount(source.y_train).tolist() == [660] * 10
    assert np.bincount(source.y_test).tolist() == [100] * 10
    assert source.x_train.shape[1:] == (28, 28, 1) and source.x_train.dtype == np.uint8
    assert source.x_train.mean() < 80  # light on dark


@pytest.mark.data
@with_data
@pytest.mark.slow
def test_the_tables_of_ardis_are_the_files_that_a_download_must_be():
    """The published CSV files, written anew from our copy, have the digests that are asked for."""
    import hashlib

    table = Path(DATA) / "raw" / "edge_cases" / ardis.TABLE
    shapes = {"x_train": (6600, 28, 28), "x_test": (1000, 28, 28), "y_train": (6600,)}
    arrays = _edge_cases.read_table(table, shapes | {"y_test": (1000,)})
    numbers = [b"%.10f" % value for value in range(256)]
    for part in ("train", "test"):
        rows = arrays[f"x_{part}"].reshape(-1, 784)
        text = b"".join(b" ".join([numbers[v] for v in row]) + b"\r\n" for row in rows)
        assert hashlib.sha256(text).hexdigest() == ardis.TABLES[f"ARDIS_{part}_2828.csv"]
        hot = np.eye(10, dtype=int)[arrays[f"y_{part}"]]
        lines = [" ".join(f"{v:10d}" for v in row) + "\r\n" for row in hot]
        digest = hashlib.sha256("".join(lines).encode()).hexdigest()
        assert digest == ardis.TABLES[f"ARDIS_{part}_labels.csv"]


@pytest.mark.data
@with_data
@pytest.mark.parametrize(
    ("feature", "sizes"), [("wall", (7, 5)), ("green", (23, 7)), ("racing", (17, 5))]
)
def test_semantic_images_are_cifar10_s_own(feature, sizes):
    source = load({"name": "cifar10_semantic", "feature": feature})
    assert source.sizes == sizes and source.taken_from == "cifar10"
    assert set(source.y_train) == set(source.y_test) == {1}
    ids = np.concatenate([source.ids_train, source.ids_test])
    assert len(set(ids.tolist())) == sum(sizes)
    cifar, compared = load("cifar10"), 0
    images = np.concatenate([source.x_train, source.x_test]).astype(float)
    for number, image in zip(ids, images, strict=True):
        for place in np.flatnonzero(cifar.ids_train == number):
            assert cifar.y_train[place] == 1
            error = np.mean((cifar.x_train[place] - image) ** 2)
            assert 10 * np.log10(255**2 / error) > 22  # the copy at hand is compressed
            compared += 1
    assert compared >= 3


@pytest.mark.data
@with_data
def test_semantic_images_are_withheld_from_everybody():
    spec = {
        "data": {"name": "cifar10", "data_dir": f"{DATA}/tfds", "num_clients": 10},
        "server": {"root": {"size": 3000}},
        "threat": {"num_malicious": 1},
        "rounds": 1,
    }
    backdoor = {"name": "edge_images", "source": "cifar10_semantic", "target": 2, "size": None}
    attacked = spec | {"attack": {"name": "edge_case", "backdoor": backdoor}}
    source = load_source(config.from_mapping(spec))
    there = {330, 568, 3934}
    for one, expected in ((spec, there), (attacked, set())):
        population, unused = make_population(config.from_mapping(one), source)
        mask = np.arange(population.index.shape[1]) < population.counts[:, None]
        held = np.concatenate([population.index[mask], population.root])
        assert len(set(held.tolist())) == len(held) == 10_000 - unused.total
        assert set(source.ids_train[held].tolist()) & there == expected
        assert unused == (0 if one is spec else 3, 0)


# --- Without the files ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("southwest", "Put southwest_images_new_train.pkl and .*ksreenivasan"),
        ("ardis", "Put ARDIS_train_2828.csv, .*ARDIS_DATASET_IV.rar"),
        ("cifar10_semantic", "Put cifar10_semantic.npz.xz there, or all of CIFAR-10"),
        ("mnist_rotated_sevens", "needs MNIST. Data set 'mnist' is not in"),
    ],
)
def test_missing_files_say_how_to_get_them(tmp_path, name, words):
    with pytest.raises(MissingDataError, match=words):
        load(name, tmp_path / "tfds")


def pickled(array):
    """As Python 3.6 and NumPy 1 wrote it."""
    return pickle.dumps(array, protocol=3).replace(b"numpy._core.", b"numpy.core.")


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_the_authors_pickles_are_read_and_nothing_else_in_them(tmp_path, monkeypatch):
    folder = tmp_path / "edge_cases" / "saved_datasets"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 256, (n, 32, 32, 3), np.uint8) for n in southwest.SIZES]
    for name, x in zip(southwest.PICKLES, parts, strict=True):
        (folder / name).write_bytes(pickled(x))
    source = load("southwest", tmp_path)
    np.testing.assert_array_equal(source.x_train, parts[0])
    np.testing.assert_array_equal(source.x_test, parts[1])
    monkeypatch.chdir(tmp_path)
    for bad in (Evil(), [parts[1]], parts[1].astype(np.float32), np.array([Evil()], object)):
        path = folder / "southwest_images_new_test.pkl"
        path.write_bytes(pickled(bad))
        with pytest.raises(pickle.UnpicklingError):
            read_pickle(path)
        with pytest.raises(MissingDataError, match="UnpicklingError"):
            load("southwest", tmp_path)
    assert not (tmp_path / "pwned").exists()


def test_the_tables_of_ardis_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDJAX_SEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ardis, "SIZES", (20, 10))
    monkeypatch.setattr(ardis.Ardis, "official_sizes", (20, 10))
    folder = tmp_path / "edge_cases" / "ARDIS"
    folder.mkdir(parents=True)
    rng, parts = np.random.default_rng(0), {}
    for part, count in (("train", 20), ("test", 10)):
        x, y = rng.integers(0, 256, (count, 784)), np.arange(count) % 10
        np.savetxt(folder / f"ARDIS_{part}_2828.csv", x, fmt="%.10f", newline="\r\n")
        np.savetxt(folder / f"ARDIS_{part}_labels.csv", np.eye(10)[y], fmt="%10d")
        parts[part] = x, y
    for _ in range(2):  # the second time from the cache
        source = load("ardis", tmp_path)
        np.testing.assert_array_equal(source.x_train.reshape(20, 784), parts["train"][0])
        np.testing.assert_array_equal(source.y_test, parts["test"][1])
    table = folder / "ARDIS_test_labels.csv"
    table.write_text(table.read_text().replace("1", "2"))
    with pytest.raises(MissingDataError, match="its labels are not one-hot"):
        load("ardis", tmp_path)


@pytest.mark.parametrize("name", ["southwest", "ardis"])
def test_downloads_ask_for_the_digests(tmp_path, monkeypatch, name):
    """The files come from a fixed commit, are checked, and go where they are looked for."""
    asked = []

    def fetch(url, sha256, target):
        asked.append((url, sha256, target))
        raise OSError("no network")

    monkeypatch.setattr(_edge_cases, "fetch", fetch)
    module = {"southwest": southwest, "ardis": ardis}[name]
    digests = module.PICKLES if name == "southwest" else module.TABLES
    component = registry.datasets.build(name)
    with pytest.raises(MissingDataError, match="no network"):
        component.load(str(tmp_path), download=True)
    first = next(iter(digests))
    assert asked == [(module.URL + first, digests[first], tmp_path / "edge_cases" / first)]
    assert all(len(bytes.fromhex(one)) == 32 for one in digests.values())
    assert len(module.URL.split("/")[5]) == 40  # a commit, not a branch


def test_an_npz_file_brings_images_of_one_class(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).integers(0, 17, (12, 8, 8, 1), np.uint8)
    y = np.full(12, 3)
    arrays = {"x_train": x, "y_train": y, "x_test": x[:4], "y_test": y[:4], "scale": 16.0}
    np.savez("mine.npz", **arrays, all_classes=False)
    source = {"name": "npz", "path": "mine.npz"}
    spec = small(
        threat={"num_malicious": 1},
        attack={"name": "edge_case", "backdoor": edge(source=source, size=None)},
    )
    experiment = config.from_mapping(spec)
    named = experiment.to_dict()["attack"]["backdoor"]["source"]
    assert named["path"] == str(tmp_path / "mine.npz") and len(named["digest"]) == 16
    examples = prepare(experiment).pool.auxiliary[0]
    np.testing.assert_array_equal(examples.x_train, x)
    np.savez("mine.npz", **arrays)
    with pytest.raises(ConfigError, match="class 0 has no example"):
        prepare(config.from_mapping(spec))


# --- Stand-ins ------------------------------------------------------------------------------------


def test_rotations():
    images = np.random.default_rng(0).integers(0, 256, (3, 7, 7, 2), np.uint8)
    np.testing.assert_array_equal(_rotated.rotated(images, 0.0), images)
    for quarter in range(1, 4):
        turned = np.rot90(images, quarter, axes=(1, 2))
        np.testing.assert_array_equal(_rotated.rotated(images, 90.0 * quarter), turned)
    angle, out = np.deg2rad(30.0), np.zeros(images.shape)
    for row in range(7):
        for column in range(7):
            y, x = row - 3, column - 3
            r = np.cos(angle) * y + np.sin(angle) * x + 3
            c = -np.sin(angle) * y + np.cos(angle) * x + 3
            for i in range(7):
                for j in range(7):
                    share = max(0, 1 - abs(r - i)) * max(0, 1 - abs(c - j))
                    out[:, row, column] += share * images[:, i, j]
    assert np.abs(_rotated.rotated(images, 30.0).astype(float) - out).max() <= 0.5 + 1e-6


def test_rotated_sevens_are_the_sevens_of_the_same_part():
    digits, sevens = load("digits", "."), load("digits_rotated_sevens", ".")
    for part in ("train", "test"):
        x = getattr(digits, f"x_{part}")[getattr(digits, f"y_{part}") == 7]
        np.testing.assert_array_equal(getattr(sevens, f"x_{part}"), _rotated.rotated(x, 45.0))
    assert sevens.name == "digits_rotated_sevens" and "rotated by 45" in sevens.origin


@pytest.mark.data
@with_data
def test_mnist_s_rotated_sevens_are_thickened():
    thick, thin = (
        load("mnist_rotated_sevens"),
        load({"name": "mnist_rotated_sevens", "thick": False}),
    )
    assert thick.sizes == thin.sizes == (6265, 1028)
    assert thick.x_train.mean() > 1.2 * thin.x_train.mean()


# --- The attack on data ---------------------------------------------------------------------------


def edge(**fields):
    return {"name": "edge_images"} | fields


def numbered(count=60, shape=(4, 4, 1), name="mine"):
    """A data set that numbers its examples from the last to the first."""
    rng = np.random.default_rng(3)
    x, y = rng.integers(0, 256, (count, *shape), np.uint8), np.arange(count, dtype=np.int32) % 3
    ids = np.arange(count, dtype=np.int32)[::-1].copy()
    sizes = (count, 12)
    numbers = dict(num_classes=3, scale=255.0, mean=(0.5,), std=(0.5,), official_sizes=sizes)
    return Source(name, x, y, x[:12], y[:12], origin="here", ids_train=ids, **numbers)


@pytest.fixture
def sources(monkeypatch):
    """`digits` are 60 images of three classes, and `digits_rotated_sevens` 6 and 4 of these."""
    ours = numbered(name="digits")
    taken, tested = np.array([3, 8, 20, 21, 40, 59]), np.array([0, 5, 33, 50])

    def at(ids):
        return np.array([ours.ids_train.tolist().index(number) for number in ids])

    given = ours._replace(
        name="digits_rotated_sevens",
        x_train=ours.x_train[at(taken)],
        y_train=np.array([0, 1, 2, 0, 1, 2], np.int32),
        x_test=ours.x_test[:4],
        y_test=np.array([1, 0, 2, 0], np.int32),
        ids_train=taken.astype(np.int32),
        ids_test=tested.astype(np.int32),
        taken_from="digits",
    )
    known = {"digits": ours, "digits_rotated_sevens": given}
    monkeypatch.setattr(source_lib, "_load", lambda dataset, *_: known[dataset.registered_name])
    return known


def tiny(**changes):
    changes = {
        "data": {"num_clients": 3, "max_train": None},
        "threat": {"num_malicious": 1},
    } | changes
    spec = small(**changes)
    return spec | {"client": spec["client"] | {"batch_size": 4}}


def test_what_is_withheld_is_known_by_its_number(sources):
    ours, given = sources["digits"], sources["digits_rotated_sevens"]
    lost = {*given.ids_train.tolist(), *given.ids_test.tolist()}
    for where in ({"attack": edge(size=2)}, {"evaluation": {"backdoor": edge(size=2)}}):
        experiment = config.from_mapping(tiny(server={"root": {"size": 30}}, **where))
        population, unused = make_population(experiment, ours)
        mask = np.arange(population.index.shape[1]) < population.counts[:, None]
        held = np.concatenate([population.index[mask], population.root])
        assert set(ours.ids_train[held].tolist()) == set(range(60)) - lost and unused == (10, 0)
    sources["digits"] = ours._replace(ids_train=None)
    with pytest.raises(ConfigError, match="does not number its examples"):
        make_population(experiment, sources["digits"])
    sources["digits_rotated_sevens"] = given._replace(taken_from="other")
    population, unused = make_population(experiment, sources["digits"])
    assert unused == (0, 0)


def test_images_are_stored_as_the_data_set_s(sources):
    sources["digits"] = sources["digits"]._replace(scale=255.0)
    given = sources["digits_rotated_sevens"]
    sources["digits_rotated_sevens"] = given._replace(
        x_train=given.x_train.astype(np.float32) / 510,
        x_test=given.x_test / np.float32(510),
        scale=0.5,
    )
    experiment = config.from_mapping(tiny(attack=edge(size=2, label=2)))
    (stored,) = load_auxiliary(experiment, sources["digits"]).values()
    assert stored.x_train.dtype == np.uint8
    np.testing.assert_array_equal(stored.x_train, given.x_train[given.y_train == 2])
    np.testing.assert_array_equal(stored.y_test, [2])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 7}, "attack.size must be <= 6, the training images of 'digits_rotated_sevens'"),
        ({"size": 3, "label": 1, "target": 0}, "size must be <= 2, .* of class 1, got 3"),
        ({"size": 2, "label": 9}, "has no train example of class 9; it has 0, 1, 2"),
        ({"size": 2, "target": 3}, "target must be < 3, the number of classes"),
        ({"size": 2, "label": 1}, "target must differ from label"),
        ({"size": 2, "source": "digits"}, "digits.* are pixels of shape"),
    ],
)
def test_refused_images(sources, fields, message):
    if fields.get("source") == "digits":
        sources["digits_rotated_sevens"] = sources["digits"]
        wide = numbered(shape=(5, 4, 1), name="digits")
        fields = {"size": 2}
        sources["digits_rotated_sevens"] = wide
    with pytest.raises(ConfigError, match=message):
        prepare(config.from_mapping(tiny(attack=edge(**fields))))


def test_a_target_that_is_the_images_own_class(sources):
    given = sources["digits_rotated_sevens"]
    sources["digits_rotated_sevens"] = given._replace(y_test=np.ones_like(given.y_test))
    with pytest.raises(ConfigError, match="target 1 is the true class of all test images"):
        prepare(config.from_mapping(tiny(attack=edge(size=2))))


def tiny_edge(**fields):
    return registry.attacks.build(edge(size=4) | fields)


def auxiliary():
    return world().task.auxiliary(None)


def test_the_images_are_drawn_once():
    part, place = tiny_edge(), world()
    state = part.init(place.setting, place.task)
    view = AttackerView(*[None] * 5, task=place.task)
    prepared = [part.prepare(jax.random.key(seed), state, view) for seed in range(20)]
    again = part.prepare(jax.random.key(99), prepared[0], view)
    np.testing.assert_array_equal(again["rows"], prepared[0]["rows"])
    rows = np.array([one["rows"] for one in prepared])
    assert all(len(set(row)) == 4 for row in rows.tolist()) and len({*map(tuple, rows)}) > 10
    assert set(rows.ravel()) == set(range(6))
    for fixed in (tiny_edge(selection="first"), tiny_edge(size=None)):
        state = fixed.prepare(jax.random.key(5), fixed.init(place.setting, place.task), view)
        assert state["rows"].tolist() == list(range(fixed.size or 6))


@pytest.mark.parametrize("invert", [False, True])
def test_examples_and_probes(invert):
    part, place = tiny_edge(invert=invert, target=2), world()
    state = part.init(place.setting, place.task) | {"rows": jnp.array([5, 0, 2, 3])}
    view = AttackerView(*[None] * 5, task=place.task)
    x, target = part.examples(jax.random.key(0), state, view)
    stored = np.asarray(auxiliary().x_train)[[5, 0, 2, 3]] / 255
    np.testing.assert_allclose(x, 1 - stored if invert else stored, atol=1e-6)
    assert target.tolist() == [2] * 4
    tests, labels = place.sample(jax.random.key(1), 7)
    x, target, include = part.probes(state, tests, labels, place.task)
    stored = np.asarray(auxiliary().x_test) / 255
    np.testing.assert_allclose(x, 1 - stored if invert else stored, atol=1e-6)
    np.testing.assert_array_equal(include, np.asarray(auxiliary().y_test) != 2)
    assert target.tolist() == [2] * 3


def test_as_many_tests_as_probes_are_not_taken_for_their_labels():
    part, place = tiny_edge(target=2), world()
    examples = Auxiliary(*place.task.auxiliary(None))._replace(y_test=jnp.array([0, 0, 0]))
    task = place.task._replace(auxiliary=lambda *_: examples)
    x, params = place.pool.x[:3], place.params()
    args = params, x, jnp.array([2, 2, 2]), task, part, part.init(place.setting, task)
    metrics = backdoor_metrics(*args, batch_size=3, exclude_target=True)
    answers = jnp.argmax(task.outputs(params, task.inputs.decode(examples.x_test)), axis=1)
    assert float(metrics["attack_success_rate"]) == pytest.approx(np.mean(answers == 2))
    assert float(metrics["backdoor_loss"]) > 0


def test_poisoned_examples_become_images_by_their_pixels():
    part, place = tiny_edge(), world()
    state = part.init(place.setting, place.task)
    x, y = place.sample(jax.random.key(0), 40)
    poisoned, labels = part.poison(jax.random.key(1), state, x, y, 0, place.task)
    images = np.asarray(auxiliary().x_train)[:4] / 255
    which = [
        np.abs(images - one[None]).max(axis=(1, 2, 3)).argmin() for one in np.asarray(poisoned)
    ]
    np.testing.assert_allclose(poisoned, images[which], atol=1e-6)
    assert set(labels.tolist()) == {1} and set(which) == {0, 1, 2, 3}
    bits = np.asarray(x).reshape(40, -1).view(np.uint32)
    for one, image in zip(bits, which, strict=True):
        mixed = sum(int(bit) * (2 * i + 1) for i, bit in enumerate(one)) % 2**32
        assert (mixed * 2654435761 % 2**32 >> 8) % 4 == image
    chosen = part.choose(jax.random.key(2), y, jnp.arange(40) < 30)
    assert chosen.sum() == 6 and not chosen[30:].any()


# --- The attack on updates ------------------------------------------------------------------------

BAD = np.array([False, True, False, False])
CLEAN = 9


def attack(**fields):
    """Four images and nine clean ones in batches of three; a step that leaves the small ball."""
    base = {"name": "edge_case", "backdoor": edge(size=4), "num_clean": CLEAN, "batch_size": 3}
    base |= {"learning_rate": 0.3, "eps": 0.05, "project_frequency": 2}
    return registry.attacks.build(base | fields)


def first(key, num):
    place = world()
    return place.task.inputs.decode(place.pool.x[:num]), place.pool.y[:num]


def view_of(malicious=BAD, weights=(1.0,) * 4, rate=1.0, sample=first):
    place, bad = world(), jnp.asarray(malicious)
    memory = lambda part: part.init(place.setting, place.task)  # noqa: E731
    return AttackerView(
        bad,
        bad,
        place.params(),
        jnp.arange(4),
        jnp.array(0),
        place.task,
        sample,
        weights=jnp.asarray(weights),
        server_rate=jnp.float32(rate),
        memory=memory,
    )


@jax.jit
def run(part, malicious, weights, rate, key, state):
    updates = jnp.zeros((4, world().task.dim))
    message = Message(updates, weights)
    return part.tamper(key, message, state, view_of(malicious, weights, rate))


def crafted(part, malicious=BAD, weights=(1.0,) * 4, rate=1.0, seed=0, state=None):
    """(messages, state)."""
    state = part.init(7, world().task.dim) if state is None else state
    args = jnp.asarray(malicious), jnp.asarray(weights), jnp.float32(rate)
    message, state, _ = run(part, *args, jax.random.key(seed), state)
    return message, state


def trained(part, key):
    """Delta [D] by plain loops in float64; the order of the examples is drawn as the attack's."""
    net, start = tiny_mlp(), np.asarray(world().params(), np.float64)
    clean_x, clean_y = map(np.asarray, first(None, part.num_clean))
    edge_x = np.asarray(auxiliary().x_train)[:4] / 255
    x = np.concatenate([edge_x, clean_x])
    y = np.concatenate([np.full(4, part.backdoor.target), clean_y])
    params, velocity = start.copy(), np.zeros_like(start)
    lengths = []
    for epoch in range(part.epochs):
        epoch_key = jax.random.fold_in(key, epoch)
        order = np.asarray(jax.random.permutation(jax.random.fold_in(epoch_key, 0), len(y)))
        batches = [order[i : i + part.batch_size] for i in range(0, len(y), part.batch_size)]
        assert len(batches[-1]) == 1  # a smaller last batch
        for number, rows in enumerate(batches):
            velocity = part.momentum * velocity + net.gradient(params, x[rows], y[rows])
            velocity += part.weight_decay * params
            params = params - part.learning_rate * velocity
            if part.mode != "black_box" and (
                number % part.project_frequency == 0 or number == len(batches) - 1
            ):
                length = np.linalg.norm(params - start)
                lengths.append(length)
                if length > part.eps:
                    params = start + part.eps * (params - start) / length
    return params - start, lengths


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"weight_decay": 0.1, "momentum": 0.5, "epochs": 1},
        {"mode": "pgd"},
        {"mode": "pgd", "project_frequency": 1},
        {"mode": "pgd", "eps": 10.0},
        {"mode": "pgd_replacement", "reports": "own"},
    ],
)
def test_training_and_projection(fields):
    part = attack(**fields)
    expected, lengths = trained(part, jax.random.key(0))
    factor = 4.0 if part.mode == "pgd_replacement" else 1.0
    message, _ = crafted(part)
    np.testing.assert_allclose(
        message.vector[1], factor * expected, rtol=2e-3, atol=1e-4 * np.abs(expected).max()
    )
    if part.mode == "black_box":
        assert np.linalg.norm(expected) > 0.2
    elif part.eps < 1:
        assert min(lengths) > part.eps  # every projection acts
        assert np.linalg.norm(message.vector[1]) == pytest.approx(factor * part.eps, rel=1e-5)
    else:
        assert max(lengths) < part.eps


@pytest.mark.parametrize(
    ("fields", "view", "factor", "weights"),
    [
        ({}, {}, (3 + 13) / 13, [1, 13, 1, 1]),
        ({"reports": "own"}, {"weights": [2.0, 3.0, 4.0, 6.0]}, 5.0, [2, 3, 4, 6]),
        ({}, {"weights": [2.0, 3.0, 4.0, 6.0]}, (12 + 13) / 13, [2, 13, 4, 6]),
        ({}, {"weights": [2.0, 3.0, 4.0, 6.0], "rate": 0.5}, 2 * (12 + 13) / 13, [2, 13, 4, 6]),
        ({}, {"malicious": [True, True, False, False]}, (2 + 26) / 26, [13, 13, 1, 1]),
        ({}, {"malicious": [False] * 4}, None, [1, 1, 1, 1]),
    ],
)
def test_replacement_and_reported_examples(fields, view, factor, weights):
    message, _ = crafted(attack(mode="pgd_replacement", **fields), **view)
    np.testing.assert_array_equal(message.weight, weights)
    bad = np.flatnonzero(view.get("malicious", BAD))
    if factor is None:
        assert not np.asarray(message.vector).any()
        return
    lengths = np.linalg.norm(np.asarray(message.vector)[bad], axis=1)
    np.testing.assert_allclose(lengths, 0.05 * factor, rtol=1e-5)
    # In the server's weighted mean the malicious clients' own update is what the model moves by.
    rate, stack = view.get("rate", 1.0), np.zeros((4, message.vector.shape[1]))
    stack[bad] = np.asarray(message.vector)[bad]
    moved = rate * np.asarray(fedjax_sec.aggregate(stack, "mean", weights=jnp.asarray(weights)))
    assert np.linalg.norm(moved) == pytest.approx(0.05, rel=1e-4)


def test_the_set_is_drawn_once():
    part = attack(epochs=1, alike=True)
    _, state = crafted(part, seed=0)
    _, later = crafted(part, seed=1, state=state)
    _, other = crafted(part, seed=1)
    np.testing.assert_array_equal(later["key"], state["key"])
    assert (np.asarray(other["key"]) != np.asarray(state["key"])).any()
    place, sets = world(), []
    for drawn in (state, later, other):
        view = view_of(sample=place.sample)
        sets.append(np.asarray(part._set(jax.random.wrap_key_data(drawn["key"]), view)[0]))
    np.testing.assert_array_equal(sets[0], sets[1])
    assert np.abs(sets[0] - sets[2]).max() > 0 and sets[0].shape[0] == 4 + CLEAN


def test_each_malicious_client_may_train_for_itself():
    two = [False, True, True, False]
    for alike in (True, False):
        rows = np.asarray(crafted(attack(alike=alike), two)[0].vector)
        assert np.abs(rows[1:3]).max(axis=1).min() > 0.01
        assert (np.abs(rows[1] - rows[2]).max() > 1e-4) == (not alike)
    alone, _ = trained(attack(), jax.random.fold_in(jax.random.key(0), 2))
    np.testing.assert_allclose(rows[2], alone, rtol=2e-3, atol=1e-4 * np.abs(alone).max())
    assert not rows[[0, 3]].any()  # no work for honest clients


def test_without_clean_examples():
    part = attack(num_clean=0, epochs=1, batch_size=4)
    x, y = part._set(jax.random.key(0), view_of())
    assert x.shape[0] == y.shape[0] == 4
    assert np.abs(crafted(part)[0].vector[1]).max() > 0.01


@pytest.mark.parametrize("field", ["eps", "project_frequency"])
def test_black_box_refuses_what_only_projection_reads(field):
    plain = registry.attacks.build({"name": "edge_case", field: 3})
    with pytest.raises(ConfigError, match=f"attack.{field} is not read by mode 'black_box', got 3"):
        check_components((plain,), "attack", Setting(4, 1))
    pgd = registry.attacks.build({"name": "edge_case", "mode": "pgd", field: 3})
    check_components((pgd,), "attack", Setting(4, 1))


def test_refused_settings():
    with pytest.raises(ConfigError, match="backdoor must be an attack on data"):
        check_components((attack(backdoor="sign_flip"),), "attack", Setting(4, 1))
    adam = {"optimizer": {"name": "adam", "learning_rate": 0.1}}
    spec = small(threat={"num_malicious": 1}, server=adam)
    config.from_mapping(spec | {"attack": {"name": "edge_case", "mode": "pgd"}})
    with pytest.raises(ConfigError, match="needs a server whose step is a rate times"):
        config.from_mapping(spec | {"attack": {"name": "edge_case", "mode": "pgd_replacement"}})


# --- Runs -----------------------------------------------------------------------------------------


def quick(**changes):
    """Twelve clients, four a round, on the embedded digits and their rotated sevens."""
    spec = {
        "data": {"num_clients": 12},
        "client": {
            "steps": 4,
            "batch_size": 16,
            "optimizer": {"name": "sgd", "learning_rate": 0.2},
        },
        "server": {"clients_per_round": 4},
        "attack": {"name": "edge_case", "learning_rate": 0.1, "num_clean": 60},
        "evaluation": {"every": 5, "diagnostics": False},
        "rounds": 20,
    }
    return spec | changes


def test_attackers_at_a_fixed_frequency_and_in_a_fixed_pool():
    """One malicious client in every tenth round; or as many of a pool as chance draws."""
    frequency = {"num_malicious": 1, "per_round": 1, "every": 10}
    result = fedjax_sec.run(quick(threat=frequency))
    attacked = result.metrics["attack_rounds"]
    assert attacked[1:].tolist() == [1, 0, 1, 0]  # rounds 1 and 11 of 20
    pool = fedjax_sec.run(quick(threat={"num_malicious": 3}))
    assert 4 < pool.metrics["attack_rounds"][1:].sum() < 20
    for one in (result, pool):
        assert one.metrics["attack_success_rate"][-1] > 0.5


def test_the_backdoor_is_learned_and_the_ball_holds_it_back():
    threat = {"num_malicious": 2, "per_round": 1, "start": 10}
    rates = {}
    for name, attack in {
        "none": None,
        "black box": quick()["attack"],
        "small ball": quick()["attack"] | {"mode": "pgd", "eps": 0.02},
    }.items():
        spec = quick(threat=threat, evaluation={"every": 10, "backdoor": edge()})
        if attack is None:
            spec |= {"threat": {"num_malicious": 0}}
        result = fedjax_sec.run(spec | {"attack": attack})
        rates[name] = float(result.metrics["attack_success_rate"][-1])
        assert result.metrics["accuracy"][-1] > 0.8
    assert rates["black box"] > rates["none"] + 0.3
    assert rates["small ball"] < rates["black box"] - 0.2

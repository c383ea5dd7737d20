"""Sources, their labels, the reader of prepared folders, its cache and its error messages."""

import importlib
import io
import json
import logging
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

import fedjax_sec
from fedjax_sec.core import ConfigError, registry
from fedjax_sec.data import MissingDataError, Source, checked, take
from fedjax_sec.data.sources import _files, _tfds
from fedjax_sec.data.sources.digits import MEAN, STD, Digits

TEST_DATA = os.environ.get("FEDJAX_SEC_TEST_DATA")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("FEDJAX_SEC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def real_data(tmp_path_factory):
    """load(name) from prepared real data, with a cache shared by the tests of this run."""
    folder = Path(TEST_DATA or "", "tfds")
    if not TEST_DATA or not folder.is_dir():
        pytest.skip("FEDJAX_SEC_TEST_DATA names no folder with tfds/ inside: no prepared data")
    pytest.importorskip("tensorflow_datasets")
    cache = tmp_path_factory.mktemp("cache")

    def load(name):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FEDJAX_SEC_CACHE", str(cache))
            if not (folder / name).is_dir():
                pytest.skip(f"{name} is not among the data of FEDJAX_SEC_TEST_DATA")
            return registry.datasets.get(name)().load(str(folder), download=False)

    return load


def toy(train=6, test=3, official=(6, 3)):
    x = np.arange((train + test) * 4, dtype=np.uint8).reshape(-1, 2, 2, 1)
    y = np.arange(train + test, dtype=np.int32) % 2
    arrays = x[:train], y[:train], x[train:], y[train:]
    return Source("toy", *arrays, 2, 255.0, (0.5,), (0.5,), official, "test")


def toy_with_users():
    users = np.array([0, 0, 1, 2, 2, 2], np.int32), np.array([0, 1, 3], np.int32)
    return toy()._replace(users_train=users[0], users_test=users[1])


def prepare(folder, truth, classes=10):
    """A folder as tfds prepares it, in record groups; `truth` maps a split to (x, y)."""
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")
    from array_record.python.array_record_module import ArrayRecordWriter
    from PIL import Image

    name, version = folder.parts[-2:]
    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=truth["train"][0].shape[1:]),
            "label": tfds.features.ClassLabel(num_classes=classes),
        }
    )
    features.save_config(folder)
    for split, (x, y) in truth.items():
        file = folder / f"{name}-{split}.array_record-00000-of-00001"
        writer = ArrayRecordWriter(str(file), "group_size:2")  # 1 would not log the message
        for image, label in zip(x, y, strict=True):
            png = io.BytesIO()
            Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(png, "png")
            png.seek(0)
            writer.write(features.serialize_example({"image": png, "label": int(label)}))
        writer.close()
    splits = [
        {
            "name": split,
            "numBytes": "1",
            "shardLengths": [str(len(y))],
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        }
        for split, (_, y) in truth.items()
    ]
    info = {"name": name, "version": version, "fileFormat": "array_record", "splits": splits}
    (folder / "dataset_info.json").write_text(json.dumps(info))


@pytest.fixture
def prepared(tmp_path):
    """5 + 3 random images of MNIST's shape."""
    rng = np.random.default_rng(0)
    truth = {}
    for split, size in (("train", 5), ("test", 3)):
        x = rng.integers(0, 256, (size, 28, 28, 1), np.uint8)
        truth[split] = x, rng.integers(0, 10, size).astype(np.int32)
    folder = tmp_path / "tfds" / "mnist" / "3.0.1"
    prepare(folder, truth)
    return folder, truth


def load_mnist(folder, **kwargs):
    return registry.datasets.get("mnist")().load(str(folder.parent.parent), **kwargs)


def assert_holds(source, truth):
    for split, (x, y) in truth.items():
        np.testing.assert_array_equal(getattr(source, f"x_{split}"), x)
        np.testing.assert_array_equal(getattr(source, f"y_{split}"), y)


def forbid_decoding(monkeypatch):
    def fail(*args):
        raise AssertionError("decoded the records although a cache was there")

    monkeypatch.setattr(_tfds, "_decode", fail)


# --- Source and take ----------------------------------------------------------------------------


def test_a_whole_source_is_called_by_its_name():
    source = toy()
    assert not source.is_subset
    assert source.describe() == {
        "name": "toy",
        "label": "toy",
        "train": 6,
        "test": 3,
        "official_train": 6,
        "official_test": 3,
        "subset": False,
    }


@pytest.mark.parametrize("official", [(7, 3), (6, 4)])
def test_a_subset_says_so(official):
    source = toy(official=official)
    assert source.is_subset and source.describe()["subset"] is True
    expected = f"toy (subset: 6 of {official[0]} train, 3 of {official[1]} test)"
    assert source.label == source.describe()["label"] == expected


def test_take_keeps_the_first_examples_and_labels_the_rest_as_missing():
    source = toy()
    part = take(source, max_train=2, max_test=1)
    assert_holds(
        part,
        {
            "train": (source.x_train[:2], source.y_train[:2]),
            "test": (source.x_test[:1], source.y_test[:1]),
        },
    )
    assert part.label == "toy (subset: 2 of 6 train, 1 of 3 test)"
    assert_holds(
        take(source),
        {"train": (source.x_train, source.y_train), "test": (source.x_test, source.y_test)},
    )
    assert not take(source, max_train=6).is_subset


def test_take_keeps_the_users_of_what_it_keeps():
    part = take(toy_with_users(), max_train=4, max_test=2)
    assert part.users_train.tolist() == [0, 0, 1, 2] and part.users_test.tolist() == [0, 1]
    assert take(toy_with_users(), max_train=2).describe()["users"] == 1
    assert take(toy()).users_train is None and take(toy(), max_test=1).users_test is None


@pytest.mark.parametrize(
    ("field", "value", "available"), [("max_train", 0, 6), ("max_train", 7, 6), ("max_test", 4, 3)]
)
def test_take_names_the_field_the_value_and_the_range(field, value, available):
    with pytest.raises(ValueError, match=rf"{field} .*between 1 and {available}.*got {value}"):
        take(toy(), **{field: value})


# --- Sources that an experiment can use ---------------------------------------------------------


def features(**changes):
    """Six and three examples of four features, three classes."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(9, 4)).astype(np.float32)
    y = np.arange(9, dtype=np.int32) % 3
    arrays = x[:6], y[:6], x[6:], y[6:]
    source = Source("mine", *arrays, 3, 1.0, (0.0,), (1.0,), (6, 3), "a test")
    return source._replace(**changes)


Y = features().y_train
X = features().x_train


def changed(array, at, value):
    array = array.copy()
    array[at] = value
    return array


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("y_train", Y.astype(np.float64), Y),
        ("y_train", Y.astype(np.uint8), Y),
        ("y_train", Y.tolist(), Y),
        ("x_train", X.astype(np.float64), X),
        ("x_train", X.tolist(), X),
        ("users_train", [0.0, 0, 1, 1, 2, 2], np.array([0, 0, 1, 1, 2, 2], np.int32)),
        ("mean", [0.5], (0.5,)),
        ("std", np.full(4, 2.0), (2.0,) * 4),
        ("scale", np.float32(2), 2.0),
        ("official_sizes", [6, 3], (6, 3)),
    ],
)
def test_what_can_be_converted_without_loss_is(field, value, expected):
    change = {field: value} | ({"mean": (0.0,) * 4} if field == "std" else {})
    result = getattr(checked(features(**change), "mine"), field)
    np.testing.assert_array_equal(result, expected)
    assert type(result) is type(expected)
    assert getattr(result, "dtype", None) == getattr(expected, "dtype", None)


def test_whole_pixels_become_bytes():
    source = toy()
    wide = source._replace(x_train=source.x_train.astype(np.int64), x_test=source.x_test.tolist())
    result = checked(wide, "toy")
    assert result.x_train.dtype == result.x_test.dtype == np.uint8
    np.testing.assert_array_equal(result.x_train, source.x_train)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"y_train": Y[:5]}, ["y_train holds 5 labels for 6 examples"]),
        ({"y_train": Y - 1}, ["labels from -1 to 1", "relabel 0 to 2", "numpy.unique"]),
        ({"y_test": Y[3:] + 1}, ["y_test holds labels from 1 to 3", "relabel 0 to 2"]),
        ({"y_train": Y + 2 * (Y == 2)}, ["labels from 0 to 4", "or set num_classes to 5"]),
        ({"y_train": np.eye(3)[Y]}, ["shape (6, 3)", "y.argmax(axis=1) of one-hot"]),
        ({"y_train": Y[:, None]}, ["shape (6, 1)", "y.ravel()"]),
        ({"y_train": Y == 1}, ["true and false", "y.astype(numpy.int32)"]),
        ({"y_train": Y + 0.5}, ["y_train must hold whole numbers, got 0.5 for example 0"]),
        ({"y_train": changed(Y.astype(float), 4, np.nan)}, ["got nan for example 4"]),
        ({"y_train": Y.astype(np.int64) + 2**40}, ["whole numbers, got 1099511627776"]),
        ({"y_train": ["a"] * 6}, ["got text", "numpy.unique(values"]),
        ({"y_train": Y.astype(object)}, ["must hold numbers, got object"]),
        ({"y_train": [[0], [1, 2]]}, ["y_train cannot be read as an array"]),
        ({"y_train": np.ma.masked_array(Y, Y == 1)}, ["masked array"]),
        ({"x_train": changed(X, (4, 2), np.nan)}, ["in 1 of 6 examples, first in number 4"]),
        (
            {"x_test": changed(X[3:], slice(1, 3), np.inf)},
            ["x_test", "2 of 3", "first in number 1"],
        ),
        ({"x_train": X.astype(np.float64) * 1e39}, ["what float32 cannot hold in 6 of 6"]),
        ({"x_train": X.astype(str)}, ["x_train must hold numbers, got text"]),
        ({"x_train": X > 0}, ["holds bool", "x.astype(numpy.float32)"]),
        ({"x_train": X.astype(np.int64) - 9}, ["holds int64 from", "features are floats"]),
        ({"x_train": X[:, 0]}, ["features [n, F] or images [n, H, W, C], got shape (6,)"]),
        ({"x_test": X[:0], "y_test": Y[:0]}, ["x_test must hold at least one example"]),
        ({"x_test": X[3:, :3]}, ["must agree", "float32 (4,) and float32 (3,)"]),
        ({"x_test": np.ones((3, 4), np.uint8)}, ["must agree", "float32 (4,) and uint8 (4,)"]),
        ({"users_train": np.arange(5)}, ["users_train holds 5 users for 6 examples"]),
        ({"users_test": np.arange(3) - 1}, ["users_test must number users from 0, got -1"]),
        ({"mean": (np.nan,)}, ["mean must be a tuple of finite numbers"]),
        ({"mean": (0.0,) * 3}, ["one for all or one for each of 4 channels, got (0.0, 0.0, 0.0)"]),
        ({"mean": 0.0}, ["mean must be a tuple"]),
        ({"std": (0.0,)}, ["std must be a tuple of finite numbers > 0"]),
        ({"std": (1.0,) * 4}, ["mean and std must have equally many"]),
        ({"scale": 0.0}, ["scale must be a finite number > 0, got 0.0"]),
        ({"scale": np.inf}, ["scale must be a finite number > 0"]),
        ({"scale": True}, ["scale must be a finite number > 0, got True"]),
        ({"num_classes": 1}, ["num_classes must be an integer >= 2, got 1"]),
        ({"num_classes": 3.0}, ["num_classes must be an integer >= 2, got 3.0"]),
        ({"num_classes": 4}, ["class 3 has no example", "set num_classes to 3"]),
        ({"official_sizes": 6}, ["official_sizes", "such as (6, 3), got 6"]),
        ({"official_sizes": (6, None)}, ["official_sizes"]),
        ({"name": "digits"}, ["name under which it is registered", "name='digits'"]),
        ({"origin": None}, ["a text that says where it is from", "origin=None"]),
    ],
)
def test_a_source_that_cannot_be_used_is_refused(change, parts):
    with pytest.raises(ConfigError) as caught:
        checked(features(**change), "mine")
    message = str(caught.value)
    assert message.startswith("Data set 'mine': ") and "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    ("x", "scale", "parts"),
    [
        (
            np.full((9, 2, 2, 1), 200, np.uint8),
            1.0,
            ["200 to 200", "scale = 1", "(255.0 for bytes)"],
        ),
        (np.full((9, 2, 2, 1), -0.5, np.float32), 1.0, ["-0.5 to -0.5", "mean and std"]),
    ],
)
def test_images_lie_between_zero_and_scale(x, scale, parts):
    source = features(x_train=x[:6], x_test=x[6:], scale=scale)
    with pytest.raises(ConfigError) as caught:
        checked(source, "mine")
    assert all(part in str(caught.value) for part in parts), caught.value


def test_a_part_may_lack_a_class():
    source = features(num_classes=4, official_sizes=(60, 30))
    assert checked(source, "mine").num_classes == 4


def test_what_is_no_source_is_refused():
    with pytest.raises(ConfigError, match="must return a fedjax_sec.data.Source, got tuple"):
        checked((X, Y), "mine")


@pytest.fixture
def register():
    """Registers data sets for one test."""

    def add(source, qualname="Mine"):
        members = {"load": lambda self, data_dir=None, download=True: source}
        registry.datasets.register("mine")(type(qualname, (), members))

    yield add
    registry.datasets._entries.pop("mine", None)


def on_mine(**changes):
    changes = {"data": {"name": "mine", "num_clients": 2}, "model": "logistic_regression"} | changes
    return fedjax_sec.run(changes, rounds=1, **{"client.batch_size": 2})


def test_data_registered_again_is_read_again(register):
    register(features())
    first = on_mine().summary
    register(features(x_train=X[:4], y_train=Y[:4], official_sizes=(4, 3)))
    second = on_mine().summary
    assert (first["data"]["train"], second["data"]["train"]) == (6, 4)


def test_every_source_is_checked_before_anything_compiles(register):
    register(features(y_train=Y - 1))
    with pytest.raises(ConfigError, match="Data set 'mine': y_train holds labels from -1 to 1"):
        on_mine()


def test_a_class_of_the_same_name_elsewhere_replaces_nothing():
    with pytest.raises(ValueError, match="'digits' is already registered by fedjax_sec.data"):
        registry.datasets.register("digits")(type("Digits", (), {}))
    assert registry.datasets.get("digits") is Digits


def test_names_of_ours_are_taken_before_they_are_imported(tmp_path, monkeypatch):
    folder = tmp_path / "ours_for_a_test"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    text = "import {0}\n\n\n@{0}.known.register('one')\nclass One:\n    load = None\n"
    (folder / "one.py").write_text(text.format(folder.name))
    monkeypatch.syspath_prepend(tmp_path)
    # A registry enters itself as the builder of its kind; this one goes with the test.
    monkeypatch.setattr(registry, "BUILDERS", dict(registry.BUILDERS))
    ours = importlib.import_module(folder.name)
    ours.known = registry.Registry("dataset", folder.name)
    with pytest.raises(ValueError, match="'one' is already registered by ours_for_a_test.one"):
        ours.known.register("one")(type("Mine", (), {}))
    assert ours.known.names() == ("one",)


# --- The registered data sets -------------------------------------------------------------------


def test_every_data_set_is_registered_with_its_official_sizes():
    expected = {
        "mnist": (60000, 10000),
        "fashion_mnist": (60000, 10000),
        "cifar10": (50000, 10000),
        "cifar100": (50000, 10000),
        "ch_mnist": (4000, 1000),
        "digits": (1437, 360),
        "mnist_by_writer": (60000, 10000),
        "femnist_digits": (341873, 40832),
        "femnist": (671585, 77483),
    }
    result = {name: registry.datasets.get(name)().official_sizes for name in expected}
    assert result == expected


def test_digits_are_whole_disjoint_and_balanced():
    from sklearn.datasets import load_digits

    source = Digits().load()
    assert not source.is_subset and source.sizes == (1437, 360)
    assert (source.x_train.dtype, source.y_train.dtype) == (np.uint8, np.int32)
    raw = load_digits()
    together = np.concatenate([source.x_train, source.x_test]).reshape(-1, 64)
    labelled = np.column_stack([together, np.concatenate([source.y_train, source.y_test])])
    original = np.column_stack([raw.data, raw.target]).astype(int)
    assert sorted(map(tuple, labelled.tolist())) == sorted(map(tuple, original.tolist()))
    shares = np.bincount(source.y_test) / np.bincount(raw.target)
    assert np.all(np.abs(shares - 0.2) < 0.01)


def test_digits_normalisation_is_that_of_the_training_part():
    source = Digits().load()
    pixels = source.x_train / source.scale
    assert pixels.max() == 1.0
    assert source.mean == (MEAN,) and source.std == (STD,)
    np.testing.assert_allclose([MEAN, STD], [pixels.mean(), pixels.std()], atol=1e-4)


def test_digits_split_never_changes():
    # Results on digits are compared across versions: changing this list makes them incomparable.
    assert Digits().load().y_train[:10].tolist() == [8, 2, 6, 6, 7, 1, 9, 8, 5, 2]


# --- Reading prepared folders -------------------------------------------------------------------


def test_reads_what_was_prepared(prepared):
    folder, truth = prepared
    source = load_mnist(folder, download=False)
    assert_holds(source, truth)
    assert (source.x_train.dtype, source.y_train.dtype) == (np.uint8, np.int32)
    assert source.origin == "tfds mnist/3.0.1"
    assert source.label == "mnist (subset: 5 of 60000 train, 3 of 10000 test)"


def test_reading_is_quiet_but_only_about_harmless_messages(prepared, caplog, capfd):
    absl = logging.getLogger("absl")
    filters_before = list(absl.filters)
    with caplog.at_level(logging.WARNING):
        load_mnist(prepared[0])
        assert caplog.messages == []
        assert capfd.readouterr() == ("", "")  # no progress bar where there is no terminal
        with _tfds._without_harmless_messages():
            absl.error("File %s was created with group size %s. Grain requires", "f", 2)
            absl.error("Something that matters")
    assert caplog.messages == ["Something that matters"]
    assert absl.filters == filters_before


def test_second_read_comes_from_the_cache_and_is_identical(prepared, own_cache, monkeypatch):
    folder, truth = prepared
    load_mnist(folder)
    assert [p.suffix for p in own_cache.iterdir()] == [".npz"]  # and no temporary file is left
    forbid_decoding(monkeypatch)
    source = load_mnist(folder)
    assert_holds(source, truth)
    assert (source.x_train.dtype, source.y_train.dtype) == (np.uint8, np.int32)


@pytest.mark.parametrize(
    "damage", ["truncated", "garbage", "empty", "flipped", "other", "rewritten", "renamed"]
)
def test_a_damaged_cache_is_read_again_and_repaired(
    prepared, own_cache, monkeypatch, caplog, damage
):
    folder, truth = prepared
    load_mnist(folder)
    (file,) = own_cache.iterdir()
    content = file.read_bytes()
    middle = len(content) // 2
    if damage == "other":  # readable, but not our arrays
        np.savez(file, x_train=np.zeros((2, 2)))
    elif damage == "rewritten":  # a sound file of the right form, with other labels
        stored = dict(np.load(file))
        np.savez(file, **stored | {"y_train": stored["y_train"][::-1]})
    elif damage == "renamed":  # a sound file of other data
        arrays = {name: array[::-1] for name, array in dict(np.load(file)).items() if array.ndim}
        _files.store_cache(file.with_name("other.npz"), arrays)
        file.with_name("other.npz").rename(file)
    else:
        file.write_bytes(
            {
                "truncated": content[:middle],
                "garbage": b"not a cache",
                "empty": b"",
                "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            }[damage]
        )
    assert_holds(load_mnist(folder), truth)
    assert "damaged cache" in caplog.text
    forbid_decoding(monkeypatch)
    assert_holds(load_mnist(folder), truth)


def test_an_unwritable_cache_is_no_error(prepared, tmp_path, monkeypatch, caplog):
    folder, truth = prepared
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDJAX_SEC_CACHE", str(tmp_path / "file" / "cache"))  # cannot be made
    assert_holds(load_mnist(folder), truth)
    assert "FEDJAX_SEC_CACHE" in caplog.text


def test_changed_record_files_are_read_again(prepared, own_cache):
    folder, truth = prepared
    load_mnist(folder)
    record = next(folder.glob("*train.array_record*"))
    os.utime(record, (1, 1))
    assert_holds(load_mnist(folder), truth)
    assert len(list(own_cache.iterdir())) == 2


def test_the_cache_is_never_beside_the_prepared_data(prepared, own_cache):
    folder, _ = prepared
    before = sorted(folder.parent.rglob("*"))
    load_mnist(folder)
    assert sorted(folder.parent.rglob("*")) == before


def test_tfds_data_dir_is_the_default_and_an_argument_wins(prepared, tmp_path, monkeypatch):
    folder, truth = prepared
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder.parent.parent))
    mnist = registry.datasets.get("mnist")()
    assert_holds(mnist.load(), truth)
    with pytest.raises(MissingDataError):
        mnist.load(str(tmp_path / "elsewhere"), download=False)


def test_the_newest_version_is_read_and_unfinished_ones_are_not(prepared):
    folder, _ = prepared
    for version in ("3.0.0", "3.0.2.incomplete4XY", "10.0.0"):
        (folder.parent / version).mkdir()
    (folder.parent / "3.0.0" / "dataset_info.json").write_text("{}")
    (folder.parent / "3.0.2.incomplete4XY" / "dataset_info.json").write_text("{}")
    assert _tfds._prepared_folder(folder.parent.parent, "mnist") == folder
    (folder.parent / "10.0.0" / "dataset_info.json").write_text("{}")
    assert _tfds._prepared_folder(folder.parent.parent, "mnist").name == "10.0.0"


def test_histology_tiles_become_small_grey_and_are_split_once(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (10, 150, 150, 3), np.uint8)
    x[:, :75] = 40 * (np.arange(10)[:, None, None, None] // 2)  # the upper half tells which it is
    y = (np.arange(10) % 8).astype(np.int32)
    folder = tmp_path / "colorectal_histology" / "2.0.0"
    prepare(folder, {"train": (x, y)}, classes=8)
    source = registry.datasets.get("ch_mnist")().load(str(tmp_path), download=False)
    assert source.x_train.shape == (8, 64, 64, 1) and source.x_test.shape == (2, 64, 64, 1)
    assert source.label == "ch_mnist (subset: 8 of 4000 train, 2 of 1000 test)"
    assert source.origin == "tfds colorectal_histology/2.0.0"
    result = np.concatenate([source.x_train, source.x_test])
    labels = np.concatenate([source.y_train, source.y_test])
    order = np.argsort(labels * 1000 + result[:, 10, 10, 0])
    expected = np.argsort(y * 1000 + x[:, 10, 10, 0])
    np.testing.assert_array_equal(result[order, 10, 10, 0], x[expected, 10, 10, 0])
    np.testing.assert_array_equal(labels[order], y[expected])
    # Luminance, and an area's mean: noise of 2.3 x 2.3 pixels of three colours averages out.
    weights = np.array([0.299, 0.587, 0.114])
    lower = (x[expected][:, 80:] @ weights).mean((1, 2))
    np.testing.assert_allclose(result[order][:, 35:, :, 0].mean((1, 2)), lower, atol=2)
    assert result[:, 40:].std() < 0.5 * (x[:, 80:] @ weights).std()
    # The second time from the cache.
    again = registry.datasets.get("ch_mnist")().load(str(tmp_path), download=False)
    np.testing.assert_array_equal(again.x_test, source.x_test)


# --- What users read when data is missing -------------------------------------------------------


def assert_says_how_to_get(message, name, folder):
    for part in (name, str(folder), "data.data_dir", "--data-dir", "TFDS_DATA_DIR", "'digits'"):
        assert part in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100", "ch_mnist"])
def test_missing_data_says_how_to_get_it(tmp_path, name):
    with pytest.raises(MissingDataError) as caught:
        registry.datasets.get(name)().load(str(tmp_path / "none"), download=False)
    folder = {"ch_mnist": "colorectal_histology"}.get(name, name)
    assert_says_how_to_get(str(caught.value), name, tmp_path / "none" / folder)
    assert isinstance(caught.value, FileNotFoundError) and isinstance(caught.value, ValueError)


def test_without_a_network_downloading_fails_quickly(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    requests = pytest.importorskip("requests")

    def refuse(url, timeout):
        assert timeout <= 5
        raise requests.ConnectionError("no route to host")

    monkeypatch.setattr(requests, "head", refuse)
    start = time.monotonic()
    with pytest.raises(MissingDataError, match="no answer from http") as caught:
        registry.datasets.get("mnist")().load(str(tmp_path / "none"))
    assert time.monotonic() - start < 10  # tfds's own retries take minutes
    assert_says_how_to_get(str(caught.value), "mnist", tmp_path / "none" / "mnist")
    assert isinstance(caught.value.__cause__.__cause__, requests.ConnectionError)
    assert not (tmp_path / "none").exists()


def test_a_download_is_prepared_in_the_data_folder_and_read(prepared, tmp_path, monkeypatch):
    folder, truth = prepared
    requests = pytest.importorskip("requests")
    import tensorflow_datasets as tfds

    refused = requests.Response()
    refused.status_code = 405  # a server that does not answer HEAD is still a network
    monkeypatch.setattr(requests, "head", lambda url, timeout: refused)

    def prepare(builder, file_format):
        assert file_format == "array_record"
        shutil.copytree(folder, builder.data_dir)

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", prepare)
    source = registry.datasets.get("mnist")().load(str(tmp_path / "new"))
    assert_holds(source, truth)
    assert (tmp_path / "new" / "mnist" / "3.0.1").is_dir()


def test_a_failing_proxy_counts_as_no_network(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    requests = pytest.importorskip("requests")
    response = requests.Response()
    response.status_code = 502
    monkeypatch.setattr(requests, "head", lambda url, timeout: response)
    with pytest.raises(MissingDataError, match="no answer from http"):
        registry.datasets.get("cifar10")().load(str(tmp_path / "none"))


def test_an_incomplete_folder_is_named(prepared):
    folder, _ = prepared
    next(folder.glob("*test.array_record*")).unlink()
    with pytest.raises(MissingDataError, match="cannot be read") as caught:
        load_mnist(folder)
    assert str(folder) in str(caught.value) and caught.value.__cause__ is not None


def test_a_folder_in_another_format_is_named(prepared):
    folder, _ = prepared
    for file in folder.glob("*array_record*"):
        file.unlink()
    (folder / "dataset_info.json").write_text('{"fileFormat": "tfrecord"}')
    with pytest.raises(MissingDataError, match=r"'tfrecord'.*array_record"):
        load_mnist(folder)


# --- Real data ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.data
def test_real_mnist(real_data, capfd):
    source = real_data("mnist")
    assert source.label == "mnist"
    assert np.bincount(source.y_train).tolist() == [
        5923,
        6742,
        5958,
        6131,
        5842,
        5421,
        5918,
        6265,
        5851,
        5949,
    ]
    pixels = source.x_train / source.scale
    np.testing.assert_allclose([pixels.mean(), pixels.std()], [0.1307, 0.3081], atol=1e-4)
    assert capfd.readouterr().err == ""
    again = real_data("mnist")
    assert_holds(
        again, {"train": (source.x_train, source.y_train), "test": (source.x_test, source.y_test)}
    )


@pytest.mark.data
def test_real_cifar10_is_labelled_when_it_is_a_subset(real_data):
    source = real_data("cifar10")
    assert source.x_train.shape[1:] == (32, 32, 3)
    assert set(source.y_test.tolist()) == set(range(10))
    sizes = source.sizes
    expected = f"cifar10 (subset: {sizes[0]} of 50000 train, {sizes[1]} of 10000 test)"
    assert source.label == ("cifar10" if sizes == (50000, 10000) else expected)

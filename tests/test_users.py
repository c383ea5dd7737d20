"""Data sets by user: Federated EMNIST in both layouts, MNIST by writer, and their errors."""

import gzip
import hashlib
import json
import lzma
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from fedjax_sec.core import registry
from fedjax_sec.data import MissingDataError
from fedjax_sec.data.partitions.natural import Natural
from fedjax_sec.data.sources import _femnist, _files, mnist_by_writer

TEST_DATA = os.environ.get("FEDJAX_SEC_TEST_DATA")
SIZES = {"f0": 23, "f1": 4, "f2": 0, "f3": 11}  # natural sizes; f2 has no examples


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("FEDJAX_SEC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def users_with(sizes, classes=10, seed=0):
    """user -> (pixels uint8 [n, 28, 28], labels [n])"""
    rng = np.random.default_rng(seed)
    return {
        user: (rng.integers(0, 256, (n, 28, 28), np.uint8), rng.integers(0, classes, n))
        for user, n in sizes.items()
    }


def leaf(users):
    """LEAF's content of a file; its own files hold k / 255 with all decimals, others fewer."""
    return {
        "users": list(users),
        "num_samples": [len(y) for _, y in users.values()],
        "user_data": {
            user: {"x": np.round(x.reshape(-1, 784) / 255, 3).tolist(), "y": y.tolist()}
            for user, (x, y) in users.items()
        },
    }


def write_leaf(path, users):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(leaf(users)))


def write_hdf5(path, users):
    h5py = pytest.importorskip("h5py")
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for user, (x, y) in users.items():
            client = file.create_group(f"examples/{user}")
            client["pixels"] = (x / 255).astype(np.float32)
            client["label"] = y.astype(np.int32)


@pytest.fixture
def both(tmp_path):
    """LEAF's layout with train/ in two files and test/ in one; the truth of both splits."""
    train, test = users_with(SIZES), users_with({"f0": 3, "f3": 2}, seed=1)
    data = tmp_path / "femnist" / "data"
    write_leaf(data / "train" / "all_data_0_train.json", {u: train[u] for u in ("f0", "f1")})
    write_leaf(data / "train" / "all_data_1_train.json", {u: train[u] for u in ("f2", "f3")})
    write_leaf(data / "test" / "all_data_0_test.json", test)
    return train, test


def load(name, folder):
    return registry.datasets.build(name).load(str(folder), download=False)


def assert_holds(source, split, users, numbers):
    """The split holds exactly these users' examples, in order, under these numbers."""
    x, y, who = (getattr(source, f"{part}_{split}") for part in ("x", "y", "users"))
    assert (x.dtype, y.dtype, who.dtype) == (np.uint8, np.int32, np.int32)
    assert len(y) == sum(len(labels) for _, labels in users.values())
    for user, (pixels, labels) in users.items():
        mine = who == numbers.get(user, -1)
        np.testing.assert_array_equal(x[mine][..., 0], pixels)
        np.testing.assert_array_equal(y[mine], labels)


# --- Federated EMNIST ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["femnist_digits", "femnist"])
def test_leaf_train_and_test(both, tmp_path, name):
    source = load(name, tmp_path)
    numbers = {"f0": 0, "f1": 1, "f3": 2}  # users without training examples are none
    assert_holds(source, "train", both[0], numbers)
    assert_holds(source, "test", both[1], numbers)
    assert source.num_classes == {"femnist_digits": 10, "femnist": 62}[name]
    assert source.origin == "LEAF train and test" and source.is_subset
    partition = Natural().split(np.random.default_rng(0), source.y_train, 3, source.users_train)
    assert partition.counts.tolist() == [23, 4, 11]


def test_background_stays_light_and_rounding_is_exact(tmp_path):
    every = np.arange(784, dtype=np.uint8).reshape(1, 28, 28)  # all 256 values
    users = {"f0": (np.concatenate([every, np.full_like(every, 255)]), np.array([4, 7]))}
    write_leaf(tmp_path / "femnist_digits" / "train" / "a.json", users)
    write_leaf(tmp_path / "femnist_digits" / "test" / "a.json", users)
    source = load("femnist_digits", tmp_path)
    assert_holds(source, "train", users, {"f0": 0})
    assert (source.x_train[1] == 255).all() and source.mean == (0.0,) and source.std == (1.0,)


@pytest.mark.parametrize("place", ["all_data", "data/all_data", "."])
def test_leaf_all_data_holds_every_users_last_tenth_out(tmp_path, place):
    users = users_with(SIZES)
    folder = tmp_path / "femnist" / place
    write_leaf(folder / "all_data_0.json", {u: users[u] for u in ("f0", "f2")})
    write_leaf(folder / "all_data_1.json", {u: users[u] for u in ("f1", "f3")})
    source = load("femnist", tmp_path)
    numbers = {"f0": 0, "f1": 1, "f3": 2}
    held = {"f0": 2, "f1": 0, "f2": 0, "f3": 1}
    train = {u: (x[: len(y) - held[u]], y[: len(y) - held[u]]) for u, (x, y) in users.items()}
    test = {u: (x[len(y) - held[u] :], y[len(y) - held[u] :]) for u, (x, y) in users.items()}
    assert_holds(source, "train", train, numbers)
    assert_holds(source, "test", test, numbers)


def test_digits_are_taken_from_all_classes(tmp_path):
    train, test = users_with({"a": 40, "b": 30}, 62), users_with({"a": 40, "b": 30}, 62, seed=1)
    train["letters"] = (train["a"][0][:5], np.array([10, 35, 36, 61, 11]))
    write_leaf(tmp_path / "femnist" / "train" / "a.json", train)
    write_leaf(tmp_path / "femnist" / "test" / "a.json", test)
    source = load("femnist_digits", tmp_path)
    wanted = {u: (x[y < 10], y[y < 10]) for u, (x, y) in train.items() if u != "letters"}
    assert_holds(source, "train", wanted, {"a": 0, "b": 1})
    assert set(load("femnist", tmp_path).users_train.tolist()) == {0, 1, 2}


def test_clients_of_tensorflow_federated():
    # The same walk as over h5py's groups, where h5py is not installed.
    users = users_with(SIZES)
    examples = {u: {"pixels": x / np.float32(255), "label": y} for u, (x, y) in users.items()}
    result = list(_femnist._clients(dict(reversed(examples.items()))))
    assert [user for user, _, _ in result] == sorted(SIZES)
    for user, x, y in result:
        pixels, labels = _femnist._examples(user, x, y, 10)
        assert pixels.shape == (SIZES[user], 28, 28, 1)
        np.testing.assert_array_equal(pixels[..., 0], users[user][0])
        np.testing.assert_array_equal(labels, users[user][1])


@pytest.mark.parametrize("place", ["femnist_digits", "femnist"])
def test_hdf5(tmp_path, place):
    pytest.importorskip("h5py")
    train, test = users_with(SIZES), users_with({"f0": 3, "f1": 1, "f3": 2}, seed=1)
    prefix = "fed_emnist_digitsonly" if place == "femnist_digits" else "fed_emnist"
    write_hdf5(tmp_path / place / f"{prefix}_train.h5", train)
    write_hdf5(tmp_path / place / f"{prefix}_test.h5", test)
    source = load("femnist_digits", tmp_path)
    assert_holds(source, "train", train, {"f0": 0, "f1": 1, "f3": 2})
    assert_holds(source, "test", test, {"f0": 0, "f1": 1, "f3": 2})
    assert source.origin == f"TensorFlow Federated {prefix}"


def test_a_broken_hdf5_file_is_named(tmp_path):
    pytest.importorskip("h5py")
    for split in ("train", "test"):
        write_hdf5(tmp_path / "femnist" / f"fed_emnist_{split}.h5", users_with({"a": 3}))
    (tmp_path / "femnist" / "fed_emnist_test.h5").write_bytes(b"no HDF5")
    with pytest.raises(MissingDataError, match=r"fed_emnist_test.h5 cannot be read"):
        load("femnist", tmp_path)


def test_without_h5py_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)  # importing it fails
    for split in ("train", "test"):
        path = tmp_path / "femnist" / f"fed_emnist_{split}.h5"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    with pytest.raises(MissingDataError, match=r"pip install 'fedjax_sec\[hdf5\]'"):
        load("femnist", tmp_path)


def test_the_second_read_comes_from_the_cache(both, tmp_path, own_cache, monkeypatch):
    first = load("femnist", tmp_path)
    monkeypatch.setattr(_femnist, "_decode", lambda *args: pytest.fail("decoded again"))
    second = load("femnist", tmp_path)
    for field in _femnist._KEYS:
        np.testing.assert_array_equal(getattr(first, field), getattr(second, field))
    assert len(list(own_cache.iterdir())) == 1
    os.utime(next((tmp_path / "femnist").rglob("*_0_test.json")), (1, 1))
    with pytest.raises(pytest.fail.Exception, match="decoded again"):
        load("femnist", tmp_path)


def broken(change):
    content = leaf(users_with({"a": 3, "b": 2}))
    change(content)
    return content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("num_samples"), "the key 'num_samples' is missing"),
        (lambda c: c["user_data"].pop("b"), "user 'b' has no entry in 'user_data'"),
        (lambda c: c["user_data"]["b"]["y"].pop(), "2 images and 1 labels, but num_samples says 2"),
        (lambda c: c["user_data"]["a"]["x"][1].pop(), "'a'|inhomogeneous"),
        (lambda c: c["user_data"]["a"]["x"][1].__setitem__(5, 1.5), r"'a' has pixels outside"),
        (lambda c: c["user_data"]["a"]["x"][1].__setitem__(5, float("nan")), "pixels outside"),
        (lambda c: c["user_data"]["a"]["y"].__setitem__(0, 62), "'a' has labels .* from 0 to 61"),
        (lambda c: c["user_data"]["a"]["y"].__setitem__(0, 1.5), "'a' has labels"),
        (lambda c: (c["users"].append("a"), c["num_samples"].append(3)), "user 'a'"),
        (lambda c: c["users"].append("c"), "zip"),
    ],
)
def test_a_broken_leaf_file_is_named(tmp_path, change, message):
    write_leaf(tmp_path / "femnist" / "test" / "a.json", users_with({"a": 3}))
    path = tmp_path / "femnist" / "train" / "a.json"
    path.parent.mkdir()
    path.write_text(json.dumps(broken(lambda c: None)))
    assert load("femnist", tmp_path).sizes == (5, 3)
    path.write_text(json.dumps(broken(change)))
    with pytest.raises(MissingDataError, match=message) as caught:
        load("femnist", tmp_path)
    assert f"{path} cannot be read" in str(caught.value)


def test_a_user_in_two_files_is_named(both, tmp_path):
    folder = tmp_path / "femnist" / "data" / "train"
    shutil.copy(folder / "all_data_0_train.json", folder / "all_data_2_train.json")
    with pytest.raises(MissingDataError, match="2_train.json .*user 'f0' is there twice"):
        load("femnist", tmp_path)


def test_half_of_the_files_are_not_enough(both, tmp_path):
    shutil.rmtree(tmp_path / "femnist" / "data" / "test")
    with pytest.raises(MissingDataError, match="only one of train/ and test/"):
        load("femnist", tmp_path)
    (tmp_path / "femnist" / "fed_emnist_test.h5").write_bytes(b"")
    with pytest.raises(MissingDataError, match="only one of fed_emnist_train.h5 and fed_emnist_t"):
        load("femnist", tmp_path)


def test_files_without_examples_are_named(tmp_path):
    write_leaf(tmp_path / "femnist" / "all_data_0.json", users_with({"a": 9}))
    with pytest.raises(MissingDataError, match="hold no test examples"):
        load("femnist", tmp_path)


@pytest.mark.parametrize("name", ["femnist", "femnist_digits", "mnist_by_writer"])
def test_missing_data_says_how_to_get_it(tmp_path, name):
    with pytest.raises(MissingDataError) as caught:
        load(name, tmp_path / "none")
    message = str(caught.value)
    for part in (
        repr(name),
        str(tmp_path / "none" / name),
        "data.data_dir",
        "https://",
        "'digits'",
    ):
        assert part in message
    assert len(message.splitlines()) == 1


# --- Downloads, from local files ----------------------------------------------------------------


def test_an_archive_is_downloaded_checked_and_unpacked(tmp_path, monkeypatch):
    served, target = tmp_path / "served", tmp_path / "data"
    served.mkdir()
    for split in ("train", "test"):
        (served / f"fed_emnist_{split}.h5").write_bytes(split.encode())
    with tarfile.open(served / "fed_emnist.tar.bz2", "w:bz2") as tar:
        tar.add(served / "fed_emnist_train.h5", "some/folder/fed_emnist_train.h5")
        tar.add(served / "fed_emnist_test.h5", "fed_emnist_test.h5")
    content = (served / "fed_emnist.tar.bz2").read_bytes()
    monkeypatch.setattr(_femnist, "URL", served.as_uri() + "/")
    right = hashlib.sha256(content).hexdigest()
    archive = _femnist.Archive("fed_emnist", right, 62, (1, 1))
    _femnist._download(archive, target)
    assert {p.name: p.read_text() for p in target.iterdir()} == {
        "fed_emnist_train.h5": "train",
        "fed_emnist_test.h5": "test",
    }
    with pytest.raises(OSError, match=f"not the expected file: SHA-256 {right}"):
        _femnist._download(archive._replace(sha256="0" * 64), tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == []
    with pytest.raises(OSError, match="nowhere"):
        _files.fetch((served / "nowhere").as_uri(), right, tmp_path / "other" / "x")


def test_a_failed_download_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(_femnist, "_import_h5py", lambda: None)
    monkeypatch.setattr(_femnist, "URL", (tmp_path / "nowhere").as_uri() + "/")
    with pytest.raises(MissingDataError, match="downloading it failed .*Ways to get it") as caught:
        registry.datasets.build("femnist_digits").load(str(tmp_path))
    assert "LEAF" in str(caught.value)


# --- MNIST by writer ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """`mnist_by_writer` and `mnist` from prepared real data."""
    folder = Path(TEST_DATA or "", "tfds")
    table = Path(TEST_DATA or "", "raw", "leaf", mnist_by_writer.TABLE)
    if not TEST_DATA or not (folder / "mnist").is_dir() or not table.is_file():
        pytest.skip(f"FEDJAX_SEC_TEST_DATA names no folder with tfds/mnist and {table.name}")
    pytest.importorskip("tensorflow_datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDJAX_SEC_CACHE", str(tmp_path_factory.mktemp("cache")))
        result = {name: load(name, folder) for name in ("mnist_by_writer", "mnist")}
    return result, dict(np.load(lzma.open(table)))


@pytest.mark.slow
@pytest.mark.data
def test_real_mnist_by_writer(real):
    (source, mnist), table = real[0].values(), real[1]
    assert source.label == "mnist_by_writer" and source.sizes == (60000, 10000)
    assert source.describe()["users"] == 539
    for split, writers in (("train", 539), ("test", 297)):
        # By way of the table's own order, which the loader does not read.
        order = table[f"tfds_to_mnist_{split}"]
        np.testing.assert_array_equal(mnist_by_writer.tfds_order(split, len(order)), order)
        writer = table[f"{split}_writer"][order]  # of each image of `mnist`
        users = getattr(source, f"users_{split}")
        first = users.min()
        assert first == (0 if split == "train" else 539)
        numbers, counts = np.unique(writer, return_counts=True)
        assert len(numbers) == writers
        assert np.bincount(users - first).tolist() == counts.tolist()
        for i, number in enumerate(numbers):
            mine = np.flatnonzero(writer == number)
            mine = mine[np.argsort(order[mine])]  # in MNIST's order
            for part in ("x", "y"):
                of_mnist = getattr(mnist, f"{part}_{split}")[mine]
                np.testing.assert_array_equal(
                    getattr(source, f"{part}_{split}")[users == first + i], of_mnist
                )
    counts = np.bincount(source.users_train)
    assert (counts.min(), counts.max()) == (19, 131) and (np.diff(source.users_train) >= 0).all()


@pytest.mark.data
def test_leafs_reader_finds_the_same_digits(real, tmp_path):
    (source, _), table = real[0].values(), real[1]
    for split in ("train", "test"):
        packed = Path(TEST_DATA, "raw", "leaf", f"mnist_by_writer_30_{split}.json.gz")
        if not packed.is_file():
            pytest.skip(f"FEDJAX_SEC_TEST_DATA has no {packed.name}")
        path = tmp_path / "femnist" / split / "writers.json"
        path.parent.mkdir(parents=True)
        path.write_bytes(gzip.decompress(packed.read_bytes()))
    names = json.loads((tmp_path / "femnist" / "train" / "writers.json").read_text())["users"]
    result = load("femnist_digits", tmp_path)
    assert result.sizes == (3023, 352) and len(names) == 30
    writers = np.unique(table["train_writer"])
    for i, name in enumerate(names):
        number = int(np.flatnonzero(writers == int("".join(filter(str.isdigit, name))))[0])
        mine = source.users_train == number
        for part in ("x", "y"):  # the first 90% of a writer's digits are in train
            together = [
                getattr(result, f"{part}_{split}")[getattr(result, f"users_{split}") == i]
                for split in ("train", "test")
            ]
            expected = getattr(source, f"{part}_train")[mine]
            np.testing.assert_array_equal(np.concatenate(together), expected)


def idx(labels):
    return gzip.compress(np.array([0x0C02, *labels.shape], ">i4").tobytes() + labels.tobytes())


@pytest.fixture
def qmnist(tmp_path, monkeypatch):
    """QMNIST's label files as the loader expects them, with writers made up, and their address."""
    rng = np.random.default_rng(0)
    served = tmp_path / "served"
    served.mkdir()
    labels = [rng.integers(0, 10, (60000, 8)).astype(">i4") for _ in range(2)]
    for (name, _), content in zip(mnist_by_writer.LABELS.items(), labels, strict=True):
        (served / name).write_bytes(idx(content))
        digest = hashlib.sha256((served / name).read_bytes()).hexdigest()
        monkeypatch.setitem(mnist_by_writer.LABELS, name, digest)
    monkeypatch.setattr(mnist_by_writer, "URL", served.as_uri() + "/")
    return served, labels


def test_qmnists_labels_are_downloaded_and_read(qmnist, tmp_path):
    _, labels = qmnist
    writers, classes = mnist_by_writer._writers(tmp_path / "data", download=True)
    for column, result in ((2, writers), (0, classes)):
        np.testing.assert_array_equal(result[0], labels[0][:, column])
        np.testing.assert_array_equal(result[1], labels[1][:10000, column])
    again, _ = mnist_by_writer._writers(tmp_path / "data", download=False)
    np.testing.assert_array_equal(again[0], writers[0])


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["no gzip", "cut", "other"])
def test_broken_labels_of_qmnist_say_how_to_get_them(qmnist, tmp_path, damage):
    folder = tmp_path / "data" / "mnist_by_writer"
    shutil.copytree(qmnist[0], folder)
    path = folder / "qmnist-test-labels-idx2-int.gz"
    whole = path.read_bytes()
    few = idx(np.zeros((9, 8), ">i4"))
    path.write_bytes({"no gzip": b"text", "cut": whole[: len(whole) // 2], "other": few}[damage])
    with pytest.raises(MissingDataError, match="needs the writers of MNIST's digits") as caught:
        load("mnist_by_writer", tmp_path / "data")
    assert "qmnist-train-labels-idx2-int.gz and qmnist-test" in str(caught.value)


@pytest.mark.data
def test_labels_of_another_mnist_are_refused(real, tmp_path, monkeypatch, qmnist):
    folder = tmp_path / "data"
    shutil.copytree(qmnist[0], folder / "mnist_by_writer")
    mnist = real[0]["mnist"]
    monkeypatch.setattr(mnist_by_writer, "load_tfds", lambda *args, **kwargs: mnist)
    with pytest.raises(MissingDataError, match="names other classes than MNIST's"):
        load("mnist_by_writer", folder)
    swapped = mnist._replace(y_train=mnist.y_train[::-1])
    monkeypatch.setattr(mnist_by_writer, "load_tfds", lambda *args, **kwargs: swapped)
    with pytest.raises(MissingDataError, match="60000 train labels are others"):
        load("mnist_by_writer", folder)

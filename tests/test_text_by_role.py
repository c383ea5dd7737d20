"""Shakespeare's next character by role, the writers of FEMNIST, and CIFAR-100 in part."""

import io
import json
import lzma
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest

import fedjax_sec
from fedjax_sec.core import ConfigError, registry
from fedjax_sec.data import MissingDataError, checked
from fedjax_sec.data.sources import _femnist, shakespeare
from fedjax_sec.data.sources.shakespeare import CHARACTERS
from fedjax_sec.runs.config import from_mapping
from fedjax_sec.runs.prepare import prepare

DATA = os.environ.get("FEDJAX_SEC_TEST_DATA")
with_data = pytest.mark.skipif(
    not DATA or not (Path(DATA) / "raw" / "leaf" / _femnist.WRITERS).is_file(),
    reason="FEDJAX_SEC_TEST_DATA names no folder with raw/leaf",
)

#: role -> texts; one role's are too short for a window, one's have line ends and runs of spaces.
TRAIN = {
    "HAMLET": ["To be, or not\nto be:", "that   is the question}"],
    "GHOST": ["Mark me."],
    "POLONIUS": ["Words,  words, words. And so it is."],
}
TEST = {"HAMLET": ["The rest is silence, my lord."], "GHOST": ["Adieu, adieu! Remember me."]}
LENGTH = 10


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("FEDJAX_SEC_CACHE", str(tmp_path / "cache"))


def write_roles(folder, train=None, test=None):
    folder.mkdir(parents=True, exist_ok=True)
    for part, texts in (("train", train or TRAIN), ("test", test or TEST)):
        content = json.dumps({"user_data": {role: {"x": x} for role, x in texts.items()}})
        (folder / f"roles_{part}.json").write_text(content)


def load(folder, **fields):
    spec = {"name": "shakespeare", "length": LENGTH, "targets": "last"} | fields
    return checked(registry.datasets.build(spec).load(str(folder), False), "shakespeare")


def windows(texts, length, stride, padded):
    """LEAF's windows by hand: [(the characters before, the character)], with _ for padding."""
    whole = ""
    for letter in "\n".join(texts).replace("\n", " "):
        if letter != " " or not whole.endswith(" "):
            whole += letter
    whole = "_" * (length if padded else 0) + whole
    pairs = []
    for end in range(length, len(whole), stride):
        pairs.append((whole[end - length : end], whole[end]))
    return pairs


def read(tokens):
    return "".join({0: "_", 87: "?"}.get(int(t)) or CHARACTERS[int(t) - 1] for t in tokens)


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_windows_are_leafs(tmp_path, stride, padded):
    write_roles(tmp_path / "shakespeare")
    source = load(tmp_path, stride=stride, padded=padded)
    assert (source.kind, source.task, source.num_classes) == ("tokens", "classification", 90)
    for part, texts in (("train", TRAIN), ("test", TEST)):
        x, y = getattr(source, f"x_{part}"), getattr(source, f"y_{part}")
        users = getattr(source, f"users_{part}")
        assert x.shape == (len(y), LENGTH) and x.dtype == np.uint8 and y.dtype == np.int32
        for number, role in enumerate(sorted(TRAIN)):
            expected = windows(texts.get(role, []), LENGTH, stride, padded)
            expected = [(a.replace("}", "?"), b.replace("}", "?")) for a, b in expected]
            of_role = users == number
            rows = zip(x[of_role], y[of_role], strict=True)
            assert [(read(a), read([b])) for a, b in rows] == expected
        assert y.min() > 0 and y.max() < 88  # padding, beginning and end are never predicted
        assert (x == 0).any() == padded
    # Every role has examples, or those alone whose text is longer than a window.
    assert np.unique(source.users_train).tolist() == ([0, 1, 2] if padded else [1, 2])
    assert source.is_subset == (stride > 1)
    if stride > 1:
        whole = sum(len(windows(texts, LENGTH, 1, padded)) for texts in TRAIN.values())
        assert source.official_sizes[0] == whole
        assert f"of {whole} train" in source.label and source.label.startswith("shakespeare (sub")


def test_the_test_part_may_have_a_larger_stride(tmp_path):
    """Of all its roles, while the training part stays; as LEAF's own files are read, too."""
    write_roles(tmp_path / "roles" / "shakespeare")
    write_leaf(tmp_path / "leaf" / "shakespeare")
    whole = load(tmp_path / "roles", stride=2)
    for kind in ("roles", "leaf"):
        source = load(tmp_path / kind, stride=2, test_stride=5)
        np.testing.assert_array_equal(source.x_train, whole.x_train)
        expected = [
            (number, pair)
            for number, role in enumerate(sorted(TRAIN))
            for pair in windows(TEST.get(role, []), LENGTH, 5, False)
        ]
        rows = zip(source.users_test, source.x_test, source.y_test, strict=True)
        assert [(user, (read(a), read([b]))) for user, a, b in rows] == expected
        assert len({user for user, _ in expected}) == 2 and source.is_subset
    assert load(tmp_path / "roles", test_stride=3).is_subset


def test_fewer_roles_are_a_part(tmp_path):
    write_roles(tmp_path / "shakespeare")
    source = load(tmp_path, max_users=1)
    assert np.unique(source.users_train).tolist() == [0]
    assert read(source.x_train[0]) == "To be, or " and source.is_subset


def test_the_raw_texts_beside_the_data_folder_are_read(tmp_path):
    write_roles(tmp_path / "raw" / "shakespeare")
    assert len(load(tmp_path / "tfds").y_train) > 20
    with pytest.raises(MissingDataError, match="is not in .*shakespeare"):
        load(tmp_path / "elsewhere" / "tfds")


def write_leaf(folder, width=LENGTH):
    for part, texts in (("train", TRAIN), ("test", TEST)):
        (folder / part).mkdir(parents=True)
        data = {}
        for role in texts:
            pairs = windows(texts[role], width, 1, False)
            data[role] = {"x": [a for a, _ in pairs], "y": [b for _, b in pairs]}
        first = {"users": ["HAMLET"], "user_data": {"HAMLET": data.pop("HAMLET")}}
        (folder / part / f"all_data_0_{part}.json").write_text(json.dumps(first))
        rest = {"users": list(data), "user_data": data}
        (folder / part / f"all_data_1_{part}.json").write_text(json.dumps(rest))


def write_hdf5(path, texts):
    """A file as TensorFlow Federated's: examples/ROLE/snippets holds the texts as bytes."""
    h5py = pytest.importorskip("h5py", reason="h5py is not installed (extra `hdf5`)")
    with h5py.File(path, "w") as file:
        for role, snippets in texts.items():
            lines = np.array([text.encode() for text in snippets], dtype=object)
            kind = h5py.special_dtype(vlen=bytes)
            file.create_dataset(f"examples/{role}/snippets", data=lines, dtype=kind)


@pytest.mark.parametrize("targets", ["last", "every"])
def test_tensorflow_federateds_files_hold_the_same_texts(tmp_path, targets):
    write_roles(tmp_path / "json" / "shakespeare")
    folder = tmp_path / "hdf5" / "shakespeare"
    folder.mkdir(parents=True)
    write_hdf5(folder / "shakespeare_train.h5", TRAIN)
    write_hdf5(folder / "shakespeare_test.h5", TEST)
    ours, theirs = (load(tmp_path / kind, targets=targets) for kind in ("json", "hdf5"))
    for name in ("x_train", "y_train", "users_train", "x_test", "y_test", "users_test"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    (folder / "shakespeare_test.h5").write_bytes(b"no HDF5")
    with pytest.raises(MissingDataError, match=r"shakespeare cannot be read"):
        load(tmp_path / "hdf5", targets=targets)


def test_an_absent_data_set_is_downloaded_once(tmp_path, monkeypatch):
    """From an archive as the real one, whose digest is asked for, into the data folder."""
    for part, texts in (("train", TRAIN), ("test", TEST)):
        write_hdf5(tmp_path / f"shakespeare_{part}.h5", texts)
    packed = tmp_path / "there.tar.bz2"
    with tarfile.open(packed, "w:bz2") as tar:
        for part in ("train", "test"):
            tar.add(tmp_path / f"shakespeare_{part}.h5", f"shakespeare_{part}.h5")
    asked = []

    def fetch(url, sha256, target):
        asked.append((url, sha256))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(packed.read_bytes())

    monkeypatch.setattr(_femnist, "fetch", fetch)
    dataset = registry.datasets.build({"name": "shakespeare", "length": LENGTH, "targets": "last"})
    with pytest.raises(MissingDataError, match="downloading is switched off"):
        dataset.load(str(tmp_path / "data"), False)
    sizes = {len(dataset.load(str(tmp_path / "data"), True).x_train) for _ in range(2)}
    write_roles(tmp_path / "json" / "shakespeare")
    assert sizes == {len(load(tmp_path / "json").x_train)}
    assert asked == [(f"{_femnist.URL}shakespeare.tar.bz2", shakespeare.ARCHIVE.sha256)]


def test_leafs_own_files_hold_the_same_windows(tmp_path):
    write_roles(tmp_path / "a" / "shakespeare")
    write_leaf(tmp_path / "b" / "shakespeare")
    for fields in ({}, {"max_users": 1}):
        one, other = load(tmp_path / "a", **fields), load(tmp_path / "b", **fields)
        for name in ("x_train", "y_train", "x_test", "y_test", "users_train", "users_test"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert other.is_subset and other.origin == "LEAF shakespeare, train and test"
        assert sum(other.official_sizes) == 4_226_158


def test_leafs_files_serve_windows_of_their_length_only(tmp_path):
    write_leaf(tmp_path / "shakespeare")
    for fields in ({"targets": "every"}, {"length": 8}, {"padded": True}):
        with pytest.raises(ConfigError, match=r"LEAF's files .* hold windows of \[10\] characters"):
            load(tmp_path, **fields)
    (tmp_path / "shakespeare" / "train" / "all_data_1_train.json").write_text("{")
    with pytest.raises(MissingDataError, match="cannot be read"):
        load(tmp_path)


def test_what_goes_with_the_last_place_only_is_refused_elsewhere(tmp_path):
    write_roles(tmp_path / "shakespeare")
    for fields in ({"stride": 2}, {"test_stride": 2}, {"padded": True}):
        with pytest.raises(ConfigError, match="stride, test_stride and padded belong to"):
            load(tmp_path, targets="every", **fields)
    with pytest.raises(ConfigError, match="holds no example; lower length, or set padded to true"):
        load(tmp_path, length=200)


def test_one_class_for_each_sequence_is_checked():
    """Of tokens for classification: a class each, from 0, and no -1."""
    x = np.arange(12).reshape(3, 4) % 5
    good = fedjax_sec.data.arrays(
        x, np.array([0, 4, 2]), x, np.array([1, 1, 1]), kind="tokens", task="classification"
    )
    assert good is not None
    for y, message in (
        (np.zeros((3, 4), int), r"one class for each sequence, whole numbers of shape \(3,\)"),
        (np.array([0, -1, 2]), "tokens from -1 to 2, and with num_classes = 5 they are 0 to 4"),
    ):
        with pytest.raises(ConfigError, match=message):
            fedjax_sec.data.arrays(x, y, x, y, kind="tokens", task="classification")


def test_fedmls_network_learns_the_next_character(tmp_path):
    """Two roles that know one text by heart; a class attack on characters is no error."""
    texts = {role: ["abcdefgh" * 12] for role in "AB"}
    write_roles(tmp_path / "shakespeare", texts, texts)
    spec = {
        "data": {
            "name": "shakespeare",
            "length": 8,
            "targets": "last",
            "num_clients": 2,
            "data_dir": str(tmp_path),
            "partition": "natural",
        },
        "model": {"name": "fedml_rnn", "hidden": [8, 8]},
        "client": {
            "steps": 10,
            "batch_size": 8,
            "optimizer": {"name": "adam", "learning_rate": 0.03},
        },
        "evaluation": {"every": 10},
        "rounds": 10,
    }
    result = fedjax_sec.run(spec)
    assert result.metrics["loss"][0] > 4 and result.metrics["accuracy"][-1] == 1.0
    assert result.metrics["per_class_accuracy"].shape[-1] == 90
    table = result.params["params"]["embedding"]["embedding"]
    np.testing.assert_array_equal(table[0], 0.0)  # padding, after ten rounds
    a, d = (CHARACTERS.index(letter) + 1 for letter in "ad")
    flip = {"name": "label_flip", "base": a, "target": d}
    attacked = prepare(from_mapping(spec | {"threat": {"num_malicious": 1}, "attack": flip}))
    assert attacked.setting.labelled and attacked.setting.inputs == "tokens"


# --- Parts of other data sets ---------------------------------------------------------------------


def write_writers(path, seed=0):
    """Three writers, of whom one has no digits in the test part."""
    rng = np.random.default_rng(seed)
    arrays = {"writers": np.array(["f0_1", "f0_2", "f7_0"])}
    for part, owners, labels in (
        ("train", [0, 0, 1, 1, 2, 2, 2], [3, 61, 0, 9, 10, 7, 7]),
        ("test", [0, 1, 2], [5, 1, 40]),
    ):
        arrays[f"x_{part}"] = rng.integers(0, 256, (len(owners), 28, 28), np.uint8)
        arrays[f"y_{part}"] = np.array(labels, np.uint8)
        arrays[f"w_{part}"] = np.array(owners, np.uint16)
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    path.write_bytes(lzma.compress(buffer.getvalue()))
    return arrays


@pytest.mark.parametrize("place", ["tfds/femnist", "raw/leaf"])
def test_an_array_file_of_writers_is_read(tmp_path, place):
    arrays = write_writers(tmp_path / place / _femnist.WRITERS)
    source = registry.datasets.build("femnist").load(str(tmp_path / "tfds"), False)
    source = checked(source, "femnist")
    for part in ("train", "test"):
        np.testing.assert_array_equal(getattr(source, f"x_{part}")[..., 0], arrays[f"x_{part}"])
        np.testing.assert_array_equal(getattr(source, f"y_{part}"), arrays[f"y_{part}"])
        np.testing.assert_array_equal(getattr(source, f"users_{part}"), arrays[f"w_{part}"])
    assert source.is_subset and source.official_sizes == (671585, 77483)
    digits = registry.datasets.build("femnist_digits").load(str(tmp_path / "tfds"), False)
    kept = arrays["y_train"] < 10
    np.testing.assert_array_equal(digits.y_train, arrays["y_train"][kept])
    np.testing.assert_array_equal(digits.users_train, arrays["w_train"][kept])
    assert digits.users_test.tolist() == [0, 1]


def test_whole_files_come_before_some_writers(tmp_path):
    """TensorFlow Federated's or LEAF's own files are taken where both lie there."""
    write_writers(tmp_path / "raw" / "leaf" / _femnist.WRITERS)
    users = {"w": {"x": [[0.0] * 784] * 2, "y": [4, 6]}}
    content = {"users": ["w"], "num_samples": [2], "user_data": users}
    for part in ("train", "test"):
        (tmp_path / "tfds" / "femnist" / part).mkdir(parents=True)
        path = tmp_path / "tfds" / "femnist" / part / f"{part}.json"
        path.write_text(json.dumps(content))
    source = registry.datasets.build("femnist").load(str(tmp_path / "tfds"), False)
    assert source.y_train.tolist() == [4, 6] and source.origin == "LEAF train and test"


def test_a_damaged_array_file_is_named(tmp_path):
    path = tmp_path / "raw" / "leaf" / _femnist.WRITERS
    write_writers(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(MissingDataError, match=r"femnist_writers.npz.xz cannot be read"):
        registry.datasets.build("femnist").load(str(tmp_path / "tfds"), False)


@with_data
def test_the_207_writers_are_dark_on_light_and_a_part():
    source = registry.datasets.build("femnist").load(str(Path(DATA) / "tfds"), False)
    assert source.sizes == (28255, 3247) and len(np.unique(source.users_train)) == 207
    assert np.unique(source.users_test).tolist() == np.unique(source.users_train).tolist()
    assert "subset: 28255 of 671585" in source.label
    border = source.x_train[:, 0]  # the first row of each image: background
    assert np.median(border) == 255 and source.x_train[:, 8:20, 8:20].mean() < border.mean() - 30
    assert set(np.unique(source.y_train)) == set(range(62))


@with_data
def test_cifar100_and_shakespeare_at_hand():
    folder = str(Path(DATA) / "tfds")
    cifar = checked(registry.datasets.build("cifar100").load(folder, False), "cifar100")
    assert cifar.sizes == (10000, 2000) and cifar.is_subset and cifar.num_classes == 100
    assert set(np.bincount(cifar.y_train)) == {100} and set(np.bincount(cifar.y_test)) == {20}
    mean = cifar.x_train.reshape(-1, 3).mean(0) / 255
    np.testing.assert_allclose(mean, cifar.mean, atol=0.01)
    roles = registry.datasets.build({"name": "shakespeare", "targets": "last", "stride": 7})
    source = checked(roles.load(folder, False), "shakespeare")
    assert source.x_train.shape[1] == 80 and source.is_subset
    counts = []
    for part in ("train", "test"):
        path = Path(DATA) / "raw" / "shakespeare" / f"roles_{part}.json.xz"
        users = json.loads(lzma.decompress(path.read_bytes()))["user_data"]
        texts = [re.sub("[ \n][ \n]*", " ", " ".join(one["x"])) for one in users.values()]
        counts.append(sum(max(len(text) - 80, 0) for text in texts))
    assert source.official_sizes == tuple(counts)
    assert len(np.unique(source.users_train)) == 643 and (source.y_train > 0).all()

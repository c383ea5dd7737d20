"""Users of real data as clients, and attacks on the classes of sequences of characters."""

import io
import json
import lzma
import os
from pathlib import Path

import jax
import numpy as np
import pytest

import fedjax_sec
from fedjax_sec.core import ConfigError, registry
from fedjax_sec.data import MissingDataError, checked
from fedjax_sec.data.sources._femnist import WRITERS
from fedjax_sec.data.sources.shakespeare import CHARACTERS
from fedjax_sec.runs.config import from_mapping
from fedjax_sec.runs.prepare import prepare

DATA = os.environ.get("FEDJAX_SEC_TEST_DATA")


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path, monkeypatch):
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("FEDJAX_SEC_CACHE", str(tmp_path / "cache"))


# --- FEMNIST's writers ----------------------------------------------------------------------------


@pytest.mark.skipif(
    not DATA or not (Path(DATA) / "raw" / "leaf" / WRITERS).is_file(),
    reason="FEDJAX_SEC_TEST_DATA names no folder with raw/leaf",
)
def test_each_of_the_207_writers_is_a_client():
    """Against the stored arrays themselves, for all writers and for ten that are drawn."""
    packed = (Path(DATA) / "raw" / "leaf" / WRITERS).read_bytes()
    stored = np.load(io.BytesIO(lzma.decompress(packed)))
    source = registry.datasets.build("femnist").load(str(Path(DATA) / "tfds"), False)
    np.testing.assert_array_equal(source.x_train[..., 0], stored["x_train"])
    np.testing.assert_array_equal(source.x_test[..., 0], stored["x_test"])
    natural = registry.partitions.build("natural")
    for clients in (207, 10):
        split = natural.split(np.random.default_rng(0), source.y_train, clients, source.users_train)
        owners = set()
        for row, count in zip(split.index, split.counts, strict=True):
            (writer,) = set(stored["w_train"][row[:count]].tolist())
            assert count == np.sum(stored["w_train"] == writer)
            owners.add(writer)
        assert len(owners) == clients
        assert split.unused == len(source.y_train) - split.counts.sum()
    assert split.unused > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w_train": np.array([0, 2])}, "w_train names other writers than the 2"),
        ({"w_train": np.array([0, -1])}, "w_train names other writers than the 2"),
        ({"w_train": np.array([0.0, 1.0])}, "w_train names other writers than the 2"),
        ({"x_train": np.ones((2, 28, 28), np.float32)}, "x_train is float32; pixels are bytes"),
        ({"y_train": np.array([3.7, 1.0])}, "labels that are no integers"),
        ({"y_train": np.array([3, 62])}, "labels that are no integers from 0 to 61"),
        ({"y_test": np.array([3])}, "2 test images, 1 labels and 2 writers"),
    ],
)
def test_arrays_of_writers_that_do_not_fit_are_refused(tmp_path, change, message):
    """None of them may be dropped, blackened or rounded without a word."""
    arrays = {"writers": np.array(["f0_1", "f0_2"])}
    for part in ("train", "test"):
        arrays[f"x_{part}"] = np.full((2, 28, 28), 200, np.uint8)
        arrays[f"y_{part}"] = np.array([3, 61], np.uint8)
        arrays[f"w_{part}"] = np.array([0, 1], np.uint16)
    path = tmp_path / "femnist" / WRITERS
    path.parent.mkdir()
    for content, error in ((arrays, None), (arrays | change, message)):
        buffer = io.BytesIO()
        np.savez(buffer, **content)
        path.write_bytes(lzma.compress(buffer.getvalue()))
        load = registry.datasets.build("femnist").load
        if error is None:
            assert load(str(tmp_path), False).y_train.tolist() == [3, 61]
        else:
            with pytest.raises(MissingDataError, match=error):
                load(str(tmp_path), False)


# --- Shakespeare's next character as a class ------------------------------------------------------

LENGTH = 6
A, D = (CHARACTERS.index(letter) + 1 for letter in "ad")


def play(tmp_path, **changes):
    """A configuration on two roles, each client a role; whole batches and one step of training."""
    texts = {"A": ["abcdabcadbacda" * 3], "B": ["daabcbadcaabd" * 3]}
    folder = tmp_path / "shakespeare"
    folder.mkdir(exist_ok=True)
    for part in ("train", "test"):
        content = json.dumps({"user_data": {role: {"x": x} for role, x in texts.items()}})
        (folder / f"roles_{part}.json").write_text(content)
    data = {
        "name": "shakespeare",
        "length": LENGTH,
        "targets": "last",
        "num_clients": 2,
        "data_dir": str(tmp_path),
        "partition": "natural",
    }
    return {
        "data": data | changes.pop("data", {}),
        "model": {"name": "fedml_rnn", "hidden": [3]},
        "client": {"steps": 2, "batch_size": 8, "optimizer": {"name": "sgd", "learning_rate": 0.5}},
        "evaluation": {"every": 1},
        "rounds": 2,
    } | changes


def test_a_label_flip_on_characters_is_training_on_relabelled_characters(tmp_path):
    """The attacked run against one without an attack on data relabelled by hand."""
    flip = {"name": "label_flip", "base": A, "target": D}
    spec = play(tmp_path, attack=flip, threat={"num_malicious": 1})
    ready = prepare(from_mapping(spec))
    assert ready.setting.labelled and ready.setting.inputs == "tokens"
    malicious = np.flatnonzero(np.asarray(ready.population.malicious))
    assert len(malicious) == 1
    source = ready.source
    hit = (source.users_train == malicious[0]) & (source.y_train == A)
    assert 0 < hit.sum() < np.sum(source.y_train == A)

    def on(labels):
        return fedjax_sec.data.arrays(
            source.x_train,
            labels,
            source.x_test,
            source.y_test,
            users_train=source.users_train,
            users_test=source.users_test,
            num_classes=90,
            kind="tokens",
            task="classification",
        )

    plain = {key: value for key, value in spec.items() if key not in ("attack", "threat")}
    plain["data"] = {"num_clients": 2, "partition": "natural"}
    attacked = fedjax_sec.run(spec)
    expected = fedjax_sec.run(plain, data=on(np.where(hit, D, source.y_train)))
    clean = fedjax_sec.run(plain, data=on(source.y_train))
    pairs = [
        [np.asarray(leaf) for leaf in jax.tree.leaves(run.params)]
        for run in (attacked, expected, clean)
    ]
    for one, other in zip(pairs[0], pairs[1], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert max(np.abs(a - b).max() for a, b in zip(pairs[0], pairs[2], strict=True)) > 1e-3


def test_partitions_by_label_deal_windows_by_their_next_character(tmp_path):
    source = prepare(from_mapping(play(tmp_path))).source
    by_label = registry.partitions.build({"name": "by_label", "shards_per_client": 1})
    split = by_label.split(np.random.default_rng(0), source.y_train, 2)
    owned = [source.y_train[row[:n]] for row, n in zip(split.index, split.counts, strict=True)]
    low, high = sorted(owned, key=lambda labels: labels.min())
    assert low.max() <= high.min() and len(low) + len(high) == len(source.y_train)
    dealt = prepare(from_mapping(play(tmp_path, data={"partition": "dirichlet"})))
    assert np.asarray(dealt.population.counts).sum() == len(source.y_train)


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"partition": "by_label"}},
        {
            "attack": {"name": "label_flip", "base": A, "target": D},
            "threat": {"num_malicious": 1},
        },
    ],
)
def test_sequences_with_every_target_have_no_class(tmp_path, changes):
    data = {"targets": "every"} | changes.get("data", {})
    spec = play(tmp_path, **(changes | {"data": data}))
    spec["model"] = {"name": "char_lstm", "hidden": [3]}
    with pytest.raises(ConfigError, match="needs one class for each example"):
        prepare(from_mapping(spec))


def test_every_target_stays_the_default(tmp_path):
    spec = play(tmp_path)["data"]
    source = registry.datasets.build({"name": "shakespeare", "length": LENGTH})
    loaded = checked(source.load(spec["data_dir"], False), "shakespeare")
    assert loaded.task == "language_model" and loaded.y_train.shape == loaded.x_train.shape
    assert not loaded.is_subset

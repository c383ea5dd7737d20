"""Data sets given as NumPy arrays, in Python and in a file."""

import numpy as np
import pytest
from helpers import close, same_bits, small

import fedjax_sec
from fedjax_sec.core import ConfigError
from fedjax_sec.data import MissingDataError, arrays
from fedjax_sec.data.sources.digits import MEAN, STD, Digits
from fedjax_sec.runs import config
from fedjax_sec.runs.source import load_source

DIGITS = Digits().load()
PARTS = {name: getattr(DIGITS, name) for name in ("x_train", "y_train", "x_test", "y_test")}
NUMBERS = {"scale": 16.0, "mean": (MEAN,), "std": (STD,), "num_classes": 10}


def spec(**changes):
    """`small` without the name and the size of its data."""
    made = small(**changes)
    made["data"] = {"num_clients": 5, "partition": {"name": "dirichlet", "alpha": 2.0}}
    return made


def given(**changes):
    return arrays(**PARTS | NUMBERS | changes)


def test_the_same_arrays_give_the_same_run():
    """Only the name differs: clients, partition and all bits of the result are the digits'."""
    ours = fedjax_sec.run(spec(), data=given())
    named = fedjax_sec.run(spec(), **{"data.name": "digits"})
    same_bits(ours.params, named.params)
    same_bits(ours.metrics, named.metrics)
    assert ours.experiment.data.num_clients == 5
    assert ours.experiment.data.partition.registered_name == "dirichlet"
    assert ours.summary["data"]["label"] == "arrays"


def test_what_is_left_open_is_seen_from_the_arrays():
    x, y = np.arange(12).reshape(4, 3), [0, 1, 2, 1]
    floats = arrays(x / 20.0, y, x[:2] / 20.0, y[:2])
    assert (floats.num_classes, floats.scale, floats.input_kind) == (3, 1.0, "features")
    whole = arrays(x.reshape(4, 1, 3, 1), y, x.reshape(4, 1, 3, 1), y)
    assert (whole.scale, whole.input_kind, whole.x_train.dtype) == (255.0, "pixels", np.uint8)
    text = arrays(x, x + 1, x, x + 1, kind="tokens")
    assert (text.num_classes, text.task, text.input_kind) == (13, "language_model", "tokens")
    users = arrays(x / 20.0, y, x / 20.0, y, users_train=[0, 0, 1, 1], users_test=[0, 1, 1, 0])
    assert users.users_train.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"y_train": PARTS["y_train"][:-1]}, "y_train holds 1436 labels for 1437 examples"),
        ({"x_test": None}, "x_test must be an array"),
        ({"num_classes": 5}, "labels from 0 to 9, and num_classes is 5"),
        ({"x_train": "images"}, "x_train must be an array with one entry an example"),
        ({"kind": "images"}, "kind must be one of features, pixels, tokens, got 'images'"),
        ({"task": "classify"}, "unknown task 'classify'"),
        ({"mean": "none"}, "mean must be a tuple of finite numbers"),
        ({"scale": 1.0}, "images divided by scale = 1 must lie in"),
    ],
)
def test_what_no_experiment_can_use_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        given(**changes)


def test_arrays_stand_beside_no_other_data_set():
    words = "names the data set 'digits', and arrays are given beside it"
    for call in (
        lambda: fedjax_sec.run(small(data={"name": "digits"}), data=given()),
        lambda: fedjax_sec.run(spec(), data=given(), **{"data.name": "digits"}),
    ):
        with pytest.raises(ConfigError, match=words):
            call()
    result = fedjax_sec.run(spec(rounds=1), data=given())
    again = fedjax_sec.run(result.experiment, data=given())  # it names these arrays
    same_bits(again.params, result.params)
    with pytest.raises(ConfigError, match="data must be what fedjax_sec.data.arrays.* unchanged"):
        fedjax_sec.run(spec(), data=given()._replace(num_classes=11))
    with pytest.raises(ConfigError, match=r"data=fedjax_sec.data.arrays\(x_train"):
        fedjax_sec.run(spec(), data=DIGITS)


def test_a_file_of_a_configuration_takes_arrays_too(tmp_path):
    file = tmp_path / "one.yaml"
    file.write_text(config.dump_yaml(spec(rounds=1)))
    result = fedjax_sec.run(str(file), data=given())
    same_bits(result.params, fedjax_sec.run(spec(rounds=1), data=given()).params)


def test_a_resumed_run_needs_the_same_arrays(tmp_path):
    often = spec(checkpoint={"every": 1})
    fedjax_sec.run(often | {"rounds": 2}, data=given(), out=tmp_path / "run")
    other = PARTS["x_train"].copy()
    other[0, 0, 0, 0] += 1
    with pytest.raises(ConfigError, match=r"data.options.digest"):
        fedjax_sec.run(
            often | {"rounds": 4}, data=given(x_train=other), out=tmp_path / "run", resume=True
        )
    resumed = fedjax_sec.run(often | {"rounds": 4}, data=given(), out=tmp_path / "run", resume=True)
    same_bits(resumed.params, fedjax_sec.run(often | {"rounds": 4}, data=given()).params)


def test_arrays_that_are_not_there_are_asked_for():
    with pytest.raises(MissingDataError, match="digest 'abc' are not in this process; give them"):
        fedjax_sec.run(spec(), **{"data.name": "arrays", "data.digest": "abc"})
    with pytest.raises(MissingDataError, match="arrays are not in this process"):
        fedjax_sec.run(spec(), **{"data.name": "arrays"})


# --- Files --------------------------------------------------------------------------------------


def in_file(path, **changes):
    content = {key: one for key, one in (PARTS | NUMBERS | changes).items() if one is not None}
    np.savez(path, **content)
    return {"data.name": "npz", "data.path": str(path)}


def test_a_file_gives_what_the_arrays_give(tmp_path):
    result = fedjax_sec.run(spec(), **in_file(tmp_path / "mine.npz"))
    same_bits(result.params, fedjax_sec.run(spec(), data=given()).params)
    users = in_file(tmp_path / "users.npz", users_train=np.zeros(1437), users_test=np.zeros(360))
    source = load_source(config.from_mapping(spec(), users))
    assert source.users_train.max() == 0 and source.scale == 16.0


def test_a_path_is_made_whole_and_the_content_named(tmp_path, monkeypatch):
    in_file(tmp_path / "mine.npz")
    monkeypatch.chdir(tmp_path)
    built = config.from_mapping(spec(), {"data.name": "npz", "data.path": "mine.npz"})
    options = dict(built.data.options.pairs)
    assert options["path"] == str(tmp_path / "mine.npz") and len(options["digest"]) == 16
    assert config.from_mapping(built.to_dict()) == built


def test_a_file_that_has_changed_is_read_again_and_never_gone_on_with(tmp_path):
    overrides = in_file(tmp_path / "mine.npz")
    often = spec(checkpoint={"every": 1})
    old = fedjax_sec.run(often, rounds=2, out=tmp_path / "run", **overrides)
    in_file(tmp_path / "mine.npz", x_train=PARTS["x_train"] // 2)
    new = fedjax_sec.run(often, rounds=2, **overrides)
    apart = np.abs(
        new.params["params"]["output"]["kernel"] - old.params["params"]["output"]["kernel"]
    )
    assert apart.max() > 1e-3
    with pytest.raises(ConfigError, match="data.options.digest"):
        fedjax_sec.run(often, rounds=4, out=tmp_path / "run", resume=True, **overrides)
    with pytest.raises(ConfigError, match="mine.npz' has changed: its digest is"):
        old.experiment.data.dataset().load()
    in_file(tmp_path / "mine.npz")
    fedjax_sec.run(often, rounds=4, out=tmp_path / "run", resume=True, **overrides)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"x_train": None}, "holds no array 'x_train'"),
        ({"x_trian": np.zeros(3)}, "holds 'x_trian'. Did you mean 'x_train'"),
        ({"x_train": np.array([object()])}, "is no file of numpy.savez that can be read"),
        ({"y_test": PARTS["y_test"] + 1}, "holds labels from 1 to 10"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, content, words):
    overrides = in_file(tmp_path / "mine.npz", **content)
    with pytest.raises(ConfigError, match=words):
        fedjax_sec.run(spec(), **overrides)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(MissingDataError, match="data.path: there is no file .*none.npz"):
        fedjax_sec.run(spec(), **{"data.name": "npz", "data.path": str(tmp_path / "none.npz")})
    with pytest.raises(MissingDataError, match="data.path is required"):
        fedjax_sec.run(spec(), **{"data.name": "npz"})
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ConfigError, match="text.npz' is no file of numpy.savez"):
        fedjax_sec.run(spec(), **{"data.name": "npz", "data.path": str(tmp_path / "text.npz")})


def test_accuracy_is_of_the_users_own_test_part():
    """A test part of one class that the model never sees right."""
    flipped = (PARTS["y_test"] + 1) % 10
    good, bad = (
        fedjax_sec.run(spec(rounds=20), data=one).metrics["accuracy"][-1]
        for one in (given(), given(y_test=flipped))
    )
    close(good + bad <= 1.0, True)
    assert good > 0.3 > bad

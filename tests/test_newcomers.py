"""What `fedjax_sec.run` says to those who hand it objects and arrays."""

import dataclasses

import flax.linen as nn
import numpy as np
import optax
import pytest
from flax import nnx

import fedjax_sec
from fedjax_sec.core import ConfigError, registry
from fedjax_sec.core.advice import shown
from fedjax_sec.data.sources.digits import Digits

X, Y = np.full((30, 4), 0.125, np.float32), np.zeros(30, np.int32)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(x)


class Other(nnx.Module):
    pass


@dataclasses.dataclass
class Mine:
    name: str = "mlp"  # no reason to take it for ours


def said(config=None, /, **arguments):
    """The one line that is said, before anything is loaded; it holds no number of an array."""
    with pytest.raises(ConfigError) as caught:
        fedjax_sec.run({} if config is None else config, **arguments)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400 and "0.125" not in message, message
    return message


@pytest.mark.parametrize("given", [Mine(), lambda x: x])
def test_a_model_is_given_by_name(given):
    message = said(model=given)
    assert "None" not in message
    assert "To use a model of your own, derive its class from Network of" in message
    assert "@registry.models.register('NAME'), see CONTRIBUTING.md" in message


@pytest.mark.parametrize(
    ("key", "given", "kind"),
    [
        ("defense", X, "a defense"),
        ("attack", Mine(), "an attack"),
        ("client", print, "a client"),
        ("data", {"partition": X}, "a partition"),
        ("evaluation", {"evasions": [print]}, "an evasion"),
    ],
)
def test_so_is_every_other_component(key, given, kind):
    assert f"To use {kind} of your own, derive its class from" in said(**{key: given})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (Net, "Give an instance, Net()."),
        ({"name": Net()}, "Give the module itself as the model: fedjax_sec.run(config, model=Net"),
        (Other(), "Modules of flax.nnx cannot be used; write a flax.linen.Module"),
    ],
)
def test_a_module_of_flax_is_given_as_an_instance(given, words):
    assert words in said(model=given)


def test_modules_and_functions_are_models_and_defenses_that_have_to_fit():
    message = said(model=Net())
    assert "Net gives outputs of shape [2, 8, 8, 10] for two inputs [2, 8, 8, 1]" in message
    for given in (np.median, [np.median]):
        assert "numpy.median fails on updates [K, D]" in said(defense=given)


def test_a_class_of_ours_is_given_by_name_or_built():
    message = said(model=registry.models.get("mlp"))
    assert message.endswith("Give its name, 'mlp', or an instance, Mlp().")
    built = registry.models.build({"name": "mlp", "hidden": [3]})
    result = fedjax_sec.runs.config.from_mapping({"model": built}).model
    assert result == built


@pytest.mark.parametrize(
    "given",
    [
        (X, Y),
        [X, Y],
        X,
        Digits().load(),
        {"x": X, "y": Y},
        {"name": (X, Y)},
        {"x_train": X},
        {"name": "digits", "train": [X, Y]},
    ],
)
def test_data_is_given_by_name(given):
    message = said(data=given)
    assert "arrays cannot be given here, only the name of a data set, such as {name:" in message
    assert "@registry.datasets.register('NAME'), see CONTRIBUTING.md" in message


def test_numbers_of_a_normalisation_may_be_arrays():
    result = fedjax_sec.runs.config.from_mapping({"data": {"mean": np.zeros(1), "std": np.ones(1)}})
    assert result.data.mean == (0.0,) and result.data.std == (1.0,)


def test_an_optimizer_is_given_by_name():
    message = said(server={"optimizer": optax.sgd(0.1)})
    assert "such as {name: sgd, learning_rate: 0.1}, got GradientTransformation" in message


@pytest.mark.parametrize("given", [Net(), (X, Y), X, 3, b"file", None, {1: 2}, {"a": X}])
def test_what_is_no_configuration_is_refused(given):
    with pytest.raises(ConfigError) as caught:
        fedjax_sec.run(given)
    assert "\n" not in str(caught.value) and "0.125" not in str(caught.value)


@pytest.mark.parametrize("name", ["out", "profile", "on_evaluation"])
def test_other_arguments_are_checked_before_anything_is_computed(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wanted = "a function" if name == "on_evaluation" else "the path of a folder"
    assert said({"rounds": 1}, **{name: 3}) == f"{name} must be {wanted}, got 3."
    assert not list(tmp_path.iterdir())


def test_no_array_is_printed():
    assert shown([X, Y]) == "a list of 2 values, among them arrays"
    assert shown((1, X)) == "a tuple of 2 values, among them arrays"
    assert shown([1, 2]) == "[1, 2]"

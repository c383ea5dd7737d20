"""optax's optimizers: which are taken, and what their arguments may be."""

import functools
import inspect

import jax.numpy as jnp
import optax
import pytest
from helpers import small

from fedjax_sec import core
from fedjax_sec.core import ConfigError, optimizers
from fedjax_sec.runs import config

GIVEN = {
    "learning_rate": 0.1,
    "init_value": 0.1,
    "end_value": 0.01,
    "peak_value": 0.2,
    "value": 0.1,
    "decay_steps": 9,
    "transition_steps": 9,
    "warmup_steps": 2,
    "decay_rate": 0.5,
    "power": 1.0,
    "interpolate_type": "linear",
}


def required(name, function):
    parameters = inspect.signature(function).parameters.values()
    return {p.name: GIVEN[p.name] for p in parameters if optimizers.is_required(name, p)}


def candidates():
    """The functions of optax that take a learning rate, by their signatures."""
    for name, function in vars(optax).items():
        made = inspect.isfunction(function) or isinstance(function, functools.partial)
        if name.startswith("_") or not made:
            continue
        parameters = inspect.signature(function).parameters
        if any(word in parameters for word in ("learning_rate", "max_learning_rate")):
            yield name


@pytest.mark.parametrize("name", sorted(set(candidates())))
def test_every_optimizer_descends_or_is_refused_with_a_reason(name):
    if name not in optimizers.OPTIMIZERS:
        with pytest.raises(ConfigError, match=rf"optax.{name} cannot be used here: it"):
            optimizers.build({"name": name, "learning_rate": 0.1}, "client.optimizer")
        return
    optimizer = optimizers.build({"name": name, **required(name, optimizers.OPTIMIZERS[name])})
    step, params = optimizer.transformation(), jnp.full(3, 2.0)
    state = step.init(params)
    for _ in range(3):
        update, state = step.update(2 * params, state, params)
        params = params + update
    assert jnp.sum(params**2) < 12.0, "three steps do not lower the loss |w|^2"


@pytest.mark.parametrize("functions", [optimizers.OPTIMIZERS, optimizers.SCHEDULES])
def test_every_number_has_both_ends(functions):
    for name, function in functions.items():
        for key, parameter in inspect.signature(function).parameters.items():
            if optimizers.hint_of(name, parameter) in (int, float, float | None):
                allowed = optimizers.range_of(name, key)
                assert all(core.ends(allowed)) or allowed.get("unbounded"), (name, key)


@pytest.mark.parametrize("name", sorted(optimizers.SCHEDULES))
def test_every_schedule_of_optax_round_trips(name):
    rate = {"name": name, **required(name, optimizers.SCHEDULES[name])}
    if "boundaries_and_scales" in inspect.signature(optimizers.SCHEDULES[name]).parameters:
        rate["boundaries_and_scales"] = {9: 0.5, 4: 0.1}
    experiment = config.from_mapping(
        small(server={"optimizer": {"name": "sgd", "learning_rate": rate}})
    )
    again = config.from_mapping(experiment.to_dict())
    assert again == experiment and hash(again.structure()) == hash(experiment.structure())
    step = experiment.server.optimizer.transformation()
    assert step.init(jnp.zeros(2)) is not None
    written = experiment.to_dict()["server"]["optimizer"]["learning_rate"]
    assert written == rate


BAD = [
    ({"learning_rate": None}, "o.learning_rate: expected a number, got null."),
    ({"learning_rate": True}, "o.learning_rate: expected a number, got True (bool)."),
    ({"learning_rate": "0.1"}, "o.learning_rate: expected a number, got '0.1' (str)."),
    ({"learning_rate": -0.1}, "o.learning_rate must be >= 0, got -0.1."),
    ({"learning_rate": float("nan")}, "o.learning_rate must be a finite number, got nan."),
    ({"learning_rate": [0.1]}, "o.learning_rate: expected a number, got [0.1] (list)."),
    ({}, "o.learning_rate is required by optax.sgd."),
    ({"name": "adadelta"}, "o.learning_rate is required by optax.adadelta."),
    ({"momentum": 1.5}, "o.momentum must be >= 0 and <= 1, got 1.5."),
    ({"momentum": "big"}, "o.momentum: expected a number, got 'big' (str)."),
    ({"nesterov": 1}, "o.nesterov: expected true or false, got 1 (int)."),
    ({"nesterov": "yes"}, "o.nesterov: expected true or false, got 'yes' (str)."),
    ({"accumulator_dtype": "int7"}, "o.accumulator_dtype must be one of 'float32', 'bfloat16', "),
    ({"momentun": 0.9}, "o: optax.sgd has no argument 'momentun'. Did you mean 'momentum'?"),
    ({"name": "adam", "b1": 1}, "o.b1 must be >= 0 and < 1, got 1.0."),
    ({"name": "adam", "eps": -1e-8}, "o.eps must be >= 0 and <= 1000000, got -1e-08."),
    ({"name": "adamw", "weight_decay": -1}, "o.weight_decay must be >= 0 and <= 1000000, got"),
    ({"name": "adamw", "mask": "all"}, "o.mask: expected true or false, got 'all'"),
    ({"name": "lbfgs"}, "o.name: optax.lbfgs cannot be used here: it searches along a line"),
    ({"name": "polyak_sgd"}, "o.name: optax.polyak_sgd cannot be used here: its step depends"),
    ({"name": "scale_by_adam"}, "o.name: optax.scale_by_adam cannot be used here: it is a part"),
    ({"name": "adm"}, "o.name: optax has no optimizer 'adm'. Did you mean 'adam'? Known: "),
    ({"name": ["sgd"]}, "o.name: the name of optax's optimizer is text, got ['sgd']."),
    ({"name": {}}, "o.name: the name of optax's optimizer is text, got {}."),
    ({"learning_rate": {"values": {0: 1}}}, "o.learning_rate: expected a number, one of optax's"),
    ({"learning_rate": {"name": "sgdr_schedule"}}, "sgdr_schedule cannot be used here: it takes a"),
    ({"learning_rate": {"name": "cosine"}}, "Did you mean 'cosine_decay_schedule'?"),
    ({"learning_rate": {"name": "cosine_decay_schedule"}}, "o.learning_rate.init_value is requ"),
    (
        {"learning_rate": {"name": "cosine_decay_schedule", "init_value": 0.1}},
        "o.learning_rate.decay_steps is required by optax.cosine_decay_schedule.",
    ),
    (
        {"learning_rate": {"name": "cosine_decay_schedule", "init_value": 0.1, "decay_steps": 1.5}},
        "o.learning_rate.decay_steps: expected an integer, got 1.5 (float).",
    ),
    (
        {"learning_rate": {"name": "cosine_decay_schedule", "init_value": 0.1, "decay_steps": 0}},
        "o.learning_rate.decay_steps must be >= 1, got 0.",
    ),
    (
        {
            "learning_rate": {
                "name": "piecewise_constant_schedule",
                "init_value": 0.1,
                "boundaries_and_scales": {"a": 1},
            }
        },
        "o.learning_rate.boundaries_and_scales: a step: expected an integer, got 'a' (str).",
    ),
    (
        {"name": "adafactor", "min_dim_size_to_factor": 2.5},
        "o.min_dim_size_to_factor: expected an integer, got 2.5 (float).",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments(change, message):
    spec = {"name": "sgd"} | change
    if "adadelta" not in spec["name"] and change:
        spec = {"learning_rate": 0.1} | spec
    with pytest.raises(ConfigError) as error:
        optimizers.build(spec, "o")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_optax_cannot_build_is_found_at_once():
    rate = {
        "name": "piecewise_interpolate_schedule",
        "init_value": 0.1,
        "interpolate_type": "linear",
        "boundaries_and_scales": {3: 0.5},
    }
    assert optimizers.build({"name": "sgd", "learning_rate": rate})
    rate = {
        "name": "warmup_cosine_decay_schedule",
        "init_value": 0,
        "peak_value": 0.1,
        "warmup_steps": 9,
        "decay_steps": 3,
    }
    with pytest.raises(ConfigError, match="o: optax.sgd cannot be made of these arguments: ") as e:
        optimizers.build({"name": "sgd", "learning_rate": rate}, "o")
    assert "\n" not in str(e.value)

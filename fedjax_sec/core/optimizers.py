"""Optax's optimizers by their own names, with their floating-point arguments traced.

`{"name": "sgd", "learning_rate": 0.1, "momentum": 0.9}` is `optax.sgd(0.1, momentum=0.9)`. A
learning rate may be one of optax's schedules, `{"name": "cosine_decay_schedule", "init_value": 0.1,
"decay_steps": 100}`, which counts the steps that the optimizer itself has taken. Every number may
be a schedule over rounds, `{"schedule": "steps", "values": {0: 0.1, 100: 0.01}}`, like any numeric
field.

Arguments pass the same gate as fields (`admit`): optax checks neither types nor ranges.
"""

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from fedjax_sec.core import registry
from fedjax_sec.core.advice import one_line, shown, suggestion
from fedjax_sec.core.components import Component
from fedjax_sec.core.fields import ANY_RATE, COUNT, ConfigError, pytree
from fedjax_sec.core.schedule import Schedule, build_schedule
from fedjax_sec.core.values import admit, dump, plain

#: optax's optimizers that cannot be used here, and why. `scale_by_...` are parts of optimizers,
#: without the sign that makes a step descend.
UNUSABLE = {
    "lbfgs": "it searches along a line, for which local training hands over no loss",
    "polyak_sgd": "its step depends on the loss, which local training does not hand over",
    "noisy_sgd": "it draws its noise from a key of its own, the same at every client and in every "
    "round; add noise with the defense 'gaussian_noise'",
    "sgdr_schedule": "it takes a list of mappings; give a schedule over rounds, "
    "{schedule: steps, values: {0: 0.1, 100: 0.01}}",
}


def _functions(test) -> dict[str, Any]:
    functions = {}
    for name, function in vars(optax).items():
        usable = inspect.isfunction(function) or isinstance(function, functools.partial)
        if name.startswith(("_", "scale_by_")) or not usable:
            continue
        if test(name, inspect.signature(function).parameters):
            functions[name] = function
    return functions


OPTIMIZERS = _functions(
    lambda name, parameters: next(iter(parameters), "") == "learning_rate" and name not in UNUSABLE
)
SCHEDULES = _functions(
    lambda name, parameters: name.endswith(("_schedule", "_decay")) and name not in UNUSABLE
)

#: Arguments that optimizers and schedules share, by name: the ends of numbers, choices of words.
_RATE = {"low": 0, "unbounded": ANY_RATE}
_SHARE = {"low": 0, "high": 1}
_SIZE = {"low": 0, "high": 1e6}
_FACTOR = {"above": 0, "high": 1e6}
_STEPS = {"low": 1, "high": COUNT}
_ENDS = (
    (_RATE, "learning_rate init_value peak_value end_value value"),
    ({"low": 0, "below": 1}, "b1 b2 b3"),
    (_SHARE, "momentum decay rho decay_rate eta_minus"),
    (_SIZE, "eps eps_root weight_decay weight_decay_rate alpha beta optimism threshold"),
    (_SIZE, "initial_scale initial_accumulator_value min_norm trust_coefficient"),
    (_FACTOR, "min_step_size max_step_size clipping_threshold exponent power"),
    (_FACTOR, "div_factor final_div_factor"),
    (_STEPS, "decay_steps transition_steps warmup_steps min_dim_size_to_factor"),
    ({"low": 0, "high": COUNT}, "transition_begin decay_offset"),
    ({"above": 0, "below": 1}, "pct_start pct_final"),
    ({"low": 1, "high": 1e6}, "eta_plus"),
    ({"choices": ("linear", "cosine")}, "interpolate_type"),
)
RANGES = {name: allowed for allowed, names in _ENDS for name in names.split()}
#: Where a name means something else in one function than in the others.
SPECIAL = {
    ("signum", "beta"): {"low": 0, "below": 1},
    ("cosine_decay_schedule", "alpha"): _SHARE,
    ("exponential_decay", "decay_rate"): _FACTOR,
    ("warmup_exponential_decay_schedule", "decay_rate"): _FACTOR,
}
_TYPES = ("mu_dtype", "accumulator_dtype", "dtype_momentum")
_DTYPES = ("float32", "bfloat16", "float16")


@pytree
class Optimizer(Component):
    """An optax optimizer as a pytree: `traced` arguments can be swept, `fixed` ones recompile.

    >>> build({"name": "sgd", "learning_rate": 0.1}, "client.optimizer").traced
    {'learning_rate': 0.1}
    """

    registered_name: str = dataclasses.field(metadata={"static": True})
    traced: dict[str, Any]
    fixed: tuple[tuple[str, Any], ...] = dataclasses.field(metadata={"static": True})

    def transformation(self) -> optax.GradientTransformation:
        """The optax transformation with these arguments (possibly tracers)."""
        fixed = {name: _thaw(value) for name, value in self.fixed}
        return OPTIMIZERS[self.registered_name](**self.traced, **fixed)

    @property
    def rate(self):
        """The learning rate where a step is minus it times the gradient, else None.

        >>> build({"name": "sgd", "learning_rate": 0.5}).rate
        0.5
        """
        alone = self.registered_name == "sgd" and set(self.traced) == {"learning_rate"}
        alone = alone and not any(value for _, value in self.fixed)  # momentum: null is none
        return self.traced["learning_rate"] if alone else None

    @property
    def learning_rate(self):
        """The learning rate, whatever the rule; None where it counts steps, or there is none.

        >>> build({"name": "sgd", "learning_rate": 0.5, "momentum": 0.9}).learning_rate
        0.5
        """
        return self.traced.get("learning_rate")

    def dump_spec(self) -> dict:
        """The name and arguments as they stand in a configuration."""
        fixed = {name: _dump(value) for name, value in self.fixed}
        traced = {key: dump(value) for key, value in self.traced.items()}
        return {"name": self.registered_name, **traced, **fixed}


def build(spec, path: str = "optimizer") -> Optimizer:
    """Builds an optimizer from its optax name or a mapping with `name` and optax's arguments.

    Raises `ConfigError` for a name or an argument that optax does not know, a value of another type
    or beyond its range, and arguments of which optax makes no optimizer.
    """
    spec = plain(spec.dump_spec() if isinstance(spec, Optimizer) else spec)
    spec = {"name": spec} if isinstance(spec, str) else spec
    if not isinstance(spec, Mapping) or "name" not in spec:
        raise ConfigError(
            f"{path}: expected a mapping with 'name' and arguments, such as "
            f"{{name: sgd, learning_rate: 0.1}}, got {shown(spec)}."
        )
    arguments = dict(spec)
    name = _known(arguments.pop("name"), OPTIMIZERS, "optimizer", path)
    parameters = _parameters(OPTIMIZERS[name], name, arguments, path)
    traced, fixed = {}, {}
    for key, value in arguments.items():
        at, parameter = f"{path}.{key}", parameters[key]
        hint = hint_of(name, parameter)
        if isinstance(value, Schedule) or (isinstance(value, Mapping) and "schedule" in value):
            if not _takes_float(hint):
                raise ConfigError(f"{at} is no number, so it cannot follow a schedule.")
            traced[key] = build_schedule(value, hint, at, range_of(name, key))
        elif isinstance(value, Mapping) and key == "learning_rate":
            fixed[key] = _build_schedule(value, at)
        else:
            value = admit(value, hint, range_of(name, key), at)
            (traced if isinstance(value, (float, Tracer)) else fixed)[key] = value
    optimizer = Optimizer(name, traced, tuple(sorted(fixed.items())))
    _try(name, tuple(sorted(traced)), optimizer.fixed, path)
    return optimizer


def _known(name, functions: Mapping, kind: str, path: str) -> str:
    name = plain(name)
    if not isinstance(name, str):
        raise ConfigError(f"{path}.name: the name of optax's {kind} is text, got {shown(name)}.")
    if name in functions:
        return name
    if name.startswith("scale_by_") and hasattr(optax, name):
        reason = "it is a part of an optimizer, without the sign that makes a step descend"
    else:
        reason = UNUSABLE.get(name)
    if reason:
        raise ConfigError(f"{path}.name: optax.{name} cannot be used here: {reason}.")
    raise ConfigError(
        f"{path}.name: optax has no {kind} {shown(name)}.{suggestion(name, functions)} "
        f"Known: {', '.join(sorted(functions))}."
    )


def _parameters(function, name: str, arguments: Mapping, path: str) -> Mapping:
    """The function's parameters, `arguments` being some of them, and all that are required."""
    parameters = inspect.signature(function).parameters
    for key in arguments:
        if key not in parameters:
            raise ConfigError(
                f"{path}: optax.{name} has no argument {shown(key)}.{suggestion(key, parameters)} "
                f"It takes: {', '.join(parameters)}."
            )
    for key, parameter in parameters.items():
        if is_required(name, parameter) and key not in arguments:
            raise ConfigError(f"{path}.{key} is required by optax.{name}.")
    return parameters


def is_required(name: str, parameter) -> bool:
    """Whether the argument must be given: without a rate, all but `adafactor` climb the loss."""
    if parameter.name == "learning_rate":
        return name != "adafactor"
    return parameter.default is inspect.Parameter.empty


def hint_of(name: str, parameter):
    """The type of an argument, from optax's default or, where that says nothing, annotation."""
    default, key = parameter.default, parameter.name
    if key in _TYPES:
        return str | None
    if "mask" in key:
        return bool | None
    if key == "boundaries_and_scales":
        return dict
    if key == "interpolate_type":
        return str
    for kind in (bool, int, float):
        if isinstance(default, kind) or parameter.annotation is kind:
            return kind | None if key == "clipping_threshold" else kind
    return float if is_required(name, parameter) else float | None


def range_of(name: str, key: str) -> Mapping:
    """The ends or choices of an argument, as the metadata of a field."""
    if key in _TYPES:
        return {"choices": (*_DTYPES, None)}
    return SPECIAL.get((name, key), RANGES.get(key, {}))


def _takes_float(hint) -> bool:
    return hint in (float, float | None)


def _build_schedule(spec, path):
    arguments = dict(spec)
    if "name" not in arguments:
        raise ConfigError(
            f"{path}: expected a number, one of optax's schedules, such as {{name: "
            f"cosine_decay_schedule, init_value: 0.1, decay_steps: 100}}, or a schedule over "
            f"rounds, {{schedule: steps, values: {{0: 0.1, 100: 0.01}}}}, got {shown(spec)}."
        )
    name = _known(arguments.pop("name"), SCHEDULES, "schedule", path)
    parameters = _parameters(SCHEDULES[name], name, arguments, path)
    pairs = []
    for key, value in arguments.items():
        at = f"{path}.{key}"
        value = admit(value, hint_of(name, parameters[key]), range_of(name, key), at)
        if isinstance(value, dict):  # step -> factor; hashable, as a part of the structure
            steps = [admit(step, int, _STEPS, f"{at}: a step") for step in value]
            factors = [admit(v, float, _SIZE, f"{at}.{k}") for k, v in value.items()]
            value = ("points", *zip(*sorted(zip(steps, factors, strict=True)), strict=True))
        pairs.append((key, value))
    return ("schedule", name, tuple(sorted(pairs)))


def _is_schedule(value) -> bool:
    return isinstance(value, tuple) and len(value) == 3 and value[0] == "schedule"


def _dump(value):
    if not _is_schedule(value):
        return value
    return {"name": value[1], **{key: _points(one) for key, one in value[2]}}


def _thaw(value):
    if not _is_schedule(value):
        return value
    return SCHEDULES[value[1]](**{key: _points(one) for key, one in value[2]})


def _points(value):
    return dict(zip(*value[1:], strict=True)) if isinstance(value, tuple) else value


@functools.lru_cache(maxsize=256)
def _try(name: str, traced: tuple[str, ...], fixed: tuple, path: str) -> None:
    """Raises `ConfigError` where optax makes no optimizer of these arguments."""

    def step(values, params):
        optimizer = Optimizer(name, values, fixed).transformation()
        return optimizer.update(params, optimizer.init(params), params)[0]

    scalar, vector = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.float32)
    try:
        update = jax.eval_shape(step, dict.fromkeys(traced, scalar), vector)
    except Exception as error:  # whatever optax raises, it is about these arguments
        raise ConfigError(
            f"{path}: optax.{name} cannot be made of these arguments: {one_line(error)}"
        ) from error
    if update.shape != vector.shape:
        raise ConfigError(f"{path}: optax.{name} makes steps of shape {update.shape}.")


registry.BUILDERS["optimizer"] = build

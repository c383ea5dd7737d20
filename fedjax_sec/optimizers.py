"""Every optax optimizer by its own name, with its floating-point arguments traced.

`{"name": "sgd", "learning_rate": 0.1, "momentum": 0.9}` is `optax.sgd(0.1, momentum=0.9)`. A
learning rate may be one of optax's schedules, `{"name": "cosine_decay_schedule", "init_value": 0.1,
"decay_steps": 100}`, which counts the steps that the optimizer itself has taken. Every number may
be a schedule over rounds, `{"schedule": "steps", "values": {0: 0.1, 100: 0.01}}`, like any numeric
field.
"""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import optax

from fedjax_sec import schema
from fedjax_sec.schema import ConfigError


def _functions(test) -> dict[str, Any]:
    found = {}
    for name, function in vars(optax).items():
        if name.startswith("_") or not inspect.isfunction(function):
            continue
        if test(name, inspect.signature(function).parameters):
            found[name] = function
    return found


OPTIMIZERS = _functions(lambda name, parameters: next(iter(parameters), "") == "learning_rate")
SCHEDULES = _functions(lambda name, parameters: name.endswith(("_schedule", "_decay")))


@schema.pytree
class Optimizer:
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
        plain = self.registered_name == "sgd" and set(self.traced) == {"learning_rate"}
        plain = plain and not any(value for _, value in self.fixed)  # momentum: null is none
        return self.traced["learning_rate"] if plain else None

    def dump_spec(self) -> dict:
        """The name and arguments as they stand in a configuration."""
        fixed = {
            name: {"name": value[1], **dict(value[2])} if _is_schedule(value) else value
            for name, value in self.fixed
        }
        traced = {key: schema.dump(value) for key, value in self.traced.items()}
        return {"name": self.registered_name, **traced, **fixed}


def build(spec, path: str = "optimizer") -> Optimizer:
    """Builds an optimizer from its optax name or a mapping with `name` and optax's arguments.

    Raises `ConfigError` for a name or an argument that optax does not know.
    """
    if isinstance(spec, Optimizer):
        return spec
    spec = {"name": spec} if isinstance(spec, str) else spec
    if not isinstance(spec, Mapping) or "name" not in spec:
        raise ConfigError(f"{path}: expected a mapping with 'name' and arguments, got {spec!r}.")
    arguments = dict(spec)
    name = arguments.pop("name")
    if name not in OPTIMIZERS:
        raise ConfigError(
            f"{path}.name: optax has no optimizer {name!r}.{schema.suggestion(name, OPTIMIZERS)}"
        )
    parameters = inspect.signature(OPTIMIZERS[name]).parameters
    traced, fixed = {}, {}
    for key, value in arguments.items():
        at = f"{path}.{key}"
        if key not in parameters:
            raise ConfigError(
                f"{at}: optax.{name} has no argument {key!r}.{schema.suggestion(key, parameters)} "
                f"It takes: {', '.join(parameters)}."
            )
        if isinstance(value, schema.Schedule) or (
            isinstance(value, Mapping) and "schedule" in value
        ):
            if not _takes_float(parameters[key]):
                raise ConfigError(f"{at} is no number, so it cannot follow a schedule.")
            bounds = {"low": 0} if key == "learning_rate" else {}
            traced[key] = schema.build_schedule(value, float, at, bounds)
        elif isinstance(value, Mapping):
            fixed[key] = _build_schedule(value, at)
        elif isinstance(value, bool) or not _is_number(value, parameters[key]):
            fixed[key] = value
        else:
            traced[key] = schema.coerce(value, float, at)
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and key not in arguments:
            raise ConfigError(f"{path}.{key} is required by optax.{name}.")
    rate = traced.get("learning_rate")
    if isinstance(rate, float) and rate < 0:
        raise ConfigError(f"{path}.learning_rate must be >= 0, got {rate}.")
    for key in ("learning_rate", "momentum"):
        if isinstance(fixed.get(key), str):
            raise ConfigError(f"{path}.{key}: expected a number, got {fixed[key]!r} (str).")
    return Optimizer(name, traced, tuple(sorted(fixed.items())))


def _takes_float(parameter) -> bool:
    return isinstance(parameter.default, float) or parameter.name in ("learning_rate", "momentum")


def _is_number(value, parameter) -> bool:
    if isinstance(value, float) or hasattr(value, "dtype"):
        return True
    return isinstance(value, int) and _takes_float(parameter)


def _build_schedule(spec, path):
    arguments = dict(spec)
    name = arguments.pop("name", None)
    if name not in SCHEDULES:
        raise ConfigError(
            f"{path}.name: optax has no schedule {name!r}.{schema.suggestion(name, SCHEDULES)}"
        )
    parameters = inspect.signature(SCHEDULES[name]).parameters
    for key in arguments:
        if key not in parameters:
            raise ConfigError(
                f"{path}.{key}: optax.{name} has no argument {key!r}."
                f"{schema.suggestion(key, parameters)}"
            )
    return ("schedule", name, tuple(sorted(arguments.items())))


def _is_schedule(value) -> bool:
    return isinstance(value, tuple) and len(value) == 3 and value[0] == "schedule"


def _thaw(value):
    return SCHEDULES[value[1]](**dict(value[2])) if _is_schedule(value) else value

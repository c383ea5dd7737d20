"""The gate for values: plain Python, of the annotated type, finite and within the declared range.

Every value passes it, however it comes in; what has passed can be written and read again.
"""

import dataclasses
import enum
import math
import os
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fedjax_sec.core.advice import shown, suggestion
from fedjax_sec.core.fields import (
    LARGEST,
    SEED,
    SMALLEST,
    TECHNICAL,
    ConfigError,
    declared,
    describe_range,
    ends,
)


def is_list(value) -> bool:
    """Whether a value counts as a list in a configuration: a sequence that is no text or bytes.

    >>> is_list((1, 2)), is_list("text")
    (True, False)
    """
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def admit(value, hint, metadata: Mapping, path: str):
    """The gate: `value` in plain Python, of the annotated type, finite and within its range.

    A tracer is let through where a number is wanted: there is no value to check.

    >>> admit(np.int64(3), int, {"low": 1}, "rounds")
    3
    """
    value = coerce(value, hint, path)
    check_range(value, metadata, path)
    return value


def plain(value):
    """NumPy's and JAX's scalars as Python's, arrays as lists, enumerations and paths as values.

    >>> plain(np.float32(0.5)), plain(np.arange(2)), plain(np.True_)
    (0.5, [0, 1], True)
    """
    if isinstance(value, Tracer):
        return value
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, (np.generic, np.ndarray, jax.Array)):
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            return value
        return value.tolist() if value.ndim or value.dtype.char != "g" else float(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    for kind in (bool, int, float, str):  # subclasses, which YAML does not know
        if isinstance(value, kind):
            return kind(value)
    return value


def coerce(value, hint, path: str):
    """`plain(value)` as the annotated type, or a `ConfigError` that names what was expected.

    Integers pass as floats; nothing else is taken for another type.

    >>> coerce(1, float, "attack.z")
    1.0
    >>> coerce([32, 16], tuple[int, ...], "model.hidden")
    (32, 16)
    """
    given, value = value, plain(value)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        rest = [a for a in args if a is not type(None)]
        for arg in rest:
            try:
                return coerce(value, arg, path)
            except ConfigError:
                if len(rest) == 1:
                    raise
        names = " or ".join(_type_name(a) for a in args)
        raise ConfigError(f"{path}: expected {names}, got {_with_type(given)}.")
    if origin is Literal:
        if value in args:
            return value
        raise ConfigError(
            f"{path} must be one of {', '.join(map(repr, args))}, got {shown(value)}."
            f"{suggestion(value, args)}"
        )
    if origin is tuple:
        if is_list(value):
            return tuple(coerce(v, args[0], f"{path}[{i}]") for i, v in enumerate(value))
    elif origin is dict or hint is dict:
        if isinstance(value, Mapping):
            return dict(value)
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return _finite(value, path)
        if isinstance(value, Tracer) and value.ndim == 0:
            return value
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, float) and value.is_integer() and abs(value) <= SEED:
            raise ConfigError(
                f"{path}: expected an integer, got {_with_type(given)}; write {shown(int(value))}."
            )
    elif hint is str and isinstance(value, str) and "${" in value:
        raise ConfigError(
            f"{path}: '${{...}}' in {shown(value)} is a reference, which only a file resolves, and "
            f"only to its own keys; give the value itself."
        )
    elif isinstance(value, hint):
        return value
    raise ConfigError(f"{path}: expected {_type_name(hint)}, got {_with_type(given)}.")


def _with_type(value) -> str:
    if value is None:
        return "null"
    return f"{shown(value)} ({type(value).__name__})"


def _finite(value, path: str) -> float:
    """The number as a float that float32 can hold, in which everything is computed."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path} must be a finite number, got {value!r}.")
    if abs(value) > LARGEST:
        raise ConfigError(
            f"{path}: {shown(value)} is beyond {LARGEST:.4g}, the largest number that is computed "
            f"with (float32)."
        )
    if value != 0 and abs(value) < SMALLEST:
        raise ConfigError(
            f"{path}: {shown(value)} would be computed with as 0; the smallest number of float32 "
            f"is {SMALLEST:.4g}."
        )
    return float(value)


def _type_name(hint) -> str:
    names = {
        int: "an integer",
        float: "a number",
        str: "a string",
        bool: "true or false",
        type(None): "null",
        dict: "a mapping",
    }
    if hint in names:
        return names[hint]
    if typing.get_origin(hint) is tuple:
        return f"a list ({_type_name(typing.get_args(hint)[0])} each)"
    return str(hint)


def check_range(value, metadata: Mapping, path: str) -> None:
    """Raises `ConfigError` when a value lies outside the declared range or choices."""
    choices = metadata.get("choices")
    if choices and value not in choices:
        raise ConfigError(
            f"{path} must be {describe_range(metadata)}, got {shown(value)}."
            f"{suggestion(value, choices)}"
        )
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            check_range(item, {**metadata, "choices": None}, f"{path}[{i}]")
        return
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    low, high = metadata.get("low"), metadata.get("high")
    above, below = metadata.get("above"), metadata.get("below")
    # Rounded to float32, a number beside an exclusive end may lie on it.
    near = np.float32(value) if isinstance(value, float) else value
    too_small = (low is not None and value < low) or (above is not None and near <= above)
    too_large = (high is not None and value > high) or (below is not None and near >= below)
    if too_small or too_large:
        technical = high in TECHNICAL and too_small
        allowed = ends(metadata)[0] if technical else describe_range(metadata)
        advice = ""
        if metadata.get("pixels") and 1 < value <= 255:
            advice = f" Pixels are in [0, 1]: {value:g} of 255 is {value / 255:.4g}."
        raise ConfigError(f"{path} must be {allowed}, got {shown(value)}.{advice}")


def own_name(cls: type) -> str:
    """The name by which every configuration knows a class; empty where nobody has registered it.

    That of its parents is not its own, and one that was given as an object has its qualified name.
    """
    name = vars(cls).get("registered_name", "")
    return "" if name == name_of(cls) else name


def name_of(cls: type) -> str:
    """The name under which a class is written that nobody has registered."""
    return f"{cls.__module__}.{cls.__qualname__}"


def dump(obj, objects: bool = False) -> Any:
    """The plain mapping (YAML-ready) from which `build` makes an equal object.

    A component is written as a mapping with its registered `name`; a list of components as a list.
    With `objects`, components that hold an object of Python's own stay as they are, and so do
    instances of classes that nobody has registered.
    """
    given = getattr(obj, "registered_name", None) and not own_name(type(obj))
    if objects and (given or getattr(obj, "from_python", False)) and not isinstance(obj, type):
        return obj
    if objects and hasattr(obj, "stages"):  # a pipeline, one of which may hold some
        specs = [dump(stage, objects) for stage in obj.stages]
        return specs[0] if len(specs) == 1 else specs or None
    if hasattr(obj, "dump_spec"):
        return obj.dump_spec()
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        out = {}
        if name := getattr(obj, "registered_name", None):
            out["name"] = name
        for field in declared(obj):
            out[field.name] = dump(getattr(obj, field.name), objects)
        return out
    if isinstance(obj, (tuple, list)):
        return [dump(item, objects) for item in obj]
    if isinstance(obj, dict):
        return {key: dump(value, objects) for key, value in obj.items()}
    return plain(obj)

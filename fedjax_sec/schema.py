"""The schema machinery: declared fields, strict building from plain mappings, and dumping back.

A configuration class is a frozen dataclass whose fields are declared with `numeric`, `static` or
`component`. The declaration is the only place that knows a field's default, range, choices and
meaning; the YAML reader, the error messages and `fedjax-sec show` all read it from there.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the field, the value and the remedy."""


def _field(default, doc, **metadata):
    metadata["doc"] = doc
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=lambda: default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def numeric(default, doc: str, *, low=None, high=None, above=None, below=None):
    """A traced field: it can be swept or vmapped without a new compilation.

    `low`/`high` are inclusive bounds, `above`/`below` exclusive ones.
    """
    return _field(default, doc, low=low, high=high, above=above, below=below)


def static(default, doc: str, *, low=None, high=None, above=None, below=None, choices=None):
    """A field that fixes shapes or control flow: a new value is a new compilation."""
    return _field(
        default, doc, static=True, low=low, high=high, above=above, below=below, choices=choices
    )


def component(kind: str, default, doc: str, *, many: bool = False, optional: bool = False):
    """A nested component of the registry `kind`: a name, a mapping, or (with `many`) a list.

    A mapping without `name` changes fields of the default.
    """
    return _field(default, doc, kind=kind, many=many, optional=optional)


def section(cls, doc: str):
    """A nested mapping with a fixed schema of its own."""
    return dataclasses.field(default_factory=cls, metadata={"doc": doc, "section": cls})


def suggestion(name, known) -> str:
    """`" Did you mean 'krum'?"`, or nothing when no known name is near.

    >>> suggestion("kurm", ["krum", "mean"])
    " Did you mean 'krum'?"
    """
    near = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def describe_range(metadata: Mapping) -> str:
    """The allowed values of a field in words: `one of a, b`, `>= 0 and < 1`, or an empty string."""
    if metadata.get("choices"):
        return "one of " + ", ".join(repr(c) for c in metadata["choices"])
    signs = (("low", ">="), ("above", ">"), ("high", "<="), ("below", "<"))
    return " and ".join(f"{sign} {metadata[k]}" for k, sign in signs if metadata.get(k) is not None)


def build(cls, spec: Mapping | None, path: str, builders: Mapping[str, Any] | None = None):
    """Builds the dataclass `cls` from a mapping; unknown keys and bad values are `ConfigError`s.

    `builders[kind](spec, path)` builds the nested components declared with `component(kind, ...)`.
    """
    spec = {} if spec is None else spec
    if not isinstance(spec, Mapping):
        raise ConfigError(f"{path}: expected a mapping of fields, got {spec!r}.")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in spec:
        if key not in fields:
            where = path or "The experiment"
            raise ConfigError(
                f"{where}: unknown key {key!r}.{suggestion(key, fields)} "
                f"Known keys: {', '.join(fields) or '(none)'}."
            )
    hints = typing.get_type_hints(cls)
    values = {}
    for name, field in fields.items():
        at = f"{path}.{name}" if path else name
        if name in spec:
            given = spec[name]
        elif field.default is not dataclasses.MISSING:
            given = field.default
        elif field.default_factory is not dataclasses.MISSING:
            given = {} if field.metadata.get("section") else field.default_factory()
        else:
            raise ConfigError(f"{at} is required. {field.metadata.get('doc', '')}")
        values[name] = _build_value(field, hints[name], given, at, builders or {})
    return cls(**values)


def _build_value(field, hint, value, path, builders):
    meta = field.metadata
    if "section" in meta:
        return build(meta["section"], value, path, builders)
    if "kind" in meta:
        builder = builders[meta["kind"]]
        if meta["many"]:
            items = () if value is None else value
            items = items if _is_list(items) else [items]
            return tuple(
                builder(item, f"{path}[{i}]" if len(items) > 1 else path)
                for i, item in enumerate(items)
            )
        if isinstance(value, Mapping) and "name" not in value:
            value = {**_default_spec(field), **value}
        return None if value is None and meta["optional"] else builder(value, path)
    value = coerce(value, hint, path)
    check_range(value, meta, path)
    return value


def _default_spec(field) -> Mapping:
    """The specification of a component that is not given, which a mapping without name changes."""
    default = field.default
    if default is dataclasses.MISSING:
        default = field.default_factory()
    if isinstance(default, str):
        return {"name": default}
    return default if isinstance(default, Mapping) else {}


def _is_list(value) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def coerce(value, hint, path: str):
    """`value` as the annotated type, or a `ConfigError` that names what was expected.

    Integers pass as floats; nothing else is converted.

    >>> coerce(1, float, "attack.z")
    1.0
    >>> coerce([32, 16], tuple[int, ...], "model.hidden")
    (32, 16)
    """
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
        raise ConfigError(f"{path}: expected {names}, got {value!r} ({type(value).__name__}).")
    if origin is Literal:
        if value in args:
            return value
        raise ConfigError(
            f"{path} must be one of {', '.join(map(repr, args))}, got {value!r}."
            f"{suggestion(value, args)}"
        )
    if origin is tuple:
        if _is_list(value):
            return tuple(coerce(v, args[0], f"{path}[{i}]") for i, v in enumerate(value))
    elif origin is dict or hint is dict:
        if isinstance(value, Mapping):
            return dict(value)
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if not math.isfinite(value):
                raise ConfigError(f"{path} must be a finite number, got {value!r}.")
            return float(value)
        if _is_scalar_array(value):
            return value
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif isinstance(value, hint):
        return value
    raise ConfigError(
        f"{path}: expected {_type_name(hint)}, got {value!r} ({type(value).__name__})."
    )


def _is_scalar_array(value) -> bool:
    return hasattr(value, "dtype") and getattr(value, "ndim", None) == 0


def _type_name(hint) -> str:
    names = {
        int: "an integer", float: "a number", str: "a string", bool: "true or false",
        type(None): "null", dict: "a mapping",
    }  # fmt: skip
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
            f"{path} must be {describe_range(metadata)}, got {value!r}.{suggestion(value, choices)}"
        )
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            check_range(item, {**metadata, "choices": None}, f"{path}[{i}]")
        return
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    low, high = metadata.get("low"), metadata.get("high")
    above, below = metadata.get("above"), metadata.get("below")
    if (
        (low is not None and value < low)
        or (high is not None and value > high)
        or (above is not None and value <= above)
        or (below is not None and value >= below)
    ):
        raise ConfigError(f"{path} must be {describe_range(metadata)}, got {value!r}.")


def dump(obj) -> Any:
    """The plain mapping (YAML-ready) from which `build` makes an equal object.

    A component is written as a mapping with its registered `name`; a list of components as a list.
    """
    if hasattr(obj, "dump_spec"):
        return obj.dump_spec()
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        out = {}
        if name := getattr(obj, "registered_name", None):
            out["name"] = name
        for field in dataclasses.fields(obj):
            out[field.name] = dump(getattr(obj, field.name))
        return out
    if isinstance(obj, (tuple, list)):
        return [dump(item) for item in obj]
    if isinstance(obj, dict):
        return {key: dump(value) for key, value in obj.items()}
    return obj.item() if _is_scalar_array(obj) else obj

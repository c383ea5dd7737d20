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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the field, the value and the remedy."""


def _field(default, doc, **metadata):
    metadata["doc"] = doc
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=lambda: default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def numeric(default, doc: str, *, low=None, high=None, above=None, below=None):
    """A traced field: swept or vmapped without a new compilation; it can follow a `Schedule`.

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


def pytree(cls):
    """Class decorator: a frozen dataclass that is a pytree, `static` fields in its structure.

    `jax.tree_util.register_dataclass` will not do. Up to JAX 0.10.2 it gives two classes equal
    structures where they have equally many leaves and equal static values; a compiled function
    that takes either then now and then runs the program of the other.

    >>> @pytree
    ... class Mean:
    ...     scale: float = numeric(1.0, "A factor.")
    >>> @pytree
    ... class Median:
    ...     scale: float = numeric(1.0, "A factor.")
    >>> jax.tree.structure(Mean()) == jax.tree.structure(Median())
    False
    >>> jax.tree.map(lambda leaf: 2 * leaf, Mean())
    Mean(scale=2.0)
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(cls)
    fixed = tuple(field.name for field in fields if field.metadata.get("static"))
    traced = tuple(field.name for field in fields if not field.metadata.get("static"))

    def flatten(obj):
        return [getattr(obj, n) for n in traced], tuple(getattr(obj, n) for n in fixed)

    def flatten_with_keys(obj):
        children, values = flatten(obj)
        keys = map(jax.tree_util.GetAttrKey, traced)
        return list(zip(keys, children, strict=True)), values

    def unflatten(values, children):
        return cls(**dict(zip(traced + fixed, (*children, *values), strict=True)))

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


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


def choices(component, field: str) -> tuple:
    """The declared choices of a component's field; empty where any value will do."""
    found = next(f.metadata for f in dataclasses.fields(component) if f.name == field)
    return tuple(found.get("choices") or ())


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
    if isinstance(value, (Schedule, Mapping)):
        if not meta.get("static"):
            return build_schedule(value, hint, path, meta)
        if isinstance(value, Schedule) or value.keys() == {"schedule", "values"}:
            raise ConfigError(
                f"{path} fixes shapes or control flow, so it cannot follow a schedule; "
                f"only numeric fields can."
            )
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


# --- Nested components --------------------------------------------------------------------------


def walk(part, path: str = "") -> Iterator[tuple[str, Any]]:
    """The component and every component nested in its fields, with their paths, outermost first.

    Needs, backdoors and checks are looked up by it, so no wrapper can forget one.

    >>> @pytree
    ... class Inner:
    ...     scale: float = numeric(1.0, "A factor.")
    >>> @pytree
    ... class Outer:
    ...     first: Any = component("attack", None, "A component.")
    >>> [path for path, _ in walk(Outer(Outer(Inner())), "attack")]
    ['attack', 'attack.first', 'attack.first.first']
    """
    yield path, part
    for field in dataclasses.fields(part):
        if "kind" not in field.metadata:
            continue
        value, at = getattr(part, field.name), f"{path}.{field.name}" if path else field.name
        items = value if isinstance(value, (tuple, list)) else (value,)
        for i, item in enumerate(items):
            if dataclasses.is_dataclass(item):
                yield from walk(item, f"{at}[{i}]" if len(items) > 1 else at)


def needing(parts: Iterable, need: str) -> list[str]:
    """Names of the components, nested ones too, whose class attribute `need` is true."""
    everything = (one for part in parts for _, one in walk(part))
    return [one.registered_name for one in everything if getattr(one, need, False)]


# --- Schedules ----------------------------------------------------------------------------------

SCHEDULES = {
    "steps": "each value from its round on",
    "linear": "straight lines between the points, constant outside them",
}


@pytree
class Schedule:
    """A numeric field that changes from round to round: `values[i]` is its value at `rounds[i]`.

    Points and values are leaves, so schedules of one kind with equally many points share a
    compiled program. `round.py` replaces every schedule by its value before a component sees it.
    """

    kind: str = dataclasses.field(metadata={"static": True})
    rounds: tuple[Any, ...]
    values: tuple[Any, ...]

    def at(self, index) -> Any:
        """The value in round number `index`, counted from 0; everything may be traced.

        >>> Schedule("steps", (0, 100), (0.0, 4.0)).at(jnp.arange(99, 101)).tolist()
        [0.0, 4.0]
        >>> Schedule("linear", (10, 20), (1.0, 2.0)).at(jnp.array([0, 15, 20, 90])).tolist()
        [1.0, 1.5, 2.0, 2.0]
        """
        value = self.values[0]
        for i in range(1, len(self.rounds)):
            begin, end, new = self.rounds[i - 1], self.rounds[i], self.values[i]
            if self.kind == "linear":
                share = jnp.clip((index - begin) / (end - begin), 0.0, 1.0)
                # As a weighted sum it is exact at both ends.
                new = self.values[i - 1] * (1.0 - share) + new * share
                value = jnp.where(index > begin, new, value)
            else:
                value = jnp.where(index >= end, new, value)
        return value

    def number_at(self, index: int) -> float | int:
        """As `at`, of Python numbers alone."""
        if self.kind == "linear":
            return float(np.interp(index, self.rounds, self.values))
        return [v for r, v in zip(self.rounds, self.values, strict=True) if r <= index][-1]

    def dump_spec(self) -> dict:
        """The mapping from which `build_schedule` makes an equal schedule."""
        plain = [[dump(item) for item in part] for part in (self.rounds, self.values)]
        return {"schedule": self.kind, "values": dict(zip(*plain, strict=True))}


def build_schedule(spec, hint, path: str, metadata: Mapping) -> Schedule:
    """A schedule from `{schedule: steps or linear, values: {round: value}}`, every value checked.

    >>> build_schedule({"schedule": "steps", "values": {0: 0, 9: 4}}, float, "x", {}).values
    (0.0, 4.0)
    """
    spec = dict(spec.dump_spec() if isinstance(spec, Schedule) else spec)
    if "schedule" not in spec:
        raise ConfigError(
            f"{path}: expected a number, or a schedule such as "
            f"{{schedule: steps, values: {{0: 0.1, 100: 0.01}}}}, got {spec!r}."
        )
    for key in spec:
        if key not in ("schedule", "values"):
            raise ConfigError(
                f"{path}: a schedule has no key {key!r}.{suggestion(key, ('schedule', 'values'))} "
                f"Known keys: schedule, values."
            )
    kind, points = spec["schedule"], spec.get("values")
    if kind not in SCHEDULES:
        known = ", ".join(f"{name} ({doc})" for name, doc in SCHEDULES.items())
        raise ConfigError(
            f"{path}.schedule: unknown {kind!r}.{suggestion(kind, SCHEDULES)} Known: {known}."
        )
    if not isinstance(points, Mapping) or not points:
        raise ConfigError(
            f"{path}.values must map rounds to values, such as {{0: 0.1, 100: 0.01}}, "
            f"got {points!r}."
        )
    args = [a for a in typing.get_args(hint) or (hint,) if a is not type(None)]
    found = {}
    for key, value in points.items():
        number = int(key) if isinstance(key, str) and key.isdigit() else key
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise ConfigError(f"{path}.values: a round must be an integer >= 0, got {key!r}.")
        if number in found:
            raise ConfigError(f"{path}.values: round {number} is given twice.")
        found[number] = coerce(value, args[0], f"{path}.values.{number}")
        check_range(found[number], metadata, f"{path}.values.{number}")
    if kind == "steps" and 0 not in found:
        raise ConfigError(
            f"{path}.values: steps need a value for round 0, the first is for round {min(found)}."
        )
    if kind == "linear" and len(found) < 2:
        raise ConfigError(f"{path}.values: a linear schedule needs at least two rounds.")
    if kind == "linear" and args[0] is int:
        raise ConfigError(f"{path} is an integer, which a linear schedule would leave; use steps.")
    return Schedule(kind, tuple(sorted(found)), tuple(found[key] for key in sorted(found)))


def _is_schedule(node) -> bool:
    return isinstance(node, Schedule)


def _map_schedules(function, tree):
    return jax.tree.map(
        lambda leaf: function(leaf) if _is_schedule(leaf) else leaf, tree, is_leaf=_is_schedule
    )


def resolve(tree, index):
    """The tree of components with every schedule replaced by its value in round `index`."""
    return _map_schedules(lambda schedule: schedule.at(index), tree)


def has_schedules(tree) -> bool:
    """Whether a field anywhere in the tree of components follows a schedule."""
    return any(map(_is_schedule, jax.tree.leaves(tree, is_leaf=_is_schedule)))


def every_value(component) -> Iterator[Any]:
    """The component as it is in each round where one of its schedules has a point.

    Python numbers throughout, for checks; a component without schedules alone.
    """
    leaves = jax.tree.leaves(component, is_leaf=_is_schedule)
    rounds = {number for leaf in leaves if _is_schedule(leaf) for number in leaf.rounds}
    if not rounds:
        yield component
    for number in sorted(rounds):
        yield _map_schedules(lambda schedule, at=number: schedule.number_at(at), component)

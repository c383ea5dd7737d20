"""The schema machinery: declared fields, strict building from plain mappings, and dumping back.

A configuration class is a frozen dataclass whose fields are declared with `numeric`, `static` or
`component`. The declaration is the only place that knows a field's default, range, choices and
meaning; the YAML reader, the error messages and `fedjax-sec show` all read it from there.

Every value passes one gate, however it comes in: `build` converts it to plain Python (`plain`),
then checks its type, finiteness and range. What has passed can be written and read again.
"""

import dataclasses
import enum
import math
import os
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sec.advice import nearest, shown, suggestion

#: The largest count: JAX computes positions in int32.
COUNT = 2**31 - 1
#: The largest seed: JAX's keys hold 32 bits of it, so seeds s and s + 2**32 would be one.
SEED = 2**32 - 1
#: The largest and the smallest magnitude of a float32 that is not flushed to zero.
LARGEST, SMALLEST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)
#: Limits of the arithmetic alone: a message names them only where they are passed.
_TECHNICAL = (COUNT, SEED)

#: Why a field has no upper end.
ANY_SCALE = "lengths of updates depend on network and learning rate"
ANY_RATE = "the lengths of gradients depend on the network; a run that diverges says so"


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the field, the value and the remedy."""


def _field(default, doc, **metadata):
    metadata["doc"] = doc
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=lambda: default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def numeric(
    default, doc: str, *, low=None, high=None, above=None, below=None, unbounded="", pixels=False
):
    """A traced field: swept or vmapped without a new compilation; it can follow a `Schedule`.

    `low`/`high` are inclusive bounds, `above`/`below` exclusive ones; every field has both ends,
    or says in `unbounded` why not. `pixels` marks a value in units of pixels in [0, 1].
    """
    return _field(
        default, doc, low=low, high=high, above=above, below=below, unbounded=unbounded,
        pixels=pixels,
    )  # fmt: skip


def static(
    default, doc: str, *, low=None, high=None, above=None, below=None, unbounded="", choices=None
):
    """A field that fixes shapes or control flow: a new value is a new compilation."""
    return _field(
        default, doc, static=True, low=low, high=high, above=above, below=below,
        unbounded=unbounded, choices=choices,
    )  # fmt: skip


def component(
    kind: str, default, doc: str, *, many: bool = False, optional: bool = False, either=()
):
    """A nested component of the registry `kind`: a name, a mapping, or (with `many`) a list.

    A mapping without `name` changes fields of the default. Of the fields `either`, which exclude
    one another, the default's yields to the one that is given.
    """
    return _field(default, doc, kind=kind, many=many, optional=optional, either=either)


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


def ends(metadata: Mapping) -> tuple[str, str]:
    """The lower and the upper end of a field in words, such as `>= 0` and `< 1`, or empty.

    >>> ends({"low": 0, "below": 1})
    ('>= 0', '< 1')
    """
    signs = ((("low", ">="), ("above", ">")), (("high", "<="), ("below", "<")))
    return tuple(
        next((f"{sign} {metadata[k]:.10g}" for k, sign in side if metadata.get(k) is not None), "")
        for side in signs
    )


def describe_range(metadata: Mapping) -> str:
    """The allowed values of a field in words: `one of a, b`, `>= 0 and < 1`, or an empty string."""
    if metadata.get("choices"):
        return "one of " + ", ".join(repr(c) for c in metadata["choices"])
    return " and ".join(filter(None, ends(metadata)))


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
        at = path or f"The {cls.__name__.lower()}"
        named = isinstance(spec, str) and spec.isidentifier() and len(spec) <= 40
        named = named and "name" in {field.name for field in dataclasses.fields(cls)}
        such = f", such as {{name: {spec}}}" if named else ""
        raise ConfigError(f"{at}: expected a mapping of fields{such}, got {shown(spec)}.")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in spec:
        if not isinstance(key, str) or key not in fields:
            raise UnknownKey(cls, path, key)
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


def rebuild(obj, path: str, builders: Mapping[str, Any] | None = None):
    """The dataclass instance with every field taken through the gate again.

    Python code may have made it with any values; JAX, which puts tracers into the fields, does not
    come by here.
    """
    values = {field.name: getattr(obj, field.name) for field in dataclasses.fields(obj)}
    return build(type(obj), values, path, builders)


class UnknownKey(ConfigError):
    """A key that `cls` does not have at `path`. `advice` may replace the nearest of its keys."""

    def __init__(self, cls, path: str, key, advice: str | None = None):
        known = [field.name for field in dataclasses.fields(cls)]
        self.cls, self.path, self.key = cls, path, key
        self.near = nearest(key, known)
        advice = suggestion(key, known) if advice is None else advice
        super().__init__(
            f"{path or f'The {cls.__name__.lower()}'}: unknown key {shown(key)}.{advice} "
            f"Known keys: {', '.join(known) or '(none)'}."
        )


def _build_value(field, hint, value, path, builders):
    meta = field.metadata
    if "section" in meta:
        if isinstance(value, meta["section"]):
            return rebuild(value, path, builders)
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
            value = {**default_spec(field, value), **value}
        return None if value is None and meta["optional"] else builder(value, path)
    if isinstance(value, (Schedule, Mapping)):
        if not meta.get("static"):
            return build_schedule(value, hint, path, meta)
        if isinstance(value, Schedule) or value.keys() == {"schedule", "values"}:
            raise ConfigError(
                f"{path} fixes shapes or control flow, so it cannot follow a schedule; "
                f"only numeric fields can."
            )
    return admit(value, hint, meta, path)


def default_spec(field, given: Mapping = types.MappingProxyType({})) -> dict:
    """The specification of a component that is not given, which a mapping without name changes.

    Of the fields that exclude one another, those that yield to `given` are left out.
    """
    default = field.default
    if default is dataclasses.MISSING:
        default = field.default_factory()
    if isinstance(default, str):
        return {"name": default}
    if not isinstance(default, Mapping):
        return {}
    either = field.metadata["either"]
    chosen = any(given.get(key) is not None for key in either)
    return {key: one for key, one in default.items() if not (chosen and key in either)}


def _is_list(value) -> bool:
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
    if isinstance(value, jax.core.Tracer):
        return value
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, (np.generic, np.ndarray, jax.Array)):
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            return value
        return float(value) if isinstance(value, np.longdouble) else value.tolist()
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
        if _is_list(value):
            return tuple(coerce(v, args[0], f"{path}[{i}]") for i, v in enumerate(value))
    elif origin is dict or hint is dict:
        if isinstance(value, Mapping):
            return dict(value)
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return _finite(value, path)
        if isinstance(value, jax.core.Tracer) and value.ndim == 0:
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
        technical = high in _TECHNICAL and too_small
        allowed = ends(metadata)[0] if technical else describe_range(metadata)
        advice = ""
        if metadata.get("pixels") and 1 < value <= 255:
            advice = f" Pixels are in [0, 1]: {value:g} of 255 is {value / 255:.4g}."
        raise ConfigError(f"{path} must be {allowed}, got {shown(value)}.{advice}")


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
    return plain(obj)


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
            f"{{schedule: steps, values: {{0: 0.1, 100: 0.01}}}}, got {shown(spec)}."
        )
    for key in spec:
        if key not in ("schedule", "values"):
            raise ConfigError(
                f"{path}: a schedule has no key {shown(key)}."
                f"{suggestion(key, ('schedule', 'values'))} "
                f"Known keys: schedule, values."
            )
    kind, points = spec["schedule"], spec.get("values")
    if not isinstance(kind, str) or kind not in SCHEDULES:
        known = ", ".join(f"{name} ({doc})" for name, doc in SCHEDULES.items())
        raise ConfigError(
            f"{path}.schedule: unknown {shown(kind)}.{suggestion(kind, SCHEDULES)} Known: {known}."
        )
    if not isinstance(points, Mapping) or not points:
        raise ConfigError(
            f"{path}.values must map rounds to values, such as {{0: 0.1, 100: 0.01}}, "
            f"got {shown(points)}."
        )
    args = [a for a in typing.get_args(hint) or (hint,) if a is not type(None)]
    found = {}
    for key, value in points.items():
        number = plain(key)
        if isinstance(number, str) and number.isascii() and number.isdigit() and len(number) < 11:
            number = int(number)
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= COUNT:
            most = f" and <= {COUNT}" if isinstance(number, int) and number > COUNT else ""
            raise ConfigError(
                f"{path}.values: a round must be an integer >= 0{most}, got {shown(key)}."
            )
        if number in found:
            raise ConfigError(f"{path}.values: round {number} is given twice.")
        found[number] = admit(value, args[0], metadata, f"{path}.values.{number}")
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

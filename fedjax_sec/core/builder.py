"""Strict building of components from plain mappings; unknown keys and bad values are errors."""

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any

from fedjax_sec.core.advice import nearest, shown, suggestion
from fedjax_sec.core.fields import ConfigError, declared
from fedjax_sec.core.schedule import Schedule, build_schedule
from fedjax_sec.core.values import admit, is_list

# A sweep builds the same few classes for every cell.
_hints = functools.lru_cache(maxsize=512)(typing.get_type_hints)


def build(cls, spec: Mapping | None, path: str, builders: Mapping[str, Any] | None = None):
    """Builds the dataclass `cls` from a mapping; unknown keys and bad values are `ConfigError`s.

    `builders[kind](spec, path)` builds the nested components declared with `component(kind, ...)`.
    """
    spec = {} if spec is None else spec
    if not isinstance(spec, Mapping):
        at = path or f"The {cls.__name__.lower()}"
        named = isinstance(spec, str) and spec.isidentifier() and len(spec) <= 40
        named = named and "name" in {field.name for field in declared(cls)}
        such = f", such as {{name: {spec}}}" if named else ""
        raise ConfigError(f"{at}: expected a mapping of fields{such}, got {shown(spec)}.")
    fields = {f.name: f for f in declared(cls)}
    for key in spec:
        if not isinstance(key, str) or key not in fields:
            raise UnknownKey(cls, path, key)
    hints = _hints(cls)
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


def build_choice(
    classes: Mapping[str, type], spec: Mapping, path: str, what: str = "name", **beside
):
    """Builds one of `classes`, which a mapping with `name` and fields chooses.

    `beside` are fields that were given beside the mapping, None where they were not; `what` is what
    an unknown name is called.

    Raises: `ConfigError` for an unknown name, or a field that is given twice with other values.
    """
    fields = {key: value for key, value in spec.items() if key != "name"}
    name = spec.get("name")
    if not isinstance(name, str) or name not in classes:
        raise ConfigError(
            f"{path}: unknown {what} {shown(name)}.{suggestion(name, classes)} Known: "
            f"{', '.join(classes)}."
        )
    for field, value in beside.items():
        if value is None:
            continue
        if fields.get(field, value) != value:
            raise ConfigError(
                f"{path}.{field} = {shown(fields[field])} and {field} = {shown(value)} contradict "
                f"each other; leave one of the two out."
            )
        fields[field] = value
    return build(classes[name], fields, path)


def rebuild(obj, path: str, builders: Mapping[str, Any] | None = None):
    """The dataclass instance with every field taken through the gate again.

    Python code may have made it with any values; JAX, which puts tracers into the fields, does not
    come by here.
    """
    values = {field.name: getattr(obj, field.name) for field in declared(obj)}
    return build(type(obj), values, path, builders)


class UnknownKey(ConfigError):
    """A key that `cls` does not have at `path`. `advice` may replace the nearest of its keys."""

    def __init__(self, cls, path: str, key, advice: str | None = None):
        known = [field.name for field in declared(cls)]
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
            items = items if is_list(items) else [items]
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

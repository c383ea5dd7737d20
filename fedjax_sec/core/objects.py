"""Objects of Python's own in place of a component's name: functions, flax modules, own classes.

A configuration only names them, so whoever goes on with a run gives them again.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from fedjax_sec.core.components import BASES, STAGES, with_defaults
from fedjax_sec.core.fields import ConfigError, declared, pytree
from fedjax_sec.core.values import own_name, plain


def _is_module(given: Any) -> bool:
    """Whether it looks like an instance of a linen module, without an import of flax."""
    names = {f"{cls.__module__}.{cls.__name__}" for cls in type(given).__mro__}
    return "flax.linen.module.Module" in names


def _is_function(given: Any) -> bool:
    return callable(given) and not isinstance(given, type) and not hasattr(given, "registered_name")


#: kind -> whether an object is one, and the component and its field that hold it.
_HOLDERS = {
    "model": (_is_module, "module", "module"),
    "defense": (_is_function, "function", "function"),
    "attack": (_is_function, "update_function", "function"),
}


def held(kind: str, given: Any) -> Any:
    """The specification of the component that holds an object; everything else as it is.

    >>> held("defense", len)
    {'name': 'function', 'function': <built-in function len>}
    >>> held("model", "mlp")
    'mlp'
    """
    if kind in _HOLDERS:
        fits, name, field = _HOLDERS[kind]
        if fits(given):
            return {"name": name, field: given}
    return given


def qualified(given: Any) -> Any:
    """`package.module.function` of what can be called; everything else as it is.

    >>> import functools
    >>> qualified(functools.partial(max, 3)), qualified("mine.rule")
    ('builtins.max', 'mine.rule')
    """
    if not callable(given):
        return given
    inner = getattr(given, "func", given)  # of a functools.partial
    name = getattr(inner, "__qualname__", type(inner).__qualname__)
    return f"{getattr(inner, '__module__', None) or type(inner).__module__}.{name}"


def is_component(cls: type, kind: str) -> bool:
    """Whether a class says that it is a component of the kind: by its base, or by its `stage`."""
    base = BASES[kind]
    bases = tuple(base.values()) if isinstance(base, dict) else (base,)
    if cls in bases:
        return False
    return issubclass(cls, bases) or vars(cls).get("stage") in STAGES.get(kind, ())


def instance(given: Any, kind: str, path: str) -> Any:
    """An instance of a component's class, from an instance or from the class itself.

    The class becomes what `register` would make of it, but nobody can name it.

    Raises: `ConfigError` for a class that is no component of the kind.
    """
    cls = given if isinstance(given, type) else type(given)
    decorated = "__dataclass_params__" in vars(cls)
    if not decorated:
        cls = pytree(cls)
    made, values = given, {} if isinstance(given, type) else vars(given)
    if odd := values.keys() - {field.name for field in declared(cls)}:
        raise ConfigError(
            f"{path}: {cls.__name__} sets {sorted(odd)[0]!r} itself; declare it as a field, such "
            f"as scale: float = numeric(1.0, ...), and decorate the class with "
            f"fedjax_sec.core.pytree, see CONTRIBUTING.md."
        )
    try:
        with_defaults(cls, kind)
        if isinstance(given, type) or not decorated:
            made = cls(**values)
    except TypeError as error:
        raise ConfigError(f"{path}: {error}") from None
    if jax.tree_util.all_leaves([made]):
        raise ConfigError(
            f"{path}: {cls.__name__} is a dataclass that JAX does not know; decorate it with "
            f"fedjax_sec.core.pytree in place of dataclasses.dataclass."
        )
    return made


def described(given: Any) -> Any:
    """An object as a mapping for people, with what is not at its default; others as they are.

    >>> described(len)
    {'name': 'len'}
    """
    if _is_function(given) and not dataclasses.is_dataclass(given):
        inner = getattr(given, "func", given)  # of a functools.partial
        return {"name": getattr(inner, "__name__", type(inner).__name__)}
    if isinstance(given, type):
        return {"name": own_name(given) or given.__name__}
    if not dataclasses.is_dataclass(given):
        return given
    fields = {
        field.name: getattr(given, field.name)
        for field in declared(given)
        if field.name not in ("parent", "name")  # of flax
    }
    defaults = {field.name: field.default for field in declared(given)}
    changed = {
        name: value
        for name, value in fields.items()
        if isinstance(plain(value), (bool, int, float, str, tuple)) and value != defaults[name]
    }
    return {"name": own_name(type(given)) or type(given).__name__, **changed}


def parts_of(obj: Any) -> Iterator[Any]:
    """Every dataclass instance inside an experiment, the outermost first."""
    if isinstance(obj, (tuple, list)):
        for one in obj:
            yield from parts_of(one)
    elif dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        yield obj
        for field in dataclasses.fields(obj):
            yield from parts_of(getattr(obj, field.name))

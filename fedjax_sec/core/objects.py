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


def _named(cls: type) -> set[str]:
    """A class and its bases, as `package.module.Class`."""
    return {f"{one.__module__}.{one.__name__}" for one in cls.__mro__}


def _is_module(given: Any) -> bool:
    """Whether it looks like an instance of a linen module, without an import of flax."""
    return "flax.linen.module.Module" in _named(type(given))


def advice_on_module(given: Any) -> str:
    """Advice for modules of flax that stand where none can; else nothing."""
    cls = given if isinstance(given, type) else type(given)
    names = _named(cls)
    if "flax.linen.module.Module" in names:
        if cls is given:
            return f" Give an instance, {cls.__name__}()."
        call = f"fedjax_sec.run(config, model={cls.__name__}())"
        return f" Give the module itself as the model: {call}."
    if "flax.nnx.module.Module" in names:
        return " Modules of flax.nnx cannot be used; write a flax.linen.Module, give an instance."
    return ""


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


def refuse_missing(function: Any, path: str, key: str) -> None:
    """Raises `ConfigError` unless a component's function is there, which no file brings back."""
    if not callable(function):
        named = f" {function!r}" if isinstance(function, str) else ""
        raise ConfigError(
            f"{path}: the function{named} is Python's and in no file; give it again: "
            f"fedjax_sec.run(config, {key}=FUNCTION)."
        )


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


def _bases(kind: str) -> tuple[type, ...]:
    base = BASES[kind]
    return tuple(base.values()) if isinstance(base, dict) else (base,)


def bases_of(kind: str) -> list[str]:
    """The names of the classes that components of a kind derive from.

    >>> bases_of("attack")
    ['DataAttack', 'UpdateAttack']
    """
    return sorted({base.__name__ for base in _bases(kind)})


def is_component(cls: type, kind: str) -> bool:
    """Whether a class says that it is a component of the kind: by its base, or by its `stage`."""
    bases = _bases(kind)
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
        undecorated = any(is_component(type(given), kind) for kind in BASES)
        return {"name": type(given).__name__} if undecorated else given
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

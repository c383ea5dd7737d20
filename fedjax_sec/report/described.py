"""A component, section or optimizer in words and rows, for `fedjax-sec show` and its page."""

import inspect
from collections.abc import Iterator
from typing import NamedTuple

from fedjax_sec.core import optimizers, registry
from fedjax_sec.report import keys


class Description(NamedTuple):
    """The name and kind of what a configuration names, its docstring, and a row for each field."""

    name: str
    kind: str
    text: str
    rows: list[keys.Row]


def component(kind: str, name: str) -> Description:
    """A component of a registry.

    >>> component("defense", "krum").rows[0].key
    'num_byzantine'
    """
    return _of_class(name, kind, registry.KINDS[kind].get(name))


def section(name: str) -> Description:
    """A part of a configuration that is no component, such as `data`."""
    return _of_class(name, "section", keys.SECTIONS[name])


def function(name: str) -> Description:
    """An optimizer or a schedule of a learning rate, which are optax's."""
    kind = "optimizer" if name in optimizers.OPTIMIZERS else "schedule of a learning rate"
    return Description(name, kind, f"optax.{name}", keys.arguments(name))


def _of_class(name: str, kind: str, cls) -> Description:
    text = inspect.cleandoc(cls.__doc__ or "")
    if text.startswith(f"{cls.__name__}("):  # a dataclass without a docstring has its signature
        text = ""
    return Description(name, kind, text, keys.fields(cls))


def every(name: str) -> Iterator[Description]:
    """The descriptions of a name: of the section, else of the components and the function.

    Raises: `ConfigError` with the nearest name for one that is nowhere.

    >>> [one.kind for one in every("sgd")]
    ['client', 'optimizer']
    """
    if name in keys.SECTIONS:
        yield section(name)
        return
    functions = optimizers.OPTIMIZERS | optimizers.SCHEDULES
    if name not in functions:
        registry.find(name, (*functions, *keys.SECTIONS, "optimizer"))
    for kind, known in registry.KINDS.items():
        if name in known.names():
            yield component(kind, name)
    if name in functions:
        yield function(name)

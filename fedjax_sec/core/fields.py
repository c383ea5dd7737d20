"""Declared fields: the only place that knows a field's default, range, choices and meaning.

A configuration class is a frozen dataclass whose fields are declared with `numeric`, `static`,
`component` or `section`. The YAML reader, the error messages and `fedjax-sec show` all read the
declaration.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, dataclass_transform

import jax
import numpy as np

T = TypeVar("T")

#: The largest count: JAX computes positions in int32.
COUNT = 2**31 - 1
#: The largest seed: JAX's keys hold 32 bits of it, so seeds s and s + 2**32 would be one.
SEED = 2**32 - 1
#: The largest magnitude of a float32.
LARGEST = float(np.finfo(np.float32).max)
#: The smallest magnitude of a float32 that is not flushed to zero.
SMALLEST = float(np.finfo(np.float32).tiny)
#: Limits of the arithmetic alone: a message names them only where they are passed.
TECHNICAL = (COUNT, SEED)

#: Why a field of updates' lengths has no upper end.
ANY_SCALE = "lengths of updates depend on network and learning rate"
#: Why a learning rate has no upper end.
ANY_RATE = "the lengths of gradients depend on the network; a run that diverges says so"


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the field, the value and the remedy."""


def _field(default, doc, **metadata):
    metadata["doc"] = doc
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=lambda: default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def numeric(
    default,
    doc: str,
    *,
    low=None,
    high=None,
    above=None,
    below=None,
    unbounded: str = "",
    pixels: bool = False,
    default_from: str | None = None,
    compiles: Any = True,
) -> Any:
    """A traced field: swept or vmapped without a new compilation; it can follow a `Schedule`.

    `low`/`high` are inclusive bounds, `above`/`below` exclusive ones; every field has both ends,
    or says in `unbounded` why not. `pixels` marks a value in units of pixels in [0, 1].
    `default_from` names what fills the field where it is null: see `fill_defaults`.
    """
    ends = {"low": low, "high": high, "above": above, "below": below, "unbounded": unbounded}
    rest = {"pixels": pixels, "default_from": default_from, "compiles": compiles}
    return _field(default, doc, **ends, **rest)


def static(
    default,
    doc: str,
    *,
    low=None,
    high=None,
    above=None,
    below=None,
    unbounded: str = "",
    choices=None,
    default_from: str | None = None,
    compiles: Any = True,
) -> Any:
    """A field that fixes shapes or control flow: a new value is a new compilation.

    Unless `compiles` is false, for fields of sections that a compiled program does not depend on;
    or a function of the section, whose value then stands for the field's.
    """
    ends = {"low": low, "high": high, "above": above, "below": below, "unbounded": unbounded}
    rest = {"choices": choices, "default_from": default_from, "compiles": compiles}
    return _field(default, doc, static=True, **ends, **rest)


def component(
    kind: str,
    default,
    doc: str,
    *,
    many: bool = False,
    optional: bool = False,
    either=(),
    poisons: bool = True,
    compiles: Any = True,
) -> Any:
    """A nested component of the registry `kind`: a name, a mapping, or (with `many`) a list.

    A mapping without `name` changes fields of the default. Of the fields `either`, which exclude
    one another, the default's yields to the one that is given. `poisons=False`: an attack on data
    in this field does not poison the clients' examples.
    """
    options = {"many": many, "optional": optional, "either": either}
    return _field(default, doc, kind=kind, poisons=poisons, compiles=compiles, **options)


def given(doc: str) -> Any:
    """A field that the experiment fills, and no configuration: a part that belongs to another key.

    It is neither built nor dumped; `dataclasses.replace` sets it before the component is used.
    """
    return dataclasses.field(default=None, metadata={"doc": doc, "given": True})


def declared(cls) -> list[dataclasses.Field]:
    """The fields that a configuration may hold: all but the `given` ones."""
    return [field for field in dataclasses.fields(cls) if not field.metadata.get("given")]


def section(cls, doc: str) -> Any:
    """A nested mapping with a fixed schema of its own."""
    return dataclasses.field(default_factory=cls, metadata={"doc": doc, "section": cls})


@dataclass_transform(
    frozen_default=True,
    field_specifiers=(numeric, static, component, section, dataclasses.field),
)
def pytree(cls: type[T]) -> type[T]:
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
    made: Any = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(made)
    fixed = tuple(field.name for field in fields if field.metadata.get("static"))
    traced = tuple(field.name for field in fields if not field.metadata.get("static"))

    def flatten(obj):
        return [getattr(obj, n) for n in traced], tuple(getattr(obj, n) for n in fixed)

    def flatten_with_keys(obj):
        children, values = flatten(obj)
        keys = map(jax.tree_util.GetAttrKey, traced)
        return list(zip(keys, children, strict=True)), values

    def unflatten(values, children):
        return made(**dict(zip(traced + fixed, (*children, *values), strict=True)))

    jax.tree_util.register_pytree_with_keys(made, flatten_with_keys, unflatten, flatten)
    return made


def ends(metadata: Mapping) -> tuple[str, str]:
    """The lower and the upper end of a field in words, such as `>= 0` and `< 1`, or empty.

    >>> ends({"low": 0, "below": 1})
    ('>= 0', '< 1')
    """

    def first(*side: tuple[str, str]) -> str:
        return next(
            (f"{sign} {metadata[k]:.10g}" for k, sign in side if metadata.get(k) is not None), ""
        )

    return first(("low", ">="), ("above", ">")), first(("high", "<="), ("below", "<"))


def describe_range(metadata: Mapping) -> str:
    """The allowed values of a field in words: `one of a, b`, `>= 0 and < 1`, or an empty string."""
    if metadata.get("choices"):
        return "one of " + ", ".join(repr(c) for c in metadata["choices"])
    return " and ".join(filter(None, ends(metadata)))


def choices(component, field: str) -> tuple:
    """The declared choices of a component's field; empty where any value will do."""
    metadata = next(f.metadata for f in dataclasses.fields(component) if f.name == field)
    return tuple(metadata.get("choices") or ())

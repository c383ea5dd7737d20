"""The contract of every component: its description, its fields, and the gate that builds it."""

import contextlib
import dataclasses
import inspect
import itertools
import re
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
import yaml

from fedjax_sec import core
from fedjax_sec.core import ConfigError, fill_defaults
from fedjax_sec.testing.compare import close, expect, no_concrete_values
from fedjax_sec.testing.worlds import accepted

#: f of rules that ask for it. With f = 3 every score of Bulyan sums two distances or more: with
#: fewer, two clients tie, and the lower row wins whatever the order.
BYZANTINE = 3


def variants(base, setting, every_pair: bool = True) -> list:
    """The component as it comes, and with every choice of its fields that its check accepts."""
    base = fill_defaults(base, {"num_malicious": BYZANTINE})
    options = {}
    for field in dataclasses.fields(base):
        choices = field.metadata.get("choices")
        if field.metadata.get("static") and isinstance(getattr(base, field.name), bool):
            choices = (True, False)
        if choices:
            options[field.name] = choices
    if every_pair:
        combinations = [{}, *pairs_of(options)]
    else:
        combinations = [{}] + [{n: c} for n, choices in options.items() for c in choices]
    kept = []
    for changes in combinations:
        one = dataclasses.replace(base, **changes)
        if one not in kept and accepted(one, setting):
            kept.append(one)
    return kept


def pairs_of(options: dict[str, Sequence]) -> list[dict]:
    """Combinations in which every two values of different fields meet; few, found greedily.

    >>> len(pairs_of({"a": (1, 2), "b": (1, 2), "c": (1, 2)}))
    4
    """
    products = [dict(zip(options, p, strict=True)) for p in itertools.product(*options.values())]

    def pairs(one: dict) -> set:
        items = list(one.items())
        return set(itertools.combinations(items, 2)) or set(items)

    missing = set().union(*map(pairs, products)) if options else set()
    chosen = []
    while missing:
        best = max(products, key=lambda one: len(pairs(one) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def fixed_counts(component, value: int = 4):
    """The component with every optional count given, so that none depends on the rows' number."""
    changes = {
        field.name: value
        for field in core.declared(component)
        if field.metadata.get("static")
        and getattr(component, field.name) is None
        and "int" in str(field.type)
    }
    return dataclasses.replace(component, **changes)


def numeric_fields(component):
    """Names of the traced fields, with two values inside the allowed range of each."""
    for field in core.declared(component):
        meta = field.metadata
        if meta.get("static") or "kind" in meta or "section" in meta:
            continue
        low = next((meta[k] for k in ("low", "above") if meta.get(k) is not None), 0.0)
        high = next((meta[k] for k in ("high", "below") if meta.get(k) is not None), low + 1.0)
        low = max(low, 0.0)  # not at ends that are only a limit of what is sensible
        high = min(high, low + 1.0)
        whole = field.type in (int, "int")
        values = (0, 1) if whole else (low + 0.3 * (high - low), low + 0.7 * (high - low))
        yield field.name, values


def check_numeric_fields_are_traced(component, call, setting=None) -> None:
    """A new value does not retrace, and vmap over all values of all fields equals a loop over them.

    One program serves all fields, unless a value in place of `None` is a leaf more.
    """
    groups: dict = {}
    for name, values in numeric_fields(component):
        several = [dataclasses.replace(component, **{name: value}) for value in values]
        if setting is not None and not accepted(several[0], setting):
            continue
        shapes = {jax.tree.structure(one) for one in several}
        expect(len(shapes) == 1, f"field {name} is no leaf of the pytree")
        groups.setdefault(shapes.pop(), []).extend(several)
    for several in groups.values():
        with no_concrete_values("a numeric field"):
            chex.clear_trace_counter()  # it counts by the function's name
            jitted = jax.jit(chex.assert_max_traces(call, n=1))
            outputs = [jitted(one) for one in several]
            stack = jax.tree.map(lambda *leaf: jnp.stack([jnp.asarray(a) for a in leaf]), *several)
            mapped = jax.jit(jax.vmap(call))(stack)
        close(mapped, jax.tree.map(lambda *leaf: jnp.stack(leaf), *outputs), rtol=1e-4, atol=1e-5)


def check_described(cls) -> None:
    """A one-line summary, a source, a doctest, a frozen class, and a meaning for every field."""
    text = inspect.getdoc(cls) or ""
    first, *rest = text.splitlines() or [""]
    expect(first.strip(), "the first line of the docstring is empty")
    expect(not rest or not rest[0].strip(), "the summary is longer than a line")
    expect(first.rstrip().endswith("."), "the summary is no sentence")
    expect(any(line.startswith("Source:") for line in rest), "no 'Source:' section")
    expect("Example:" in (line.strip() for line in rest), "no 'Example:' section")
    expect(">>>" in text.split("Example:", 1)[1], "the example is no doctest")
    frozen = dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen
    expect(frozen, "the class is no frozen dataclass")
    for field in dataclasses.fields(cls):
        expect(field.metadata.get("doc"), f"field {field.name} says nothing about its meaning")


def check_ends(cls) -> None:
    """Every field that holds numbers has a lower and an upper end, or says why one is missing."""
    for field in dataclasses.fields(cls):
        meta = field.metadata
        if {"kind", "section", "given"} & meta.keys() or meta.get("choices"):
            continue
        if not re.search(r"\b(int|float)\b", str(field.type)):
            continue
        expect(
            all(core.ends(meta)) or meta.get("unbounded"),
            f"field {field.name} has the ends {core.ends(meta)}, and gives no reason (unbounded)",
        )


def check_gate(registry, component) -> None:
    """A built component passes the gate again; with a value that is none it does not.

    Scalars of NumPy and JAX are taken as the numbers that they are, and written as such.
    """
    expect(registry.build(component) == component, "it does not pass the gate a second time")
    for field in core.declared(component):
        meta = field.metadata
        if "kind" in meta or "section" in meta or meta.get("choices"):
            continue
        kinds = set(re.findall(r"\b(int|float|bool|str|None)\b", str(field.type)))
        for value, allowed in (
            (np.float32("nan"), ()),
            (jnp.inf, ()),
            (np.True_, ("bool",)),
            (None, ("None",)),
            ({"a": 1}, ()),
            ("${seed}", ()),
        ):
            if kinds.isdisjoint(allowed):
                changed = dataclasses.replace(component, **{field.name: value})
                with contextlib.suppress(ConfigError):
                    registry.build(changed)
                    raise AssertionError(f"field {field.name} takes {value!r}")
    for name, values in numeric_fields(component):
        for scalar in (np.asarray(values[1])[()], jnp.asarray(values[1])):
            built = registry.build(dataclasses.replace(component, **{name: scalar}))
            kept = type(getattr(built, name))
            expect(kept in (int, float), f"{name} stays {type(scalar)}")
            spec = core.dump(built)
            expect(yaml.safe_load(yaml.safe_dump(spec)) == spec, f"{name} is not written plainly")


def check_round_trip(registry, component) -> None:
    """What `dump` writes, `build` reads back."""
    spec = core.dump(component)
    expect(spec["name"] == component.registered_name, "it is written under another name")
    again = registry.build(spec)
    same = type(again) is type(component) and again == component
    expect(same, f"{spec} is read as {again}")
    expect(core.dump(again) == spec, "what is read back is written differently")

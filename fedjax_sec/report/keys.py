"""Every key of a configuration in rows, for `fedjax-sec show` and `docs/configuration.md`.

The page is made anew by `python -m fedjax_sec.report.keys > docs/configuration.md`.
"""

import dataclasses
import inspect
import typing
from collections.abc import Iterator
from typing import NamedTuple

from fedjax_sec import core
from fedjax_sec.core import optimizers, registry
from fedjax_sec.data.local_test import LocalTest
from fedjax_sec.data.root import Root
from fedjax_sec.runs import config
from fedjax_sec.sweeps import Sweep

#: Parts of a configuration that are no components: the name that `show` knows -> their fields.
SECTIONS = {
    "experiment": config.Experiment,
    "data": config.Data,
    "local_test": LocalTest,
    "server": config.Server,
    "root": Root,
    "threat": config.Threat,
    "evaluation": config.Evaluation,
    "checkpoint": config.Checkpoint,
    "execution": config.Execution,
    "sweep": Sweep,
}
_TYPES = {int: "an integer", float: "a number", bool: "true, false", str: "text", dict: "a mapping"}


class Row(NamedTuple):
    """One key: its default, the allowed values, how a new value is compiled, and its meaning."""

    key: str
    default: str
    allowed: str
    compiled: str
    meaning: str


def fields(cls) -> list[Row]:
    """A row for every field of a component or section.

    >>> fields(config.Checkpoint)[0][:3]
    ('every', '10', '>= 1 and <= 2147483647')
    """
    return [_row(field, hasattr(cls, "registered_name")) for field in dataclasses.fields(cls)]


def _row(field, of_component: bool) -> Row:
    meta, default = field.metadata, field.default
    if "section" in meta:
        return Row(field.name, "", "a mapping", "", meta["doc"])
    if default is dataclasses.MISSING:
        default = field.default_factory() if callable(field.default_factory) else "required"
    kind = meta.get("kind", "").removesuffix(" pipeline")
    kind = f"{kind}, or a list" if "pipeline" in meta.get("kind", "") or meta.get("many") else kind
    allowed = _allowed(meta) or kind or _type_of(field.type)
    compiled = "recompiles" if meta.get("static") else "traced"
    compiled = compiled if of_component else ""
    return Row(field.name, _text(default), allowed, compiled, meta.get("doc", ""))


def _text(default) -> str:
    if isinstance(default, bool) or default is None:
        return {True: "true", False: "false", None: "null"}[default]
    if isinstance(default, dict):
        inside = ", ".join(f"{key}: {_text(value)}" for key, value in default.items())
        return f"{{{inside}}}"
    if isinstance(default, (tuple, list)):
        return f"[{', '.join(map(_text, default))}]"
    return "''" if default == "" else str(default)


def _allowed(metadata) -> str:
    allowed, reason = core.describe_range(metadata), metadata.get("unbounded")
    if not reason:
        return allowed
    missing = [
        end for end, text in zip(("lower", "upper"), core.ends(metadata), strict=True) if not text
    ]
    return f"{allowed or 'any number'} (no {' or '.join(missing)} end: {reason})"


def _type_of(hint) -> str:
    if typing.get_origin(hint) is tuple:
        return f"a list of {_type_of(typing.get_args(hint)[0])}"
    parts = [part for part in typing.get_args(hint) or (hint,) if part is not type(None)]
    return " or ".join(_TYPES.get(part, str(part)) for part in parts)


def arguments(function) -> list[Row]:
    """A row for every argument of an optimizer or schedule of optax, by its name.

    >>> arguments("sgd")[1][:3]
    ('momentum', 'null', '>= 0 and <= 1')
    """
    known = optimizers.OPTIMIZERS | optimizers.SCHEDULES
    rows = []
    for name, parameter in inspect.signature(known[function]).parameters.items():
        hint = optimizers.hint_of(function, parameter)
        default = parameter.default
        if isinstance(default, type):
            default = getattr(default, "__name__", str(default))
        needed = optimizers.is_required(function, parameter)
        allowed = _allowed(optimizers.range_of(function, name))
        traced = "traced" if hint in (float, float | None) else "recompiles"
        default = "required" if needed else _text(default)
        rows.append(Row(name, default, allowed or _type_of(hint), traced, ""))
    return rows


def page() -> str:
    """`docs/configuration.md`: all keys outside components, and the names of the components."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield (
        "# Every key of a configuration\n\n"
        "Made from the schema by `python -m fedjax_sec.report.keys > docs/configuration.md`; do "
        "not\nedit. On the command line, `fedjax-sec show NAME` prints the same for a section "
        "(`data`, `sweep`), a\ncomponent (`krum`) or an optimizer (`adam`).\n\n"
        "A file is YAML. Every key has a default, so an empty file is an experiment. Keys inside "
        "sections are\nwritten with dots on the command line: `data.num_clients=50`, "
        "`client.optimizer.learning_rate=0.05`.\nA component is a name (`defense: krum`) or a "
        "mapping with `name` and its fields\n(`defense: {name: krum, num_byzantine: 2}`); without "
        "`name` fields of the default change. `${rounds}`\nstands for another key of the same "
        "file; nothing else is filled in, and environment variables are\nrefused.\n\n"
        "Fields that `show` calls *traced* take a new value without a new compilation and can "
        "follow a schedule\nover rounds: `{schedule: steps, values: {0: 1.0, 100: 0.1}}`, or "
        "`linear`\nor `exponential`.\n\n"
        "The largest integer, 2147483647, is the largest position in int32; the largest seed, "
        "4294967295, is\nwhat JAX's keys hold.\n"
    )
    titles = {"experiment": "Top-level keys", "sweep": "A sweep file"}
    places = {
        "local_test": "data.local_test",
        "root": "server.root",
    }
    for name, cls in SECTIONS.items():
        title = titles.get(name) or f"`{places.get(name, name)}`"
        yield f"## {title}\n\n{registry.summary(cls)}\n"
        yield from _table(fields(cls))
    yield "## Components\n\nEach has fields of its own: `fedjax-sec show NAME`.\n"
    yield "| kind | names |\n| --- | --- |"
    for kind, entries in registry.KINDS.items():
        yield f"| {kind} | {', '.join(f'`{name}`' for name in entries.names())} |"
    yield f"| optimizer | {', '.join(f'`{name}`' for name in sorted(optimizers.OPTIMIZERS))} |"
    yield (
        f"| schedule of a learning rate | "
        f"{', '.join(f'`{name}`' for name in sorted(optimizers.SCHEDULES))} |"
    )
    yield (
        "\nOptimizers and their schedules are optax's, with optax's arguments. Not all of optax's "
        "can be used:\n"
    )
    for name, reason in optimizers.UNUSABLE.items():
        yield f"- `{name}`: {reason}."
    yield "- `scale_by_...`: parts of optimizers, without the sign that makes a step descend."


def _table(rows: list[Row]) -> Iterator[str]:
    yield "| key | default | allowed | meaning |\n| --- | --- | --- | --- |"
    for row in rows:
        default = f"`{row.default}`" if row.default else ""
        cells = (f"`{row.key}`", default, row.allowed, row.meaning)
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""


if __name__ == "__main__":
    print(page(), end="")

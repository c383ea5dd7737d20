"""The public names of the package, read from its source: a page a module, and what has no words."""

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fedjax_sec.core.optional import require
from fedjax_sec.report.site.tables import code, table

FOLDER = "api"
_PACKAGE = Path(__file__).parents[2]
#: Modules without `__all__` whose names are public all the same, like those of `fedjax_sec.ops`.
_OPEN = ("core.registry", "report.paper", "report.paper_writers")
#: The console command, which has `__all__` for itself.
_COMMAND = "cli"


class Name(NamedTuple):
    """A public name: `kind` is class, function, attribute or module, `path` where it is defined."""

    name: str
    kind: str
    path: str
    text: str
    value: str
    silent: tuple[str, ...]  # the public methods of a class that nothing is said of


@functools.cache
def _package() -> Any:
    griffe = require("griffe", "A page of the public names")
    return griffe.load(_PACKAGE.name, search_paths=[_PACKAGE.parent], resolve_aliases=True)


@functools.cache
def modules() -> tuple[str, ...]:
    """The dotted names of the modules whose names are public: those with `__all__`, and some more.

    >>> modules()[0], "fedjax_sec.core" in modules(), "fedjax_sec.ops.sorting" in modules()
    ('fedjax_sec', True, True)
    """
    known, left = [], [_package()]
    while left:
        one = left.pop()
        inside = one.path.removeprefix(f"{_PACKAGE.name}.")
        named = one.exports is not None and inside != _COMMAND
        kernel = inside.startswith("ops.") and not one.name.startswith("_")
        if named or kernel or inside in _OPEN:
            known.append(one.path)
        left += [member for member in one.modules.values() if not member.is_alias]
    return tuple(sorted(known))


def names(module: str) -> list[Name]:
    """The public names of a module: those of `__all__`, else all that it defines.

    >>> [one.kind for one in names("fedjax_sec") if one.name in ("Result", "fedml", "run")]
    ['module', 'class', 'function']
    """
    one = _at(module)
    if one.exports is not None:
        return [_name(one, str(name)) for name in sorted(map(str, one.exports), key=str.lower)]
    defined = [name for name, member in one.members.items() if not member.is_alias]
    return [_name(one, name) for name in defined if not name.startswith("_")]


def _at(module: str):
    inside = module.removeprefix(_PACKAGE.name).removeprefix(".")
    return _package()[inside] if inside else _package()


def _name(module, name: str) -> Name:
    if name not in module.members:
        return Name(name, "attribute", f"{module.path}.{name}", "", "", ())
    member = module.members[name]
    member = member.final_target if member.is_alias else member
    text = member.docstring.value if member.has_docstring else ""
    value = ""
    if member.is_attribute:
        text, value = text or _comment(member), str(member.value)
    silent = tuple(_silent(member)) if member.is_class else ()
    return Name(name, member.kind.value, member.path, text, value, silent)


def _comment(attribute) -> str:
    """The comment `#: ...` above a constant, or above the block of lines that it is in."""
    lines = attribute.filepath.read_text().splitlines()[: attribute.lineno - 1]
    while lines and re.match(r"\w+ = ", lines[-1]):
        lines.pop()
    text = []
    while lines and lines[-1].startswith("#:"):
        text.insert(0, lines.pop().removeprefix("#:").strip())
    return " ".join(text)


def _silent(cls) -> Iterator[str]:
    """The public methods without a docstring, here or in a class of ours that they override."""
    for name, member in cls.members.items():
        if member.is_function and not name.startswith("_") and not member.has_docstring:
            over = (base.members[name] for base in cls.mro() if name in base.members)
            if not any(one.has_docstring for one in over):
                yield f"{cls.path}.{name}"


def undocumented() -> list[str]:
    """The public names that say nothing of themselves, methods included."""
    everything = [(module, one) for module in modules() for one in names(module)]
    return [
        missing
        for module, one in everything
        for missing in (*([] if one.text else [f"{module}.{one.name}"]), *one.silent)
    ]


def pages() -> Iterator[tuple[str, str]]:
    """(path, Markdown) of each module's page and of their list, for mkdocstrings."""
    rows = [
        (f"[`{module}`]({module}.md)", _first(_at(module).docstring.value)) for module in modules()
    ]
    said = "The names that may be used; everything else may change without a word."
    yield f"{FOLDER}/index.md", f"# Python API\n\n{said}\n\n{table(('module', ''), rows)}\n"
    for module in modules():
        yield f"{FOLDER}/{module}.md", page(module)


def navigation() -> list:
    """The entries of the site's navigation."""
    entries = {module: f"{FOLDER}/{module}.md" for module in modules()}
    short = {module.removeprefix(f"{_PACKAGE.name}."): at for module, at in entries.items()}
    kernels = [{name: at} for name, at in short.items() if name.startswith("ops.")]
    others = [{name: at} for name, at in short.items() if not name.startswith("ops.")]
    return [f"{FOLDER}/index.md", *others, {"ops": kernels}]


def page(module: str) -> str:
    """The page of one module, in Markdown with mkdocstrings' directives."""
    entries = names(module)
    parts = [f"# `{module}`", _at(module).docstring.value]
    inner = [one for one in entries if one.kind == "module"]
    if inner:
        parts.append(table(("module", ""), [(_link(one), _first(one.text)) for one in inner]))
    parts += [f"::: {one.path}" for one in entries if one.kind in ("class", "function")]
    constants = [one for one in entries if one.kind == "attribute"]
    if constants:
        rows = [
            (f"`{one.name}`", code(one.value.replace("\n", " ")), one.text) for one in constants
        ]
        parts += ["## Constants", table(("name", "value", "meaning"), rows)]
    return "\n\n".join(parts) + "\n"


def _link(one: Name) -> str:
    return f"[`{one.path}`]({one.path}.md)" if one.path in modules() else f"`{one.path}`"


def _first(text: str) -> str:
    return text.partition("\n")[0]

"""A page for each component: what `fedjax-sec show` prints, with its mathematics rendered."""

import re
import textwrap
from collections.abc import Iterator

from fedjax_sec.core import optimizers, registry
from fedjax_sec.report import described, inventory, keys
from fedjax_sec.report.site.tables import code, table

FOLDER = "components"
_SECTION = re.compile(r"(?m)^(Raises|Source|Example):[ \n]")


def pages() -> Iterator[tuple[str, str]]:
    """(path, Markdown) of the page of each kind, of each component and of the optimizers."""
    yield f"{FOLDER}/index.md", _overview()
    for kind, known in registry.KINDS.items():
        if known.names():
            yield f"{FOLDER}/{kind}/index.md", _kind(kind)
        for name in known.names():
            yield f"{FOLDER}/{kind}/{name}.md", page(kind, name)
    yield f"{FOLDER}/optimizers.md", _functions()


def navigation() -> list:
    """The entries of the site's navigation, a group a kind."""
    groups = [
        {
            _title(kind): [
                f"{FOLDER}/{kind}/index.md",
                *({name: f"{FOLDER}/{kind}/{name}.md"} for name in known.names()),
            ]
        }
        for kind, known in registry.KINDS.items()
        if known.names()
    ]
    return [f"{FOLDER}/index.md", *groups, {"Optimizers": f"{FOLDER}/optimizers.md"}]


def _title(kind: str) -> str:
    return f"{kind.replace('_', ' ')}s".capitalize()


def page(kind: str, name: str) -> str:
    """The page of one component, in Markdown whose mathematics are still directives.

    >>> page("defense", "median").splitlines()[0]
    '# `median`'
    """
    one, cls = described.component(kind, name), registry.KINDS[kind].get(name)
    text, sections = _split(one.text)
    key = inventory.KEYS.get(kind, kind)
    parts = [
        f"# `{name}`",
        f"One of the [{_title(kind).lower()}](index.md): `{key}: {name}` in a configuration, "
        f"`fedjax-sec show {name}` in a terminal, `{cls.__module__}` in the code.",
        text,
        *(f"**{title}:** {sections[title]}" for title in ("Raises", "Source") if title in sections),
        "## Fields",
        _fields(one.rows),
    ]
    if "Example" in sections:
        parts += ["## Example", f"```pycon\n{textwrap.dedent(sections['Example'])}\n```"]
    return "\n\n".join(parts) + "\n"


def _split(text: str) -> tuple[str, dict[str, str]]:
    """A docstring's text before its sections, and each section by its title.

    >>> _split("Mean.\\n\\nSource: none.\\n\\nExample:\\n    >>> 1\\n    1")
    ('Mean.', {'Source': 'none.', 'Example': '    >>> 1\\n    1'})
    """
    before, *rest = _SECTION.split(text)
    sections = zip(rest[::2], rest[1::2], strict=True)
    return before.strip(), {title: body.strip("\n") for title, body in sections}


def _fields(rows) -> str:
    if not rows:
        return "It has no fields."
    said = "A field that is *traced* takes a new value without a new compilation, and may follow a "
    said += "schedule over rounds."
    cells = [
        (f"`{row.key}`", code(row.default), row.allowed, row.compiled, row.meaning) for row in rows
    ]
    return f"{table(('field', 'default', 'allowed', 'a new value', 'meaning'), cells)}\n\n{said}"


def _kind(kind: str) -> str:
    """The page of a kind: every name with its first line."""
    known, key = registry.KINDS[kind], inventory.KEYS.get(kind, kind)
    rows = [(f"[`{name}`]({name}.md)", registry.summary(known.get(name))) for name in known.names()]
    return f"# {_title(kind)}\n\nComponents that `{key}` takes.\n\n{table(('name', ''), rows)}\n"


def _overview() -> str:
    rows = [
        (
            f"[{_title(kind)}]({kind}/index.md)",
            code(inventory.KEYS.get(kind, kind)),
            ", ".join(f"[`{name}`]({kind}/{name}.md)" for name in known.names()),
        )
        for kind, known in registry.KINDS.items()
        if known.names()
    ]
    links = ", ".join(f"[`{name}`](optimizers.md#{name})" for name in sorted(optimizers.OPTIMIZERS))
    rows.append(("[Optimizers](optimizers.md)", "`client.optimizer`, `server.optimizer`", links))
    return (
        "# Components\n\nEverything that a configuration can name. Each page is what "
        "`fedjax-sec show NAME` prints: the mathematics, the source, the fields and their ranges."
        f"\n\n{table(('kind', 'key', 'components'), rows)}\n"
    )


def _functions() -> str:
    """The page of the optimizers and the schedules of a learning rate."""
    parts = [
        "# Optimizers",
        "Optimizers and schedules of a learning rate are optax's, with optax's names and "
        "arguments: `client.optimizer: {name: adam, learning_rate: 0.001}`.",
    ]
    for title, known in (
        ("Optimizers of optax", optimizers.OPTIMIZERS),
        ("Schedules of a learning rate", optimizers.SCHEDULES),
    ):
        parts.append(f"## {title}")
        for name in sorted(known):
            parts += [f"### `{name}`", _arguments(described.function(name).rows)]
    unusable = [f"- `{name}`: {reason}." for name, reason in optimizers.UNUSABLE.items()]
    return "\n\n".join([*parts, "## Not usable", "\n".join(unusable)]) + "\n"


def _arguments(rows) -> str:
    cells = [(f"`{row.key}`", code(row.default), row.allowed, row.compiled) for row in rows]
    return table(("argument", "default", "allowed", "a new value"), cells)


def undocumented() -> list[str]:
    """The components, sections and fields that say nothing of themselves."""
    everything = [*(described.section(name) for name in keys.SECTIONS)]
    everything += [
        described.component(kind, name)
        for kind, known in registry.KINDS.items()
        for name in known.names()
    ]
    return [
        missing
        for one in everything
        for missing in (
            *([] if one.text else [f"{one.kind} {one.name}"]),
            *(f"{one.kind} {one.name}.{row.key}" for row in one.rows if not row.meaning),
        )
    ]

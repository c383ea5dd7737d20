"""What the pages for users of other projects call ours exists, and so do links to headings."""

import re

import pytest
import typer
import yaml
from pages import DOCS, code, tables
from test_docs import problem, there_is

from fedjax_sec import cli, core
from fedjax_sec.core import optimizers, registry
from fedjax_sec.report import keys

PAGES = sorted(path.relative_to(DOCS).as_posix() for path in (DOCS / "coming_from").glob("*.md"))
COMPONENTS = {
    name: kind.get(name) for kind in registry.KINDS.values() for name in kind.names()
} | optimizers.OPTIMIZERS
FIELDS = {row.key for cls in keys.SECTIONS.values() for row in keys.fields(cls)} | {
    field
    for kind in registry.KINDS.values()
    for name in kind.names()
    for field in kind.get(name).__dataclass_fields__
}
FIELDS |= {"learning_rate", "momentum"}  # optax's
METHODS = {name for cls in (core.UpdateAttack, core.DataAttack, core.Stage) for name in dir(cls)}


def options() -> set[str]:
    """Every option of every command."""
    group = typer.main.get_command(cli.app)
    result, commands = set(), [group.get_command(typer.Context(group), n) for n in group.commands]
    while commands:
        command = commands.pop()
        commands += list(getattr(command, "commands", {}).values())
        result |= {name for one in command.params for name in one.opts}
    return result


def unknown(token: str) -> bool:
    """Whether a token of a column `ours` is nothing of ours."""
    if token.startswith("fedjax-sec "):
        return not token.startswith("fedjax-sec paper") and bool(problem(token, False))
    if token.startswith("--"):
        return token.split()[0] not in options()
    if token.startswith("fedjax_sec."):
        return not there_is(token.removeprefix("fedjax_sec."))
    if token.endswith((".md", ".jsonl", ".csv")) or " < " in token:
        return False
    key, *value = token.split(": ", 1)
    if value:
        yaml.safe_load(value[0])
    if key in COMPONENTS or key in METHODS or key == "Defended":
        return False
    *path, field = key.split(".")
    return field not in FIELDS or any(part not in FIELDS for part in path)


@pytest.mark.parametrize("page", PAGES)
def test_what_is_called_ours_exists(page):
    (names,) = [table for table in tables(page) if table.header[-1] == "ours"]
    assert len(names.rows) > 20 and all(len(row) == 2 for row in names.rows)
    tokens = [token for row in names.rows for token in code(row[1])]
    assert [token for token in tokens if unknown(token)] == []


def test_a_wrong_name_would_be_seen():
    for token in ("trimed_mean", "num_byzantin: 2", "threat.num", "--workerz", "fedjax-sec rn x"):
        assert unknown(token), token
    assert not unknown("fedjax-sec run X.yaml --out OUT attack=alie")


def headings(page) -> set[str]:
    """The anchors of a page's headings."""
    titles = re.findall(r"(?m)^#+ (.+)$", re.sub(r"(?s)```.*?```", "", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize(
    "page",
    [*PAGES, "choose/defense.md", "choose/attack.md", "faq.md", "glossary.md"],
)
def test_links_lead_to_headings(page):
    here = DOCS / page
    links = re.findall(r"\]\(([^)\s:]*)#([^)\s]+)\)", here.read_text())
    for target, anchor in links:
        there = (here.parent / target).resolve() if target else here
        assert anchor in headings(there), f"{target}#{anchor}"

"""Claims of the documents about the package hold."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

import fedjax_sec
from fedjax_sec import cli
from fedjax_sec.core import registry
from fedjax_sec.report import inventory, keys

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = {
    path.relative_to(ROOT / "fedjax_sec").with_suffix("").as_posix().replace("/", ".")
    for path in (ROOT / "fedjax_sec").rglob("*.py")
}


def there_is(name: str) -> bool:
    """Whether a dotted name below `fedjax_sec` is a module or something in one."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            result = importlib.import_module(".".join(("fedjax_sec", *parts[:cut])))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            if part in getattr(result, "__all__", ()):  # its library may not be installed
                return True
            result = getattr(result, part, None)
        return result is not None
    return hasattr(fedjax_sec, parts[0])


def names(text: str) -> set[str]:
    """Dotted names of ours: `fedjax_sec.x.y` anywhere, `module.name` as code."""
    result = set(re.findall(r"(?<![.\w])fedjax_sec((?:\.[A-Za-z_]\w*)+)", text))
    result = {name[1:] for name in result if not name.endswith((".py", ".csv"))}
    for module, rest in re.findall(r"`([a-z_.]+)\.([A-Za-z_]\w*)(?:\(|`)", text):
        if module in MODULES and rest not in ("py", "csv", "md", "yaml", "json"):
            result.add(f"{module}.{rest}")
    return result


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_names_in_the_documents_exist(page):
    others = {"config.yaml", "sweep.yaml", "components"}  # the last is the entry points' group
    wrong = {name for name in names(page.read_text()) - others if not there_is(name)}
    assert not wrong


def test_a_wrong_name_would_be_seen():
    text = (
        "`runs.experiment.final_params(folder)`, `sweep.yaml` and "
        "fedjax_sec.runs.loading.final_params"
    )
    assert names(text) == {"runs.experiment.final_params", "runs.loading.final_params"}
    assert there_is("runs.loading.final_params")
    assert not there_is("runs.experiment.final_params")


def test_the_page_of_all_keys_is_up_to_date():
    page = ROOT / "docs" / "configuration.md"
    assert page.read_text() == keys.page(), (
        "python -m fedjax_sec.report.keys > docs/configuration.md makes it anew"
    )
    assert "docs/configuration.md" in (ROOT / "README.md").read_text()


def test_the_page_names_every_key():
    text = keys.page()
    for cls in keys.SECTIONS.values():
        for row in keys.fields(cls):
            assert f"| `{row.key}` |" in text and row.meaning
    for result in registry.KINDS.values():
        assert all(f"`{name}`" in text for name in result.names())


def test_the_table_of_components_is_up_to_date():
    page = (ROOT / "README.md").read_text()
    assert page == inventory.updated(page), (
        "python -m fedjax_sec.report.inventory README.md makes it anew"
    )
    for known in registry.KINDS.values():
        assert all(f"`{name}`" in inventory.table() for name in known.names())
    with pytest.raises(ValueError, match="lacks the markers"):
        inventory.updated("no markers")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    targets = [target for target in targets if not re.match(r"https?:|#|mailto:", target)]
    paths = [(page.parent / target.partition("#")[0]).resolve() for target in targets]
    assert [path for path in paths if not path.exists() and not is_generated(path)] == []


def is_generated(path):
    """Whether the site makes the page; its build (`test_site.py`) fails for one that it lacks."""
    inside = (
        path.relative_to(ROOT / "docs").as_posix() if path.is_relative_to(ROOT / "docs") else ""
    )
    return inside.startswith(("components/", "papers/", "api/")) or inside == "contributing.md"


# --- Commands -----------------------------------------------------------------------------------


def commands(text: str) -> list[tuple[str, bool]]:
    """Every `fedjax-sec ...` of a page, and whether it is complete: a line of its own."""
    text = text.replace("\\\n", " ")
    lines = re.findall(r"(?m)^ *(?:[A-Z_]+=\S+ )*(fedjax-sec [a-z].*)$", text)
    inline = re.findall(r"`(?:[A-Z_]+=\S+ )*(fedjax-sec\s[a-z][^`]*)`", text)
    return [(line, "..." not in line) for line in lines if "`" not in line] + [
        (" ".join(one.split()), False) for one in inline
    ]


def problem(line: str, complete: bool) -> str:
    """The command line's answer to a command; options and values are checked, nothing is run."""
    _, name, *arguments = shlex.split(line)
    group = typer.main.get_command(cli.app)
    command = group.get_command(typer.Context(group), name)
    if command is None:
        return f"no command {name!r}"
    if "..." in arguments:
        arguments.remove("...")
    while "--import" in arguments:  # the file would be executed
        at = arguments.index("--import")
        del arguments[at : at + 2]
    try:
        command.make_context(name, arguments)
    except Exception as error:
        if complete or type(error).__name__ != "MissingParameter":
            return f"{type(error).__name__}: {error}"
    return ""


PROSE = ("guide", "choose", "coming_from")
GUIDE = [p for p in PAGES if p.parent in (ROOT, ROOT / "docs") or p.parent.name in PROSE]


@pytest.mark.parametrize("page", GUIDE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_parse(page):
    # `paper` is a group: its commands come with the papers, see tests of the command itself.
    known = [one for one in commands(page.read_text()) if not one[0].startswith("fedjax-sec paper")]
    wrong = {line: said for line, complete in known if (said := problem(line, complete))}
    assert not wrong


def test_a_wrong_command_would_be_seen():
    assert commands("`fedjax-sec show krum`\n\n    fedjax-sec demo --out x\n") == [
        ("fedjax-sec demo --out x", True),
        ("fedjax-sec show krum", False),
    ]
    assert problem("fedjax-sec demo --outt x", True)
    assert problem("fedjax-sec dmeo", False) == "no command 'dmeo'"
    assert problem("fedjax-sec run x.yaml", True) and not problem("fedjax-sec run x.yaml", False)


def test_yaml_of_the_guide_is_a_configuration():
    from fedjax_sec.runs import config

    blocks = [
        block
        for page in sorted((ROOT / "docs" / "guide").glob("*.md"))
        for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), flags=re.DOTALL)
    ]
    assert blocks
    for block in blocks:
        config.from_mapping(yaml.safe_load(block))

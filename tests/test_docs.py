"""What the documents say of the package is there."""

import importlib
import re
from pathlib import Path

import pytest

import fedjax_sec
from fedjax_sec.core import registry
from fedjax_sec.report import keys

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
            found = importlib.import_module(".".join(("fedjax_sec", *parts[:cut])))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part, None)
        return found is not None
    return hasattr(fedjax_sec, parts[0])


def names(text: str) -> set[str]:
    """Dotted names of ours: `fedjax_sec.x.y` anywhere, `module.name` as code."""
    found = set(re.findall(r"(?<![.\w])fedjax_sec((?:\.[A-Za-z_]\w*)+)", text))
    found = {name[1:] for name in found if not name.endswith((".py", ".csv"))}
    for module, rest in re.findall(r"`([a-z_.]+)\.([A-Za-z_]\w*)(?:\(|`)", text):
        if module in MODULES and rest not in ("py", "csv", "md", "yaml", "json"):
            found.add(f"{module}.{rest}")
    return found


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
    for found in registry.KINDS.values():
        assert all(f"`{name}`" in text for name in found.names())

"""The Python examples of README, CONTRIBUTING and the documentation's prose run as they stand."""

import re
from pathlib import Path

import pytest

from fedjax_sec.core import registry

ROOT = Path(__file__).parents[1]
GUIDE = [
    page.relative_to(ROOT).as_posix()
    for folder in ("guide", "choose", "coming_from", ".")
    for page in sorted((ROOT / "docs" / folder).glob("*.md"))
    if "```python" in page.read_text()
]


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/quickstart.md", *GUIDE])
def test_the_examples_run(name, tmp_path, monkeypatch, capsys):
    for known in registry.KINDS.values():  # what an example registers is forgotten
        known.names()
        monkeypatch.setattr(known, "_entries", dict(known._entries))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)
    assert blocks, f"{name} shows no Python example"
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, name, "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.strip(), "the example prints nothing"


def test_the_guide_has_examples():
    assert {"docs/guide/python.md", "docs/guide/extending.md", "docs/faq.md"} <= set(GUIDE)
    assert len([page for page in GUIDE if page.startswith("docs/coming_from/")]) == 5

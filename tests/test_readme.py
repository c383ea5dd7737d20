"""The Python examples of README and CONTRIBUTING run as they stand."""

import re
from pathlib import Path

import pytest

from fedjax_sec.core import registry

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_the_examples_run(name, tmp_path, monkeypatch, capsys):
    for known in (registry.datasets, registry.models):  # what an example registers is forgotten
        known.names()
        monkeypatch.setattr(known, "_entries", dict(known._entries))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)
    assert blocks, f"{name} shows no Python example"
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, name, "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.strip(), "the example prints nothing"

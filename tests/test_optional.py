"""Features without the packages that only some need, and the errors of the others."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fedjax_sec
from fedjax_sec.core import ConfigError
from fedjax_sec.core.optional import require

HEAVY = ("tensorflow_datasets", "array_record", "matplotlib", "pandas", "tabulate", "altair")

#: Imports of these packages fail as if they were not installed.
BLOCKED = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""


def output_of(program, env):
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED + program],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_updates_and_runs_need_none_of_them(subprocess_env):
    program = """
import fedjax_sec
from fedjax_sec import cli
updates = [[1.0], [2.0], [9.0]]
print(fedjax_sec.aggregate(updates, "median"))
print(fedjax_sec.attack(updates, "sign_flip", malicious=[False, False, True])[2])
print(fedjax_sec.run({"data": {"num_clients": 3}, "rounds": 1}).metrics["round"])
"""
    assert output_of(program, subprocess_env).split("\n") == ["[2.]", "[-9.]", "[0. 1.]", ""]


def test_importing_loads_none_of_them(subprocess_env):
    program = "import sys, fedjax_sec, fedjax_sec.cli, fedjax_sec.report.plotting\n"
    program += "import fedjax_sec.report.tables, fedjax_sec.report.audit, fedjax_sec.report.page\n"
    program += f"print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], env=subprocess_env, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    "call, package",
    [
        ("fedjax_sec.run({'rounds': 1}, out=OUT)", "matplotlib"),
        ("plotting.subplots(figsize=(1, 1))", "matplotlib"),
        ("tables.summarized([], [])", "pandas"),
        ("page.check_packages()", "altair"),
        ("_tfds._decode('mnist', FOLDER, (), None)", "array_record"),
    ],
)
def test_the_error_names_the_package_and_the_remedy(call, package, subprocess_env, tmp_path):
    folder = tmp_path / "mnist" / "3.0.1"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text('{"fileFormat": "array_record"}')
    (folder / "mnist-test.array_record").write_text("")
    program = f"""
from pathlib import Path
import fedjax_sec
from fedjax_sec.data.sources import _tfds
from fedjax_sec.report import page, plotting, tables
OUT, FOLDER = Path({str(tmp_path / "out")!r}), Path({str(folder)!r})
tables.metrics_of = tables._by_cell = lambda *_: []
try:
    {call}
except ValueError as error:
    print(error)
    print(OUT.exists())
"""
    text = output_of(program, subprocess_env)
    assert re.fullmatch(rf".* needs the package {package}.*: pip install {package}\nFalse\n", text)


def test_a_broken_package_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "halfpackage.py").write_text("import nowhere_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nowhere_at_all"):
        require("halfpackage", "A test")
    with pytest.raises(ConfigError, match=r"A test needs the package nowhere_at_all.*pip install"):
        require("nowhere_at_all", "A test")


def test_the_version_stands_in_one_place():
    root = Path(__file__).parents[1]
    version = fedjax_sec.__version__
    assert f"\nversion: {version}\n" in (root / "CITATION.cff").read_text()
    released = re.search(r"(?m)^date-released: (\S+)$", (root / "CITATION.cff").read_text())[1]
    assert f"## [{version}] - {released}\n" in (root / "CHANGELOG.md").read_text()
    wheels = set(re.findall(r"fedjax_sec-([\d.]+)-py3", (root / "README.md").read_text()))
    assert wheels == {version}
    text = (root / "pyproject.toml").read_text()
    assert not re.search(r"(?m)^version *= *['\"]", text)
    assert 'dynamic = ["version"]' in text and "fedjax_sec.__version__" in text

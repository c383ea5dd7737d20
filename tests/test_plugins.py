"""Components of other people: files, modules, entry points, and where a run writes them down."""

import doctest
import importlib.metadata
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import small
from typer.testing import CliRunner

import fedjax_sec
from fedjax_sec.cli import app
from fedjax_sec.core import ConfigError, plugins, registry
from fedjax_sec.runs import config
from fedjax_sec.runs.results import RunFolder
from fedjax_sec.sweeps import load
from fedjax_sec.testing import check_component

RULE = '''
import jax.numpy as jnp

from fedjax_sec.core import registry
from fedjax_sec.ops.moments import weighted_mean


@registry.defenses.register("{name}")
class Shared:
    """{summary}

    Source: none, a test.

    Example:
        >>> 1
        1
    """

    stage = "aggregate"

    def apply(self, key, updates, state, view):
        kept = view.valid.astype(updates.dtype)
        return weighted_mean(updates, kept), state, {{"kept": kept}}
'''


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """Forgets all that a test registers or imports."""
    registry.defenses.names()
    monkeypatch.setattr(registry.defenses, "_entries", dict(registry.defenses._entries))
    for name, empty in (("_files", {}), ("_broken", [])):
        monkeypatch.setattr(plugins, name, empty)


def write(path, name="shared_mean", summary="The mean of the valid updates."):
    path.write_text(RULE.format(name=name, summary=summary))
    return path


def cli(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_a_file_is_imported_checked_and_run(tmp_path):
    path = write(tmp_path / "mine.py")
    result = fedjax_sec.run(small(defense="shared_mean", imports=[str(path)], rounds=1))
    plain = fedjax_sec.run(small(rounds=1, defense="mean"))
    assert result.experiment.imports == (str(path),)
    assert result.metrics["round"].tolist() == plain.metrics["round"].tolist()
    assert np.isfinite(result.metrics["loss"]).all()
    check_component(registry.defenses.get("shared_mean"))


def test_an_edited_file_is_imported_again_and_an_equal_one_is_not(tmp_path):
    path = write(tmp_path / "mine.py")
    plugins.import_all([str(path)], "imports")
    first = registry.defenses.get("shared_mean")
    plugins.import_all([str(path)], "imports")
    assert registry.defenses.get("shared_mean") is first
    write(path, summary="Another summary.")
    plugins.import_all([str(path)], "imports")
    assert registry.summary(registry.defenses.get("shared_mean")) == "Another summary."


def test_paths_are_relative_to_the_configuration_and_written_absolutely(tmp_path, monkeypatch):
    path = write(tmp_path / "mine.py")
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump(small(defense="shared_mean", imports="mine.py")))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert config.load(file).imports == (str(path),)
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("experiment: plain.yaml\nimports: [mine.py]\ngrid: {defense: [shared_mean]}\n")
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(small()))
    (cell,) = load(sweep)[1]
    assert cell.experiment.imports == (str(path),)


def test_where_components_lie_is_not_compared(tmp_path):
    one = config.from_mapping(small(imports=[str(write(tmp_path / "a.py", "rule_a"))]))
    other = config.from_mapping(small(imports=[str(write(tmp_path / "b.py", "rule_b"))]))
    assert config.differences(one.to_dict(), other.to_dict()) == []
    assert one.structure() == other.structure() == config.from_mapping(small()).structure()


def test_the_option_stands_before_or_behind_every_command(tmp_path):
    path = write(tmp_path / "mine.py")
    for args in (("--import", path, "list", "defenses"), ("list", "defenses", "--import", path)):
        registry.defenses._entries.pop("shared_mean", None)
        plugins._files.clear()
        said = cli(*args)
        assert said.exit_code == 0 and "shared_mean" in said.output
    said = cli("show", "shared_mean")
    assert said.exit_code == 0 and "The mean of the valid updates." in said.output
    for command in ("run", "sweep", "list", "show", "trigger", "partition", "audit", "bench"):
        assert "--import" in cli(command, "--help").output, command


def test_a_run_writes_down_what_it_imports_and_is_resumed(tmp_path):
    path, out = write(tmp_path / "mine.py"), tmp_path / "out"
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(small(defense="shared_mean", rounds=1)))
    said = cli("run", tmp_path / "e.yaml", "--out", out, "--import", path)
    assert said.exit_code == 0, said.output
    registry.defenses._entries.pop("shared_mean")
    plugins._files.clear()
    assert RunFolder(out).experiment().imports == (str(path),)  # found again by its own folder
    again = cli("run", tmp_path / "e.yaml", "rounds=2", "--out", out, "--resume", "--import", path)
    assert again.exit_code == 0, again.output
    without = cli("run", tmp_path / "e.yaml", "defense=mean", "--out", out)
    assert without.exit_code == 2 and "already holds a run" in without.output


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\n\nraise KeyError('nothing')\n", r"KeyError: 'nothing' \(.*mine.py, line 3\)"),
        ("def broken(:\n", r"SyntaxError: .*\(.*mine.py, line 1\)"),
        ("import sys\nsys.exit(3)\n", r"SystemExit: 3 \(.*mine.py, line 2\)"),
        (RULE.format(name="mean", summary="Taken."), r"'mean' is already registered by .*line 8"),
    ],
)
def test_errors_name_file_and_line(tmp_path, text, words):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ConfigError, match=f"^imports: '.*mine.py' cannot be imported: .*{words}"):
        config.from_mapping({"imports": [str(tmp_path / "mine.py")]})
    said = cli("list", "--import", tmp_path / "mine.py")
    assert said.exit_code == 2 and "line" in said.output and "Traceback" not in said.output


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["none/there.py"], "imports: there is no file '.*none/there.py'"),
        (
            ["no_such_module_here"],
            "there is no module 'no_such_module_here' .* no_such_module_here.py",
        ),
        ([3], "imports: a module or a file such as my_rules.py, got 3"),
        (3, "imports must be a list of modules and files, .*got 3"),
    ],
)
def test_what_is_no_module_is_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        config.from_mapping({"imports": given})


def test_the_example_of_the_guide_is_one_file_and_keeps_the_contract(tmp_path):
    """It has no base class, and nothing in the package knows it."""
    guide = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    block, *_ = re.findall(r"```py\n(.*?)```", guide, flags=re.DOTALL)
    path = tmp_path / "norm_filter.py"
    path.write_text(block)
    plugins.import_all([str(path)], "imports")
    check_component(registry.defenses.get("norm_filter"))
    module = sys.modules[registry.defenses.get("norm_filter").__module__]
    ran = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert ran.attempted and not ran.failed


class Entry:
    """An entry point as `importlib.metadata` gives them."""

    dist = None

    def __init__(self, name, path):
        self.name, self.value, self.path = name, f"{name}.rules", path

    def load(self):
        plugins._import_file(self.path, "entry point")


def test_installed_plug_ins_are_loaded_and_a_broken_one_is_named(tmp_path, monkeypatch):
    sound, broken = write(tmp_path / "sound.py", "installed_mean"), tmp_path / "broken.py"
    broken.write_text("import a_package_that_is_missing\n")
    entries = [Entry("broken", broken), Entry("sound", sound)]
    asked = []

    def entry_points(group):
        asked.append(group)
        return entries

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    monkeypatch.setattr(plugins, "_loaded", False)
    monkeypatch.setattr(registry.defenses, "_discovered", False)
    with pytest.warns(UserWarning, match=r"plug-in 'broken' \(broken.rules\) .*broken.py, line 1"):
        names = registry.defenses.names()
    assert "installed_mean" in names and asked == ["fedjax_sec.components"]
    with pytest.raises(ConfigError, match="unknown defense 'inst'.* Note: the plug-in 'broken'"):
        registry.defenses.build("inst")

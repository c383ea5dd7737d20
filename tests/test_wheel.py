"""The wheel, installed away from the checkout: the command, the demo's files and a run."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import fedjax_sec

ROOT = Path(__file__).parents[1]
BUILT_FROM = ("fedjax_sec", "configs", "pyproject.toml", "setup.py", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """`fedjax-sec` of a fresh environment with the wheel; dependencies are this environment's."""
    build = pytest.importorskip("setuptools")
    if int(build.__version__.split(".")[0]) < 77:
        pytest.skip("the build needs setuptools 77 or later in this environment")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in BUILT_FROM:  # a copy, so that the build leaves nothing in the checkout
        path = ROOT / name
        (shutil.copytree if path.is_dir() else shutil.copy)(path, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    _call([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source], folder)
    (wheel,) = folder.glob("*.whl")
    assert wheel.name.startswith(f"fedjax_sec-{fedjax_sec.__version__}-")
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    # A line of a .pth file adds the folder alone, not an editable install that is named in it.
    installed = [path for path in sys.path if Path(path).name == "site-packages"]
    (packages / "dependencies.pth").write_text("\n".join(installed) + "\n")
    _call([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], folder)
    return folder / "venv" / "bin" / "fedjax-sec"


def _call(arguments, folder, env=None):
    done = subprocess.run(
        list(map(str, arguments)), cwd=folder, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def without_checkout(env):
    return {name: value for name, value in env.items() if name != "PYTHONPATH"}


@pytest.mark.slow
def test_the_demo_runs_in_an_empty_folder(command, tmp_path, subprocess_env):
    env = without_checkout(subprocess_env)
    where = [command.with_name("python"), "-c", "import fedjax_sec; print(fedjax_sec.__file__)"]
    assert str(command.parents[1]) in _call(where, tmp_path, env)
    assert _call([command, "--version"], tmp_path, env).strip() == fedjax_sec.__version__
    assert "bulyan" in _call([command, "list", "defenses"], tmp_path, env)
    shortened = ["seeds=[0]", "overrides.rounds=2", "overrides.evaluation.every=2"]
    _call([command, "demo", *shortened], tmp_path, env)
    written = {path.name for path in (tmp_path / "results" / "demo").iterdir()}
    assert {"accuracy.png", "table.md", "runs.csv"} <= written
    packaged = next(command.parents[1].glob("lib/python*/site-packages/fedjax_sec/_configs"))
    checkout = ROOT / "configs"
    assert {p.relative_to(packaged) for p in packaged.rglob("*.yaml")} == {
        p.relative_to(checkout) for p in checkout.rglob("*.yaml")
    }


@pytest.mark.slow
def test_a_papers_table_is_made_in_an_empty_folder(command, tmp_path, subprocess_env):
    prepared = Path(os.environ.get("FEDJAX_SEC_TEST_DATA", "none")) / "tfds"
    if not (prepared / "mnist").is_dir():
        pytest.skip("FEDJAX_SEC_TEST_DATA names no folder with tfds/mnist")
    table = ["paper", "alie", "table1", "--scale", "smoke", "--seeds", "1", "--out", "made"]
    _call([command, *table, "--data-dir", prepared], tmp_path, without_checkout(subprocess_env))
    lines = (tmp_path / "made" / "table1.csv").read_text().splitlines()
    assert len(lines) == 5 and lines[0].startswith("z,accuracy: paper,accuracy: ours")

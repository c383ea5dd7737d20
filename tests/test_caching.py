"""Where things are kept between processes, and that a second start compiles nothing."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from fedjax_sec.core import caching

START = """
import jax, fedjax_sec
from fedjax_sec.core.caching import compiled_programs_kept
result = fedjax_sec.run({"rounds": 2, "data": {"num_clients": 4, "max_train": 200}})
with compiled_programs_kept():
    print(jax.config.jax_compilation_cache_dir, result.summary["final"]["loss"])
"""


def start(program=START, **variables):
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "FEDJAX_SEC_"))}
    env = keep | {"JAX_PLATFORMS": "cpu"} | {k: str(v) for k, v in variables.items()}
    env["PYTHONPATH"] = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "xdg")
    monkeypatch.setenv("FEDJAX_SEC_CACHE", "ours")
    assert caching.cache_folder() == Path("ours")
    monkeypatch.delenv("FEDJAX_SEC_CACHE")
    assert caching.cache_folder() == Path("xdg", "fedjax_sec")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert caching.cache_folder() == Path.home() / ".cache" / "fedjax_sec"


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="counts the programs of a CPU run")
def test_a_second_start_compiles_nothing(tmp_path):
    # 0: a fast machine compiles the smaller one sooner than what is kept by default.
    variables = {
        "FEDJAX_SEC_CACHE": tmp_path,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0,
    }

    def programs():
        # Others, of single operations, are kept from the second start on: what the first one
        # compiles while it measures how to train is not.
        return {
            path.name
            for name in ("advance", "measure")
            for path in tmp_path.rglob(f"jit_{name}-*-cache")
        }

    folder, loss = start(**variables)
    assert Path(folder).parent == tmp_path
    first = programs()
    assert len(first) == 2
    assert start(**variables) == [folder, loss]
    assert programs() == first


@pytest.mark.parametrize(("chosen", "used"), [(None, "0.2"), ("1.5", "1.5")])
def test_how_long_a_program_compiles_that_is_kept(tmp_path, chosen, used):
    variables = {"FEDJAX_SEC_CACHE": tmp_path}
    if chosen:
        variables["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = chosen
    setting = (
        "import jax; from fedjax_sec.core import caching\n"
        "with caching.compiled_programs_kept():\n"
        "    print(jax.config.jax_persistent_cache_min_compile_time_secs)"
    )
    assert start(setting, **variables) == [used]


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="counts the programs of a CPU run")
def test_the_users_own_choice_wins(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert start(FEDJAX_SEC_CACHE=ours, FEDJAX_SEC_COMPILATION_CACHE="off")[0] == "None"
    folder, _ = start(FEDJAX_SEC_CACHE=ours, JAX_COMPILATION_CACHE_DIR=theirs)
    assert folder == str(theirs) and not list(ours.glob("compiled*"))

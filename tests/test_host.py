"""State of the caller's process that the package leaves as it was."""

import subprocess
import sys

import pytest

# The libraries are imported first: loggers, warning filters and variables that importing them sets
# are theirs. Orbax stays out, since its import writes to the log.
SNAPSHOT = """
import logging, os, random, signal, sys, tempfile, threading, warnings
import jax, matplotlib, numpy as np, sklearn.datasets, pandas, optax
import matplotlib.backends.backend_pdf

def state():
    rc = matplotlib.rcParams
    return {
        "matplotlib": {name: str(dict.__getitem__(rc, name)) for name in rc},
        "pyplot": "matplotlib.pyplot" in sys.modules,
        "JAX": dict(jax.config.values),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "warnings": [str(one) for one in warnings.filters],
        "signals": {one: signal.getsignal(one) for one in signal.valid_signals()},
        "NumPy": (np.geterr(), str(np.get_printoptions()), str(np.random.get_state())),
        "random": random.getstate(),
        "logging": (logging.root.level, logging.root.handlers[:], logging.root.filters[:]),
        "absl": (logging.getLogger("absl").level, logging.getLogger("absl").filters[:]),
        "hooks": (sys.excepthook, sys.displayhook, threading.excepthook),
        "recursion": sys.getrecursionlimit(),
    }

def changed(work):
    before = state()
    work()
    after = state()
    for name in before:
        if before[name] != after[name]:
            print("changed:", name)

def work():
    import fedjax_sec
    from fedjax_sec import sweeps
    from fedjax_sec.runs import loading
    out = tempfile.mkdtemp()
    base = {"data": {"num_clients": 4}, "rounds": 2, "evaluation": {"every": 1}}
    result = fedjax_sec.run(base, out=out + "/run")
    loading.final_params(out + "/run")
    sweeps.run_cells(sweeps.make_cells(base, {"defense": ["mean"]}), out + "/sweep")
"""


def lines(program, env):
    done = subprocess.run(
        [sys.executable, "-c", SNAPSHOT + program],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def env(subprocess_env, tmp_path):
    """Without a compilation cache of the tests' own, so that ours is used."""
    theirs = {"JAX_COMPILATION_CACHE_DIR", "MPLBACKEND"}
    kept = {name: value for name, value in subprocess_env.items() if name not in theirs}
    return kept | {"FEDJAX_SEC_CACHE": str(tmp_path), "FEDJAX_SEC_TUNING": "off"}


def test_the_process_is_as_before(env, tmp_path):
    assert lines("changed(work)", env) == []
    assert list(tmp_path.glob("compiled-*/*-cache")), "no compiled program was kept"


def test_the_callers_figures_and_logging_work_on(env):
    program = """
from matplotlib import pyplot
matplotlib.use("svg")
mine, jax_uses = pyplot.figure(), tempfile.mkdtemp()
work()
print(matplotlib.get_backend(), pyplot.get_fignums() == [mine.number], pyplot.gcf() is mine)
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
logging.info("heard")
jax.config.update("jax_compilation_cache_dir", jax_uses)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: x * 3)(jax.numpy.ones(3)).block_until_ready()
print(len([name for name in os.listdir(jax_uses) if name.endswith("-cache")]) > 0)
"""
    assert lines(program, env) == ["svg True True", "heard", "True"]


def test_importing_every_module_changes_nothing(env):
    program = """
import flax.linen, omegaconf, orbax.checkpoint, rich.console, typer

def import_all():
    import importlib, pkgutil
    import fedjax_sec
    for module in pkgutil.walk_packages(fedjax_sec.__path__, "fedjax_sec."):
        if "bench" not in module.name and "_tfds" not in module.name:
            try:
                importlib.import_module(module.name)
            except ModuleNotFoundError as error:
                if error.name != "flwr":  # an extra with an environment of its own
                    raise

changed(import_all)
"""
    assert lines(program, env) == []

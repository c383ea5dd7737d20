"""Settings of the whole suite: strict JAX modes, checked annotations, quick compilation."""

import importlib.util
import os

import jax
import pytest
from choose_slow import COLLECTED, LISTED
from jaxtyping import install_import_hook

#: Components of other people's, loaded by `--import`, and tests whose library is not installed.
collect_ignore = ["proofs"]
if importlib.util.find_spec("flwr") is None:
    collect_ignore.append("flower")

# Shapes and types are checked at run time wherever arrays are annotated. Modules that define
# components are left out: their fields say `float` and hold tracers inside a compiled function.
CHECKED = (
    "ops",
    "core.types",
    "round",
    "evaluation.attribution",
    "evaluation.batches",
    "evaluation.local",
    "evaluation.masking",
    "evaluation.metrics",
    "evaluation.robustness",
)
install_import_hook([f"fedjax_sec.{name}" for name in CHECKED], "beartype.beartype")

# The rule decides how local training is computed; tests of the measuring switch it on.
os.environ["FEDJAX_SEC_TUNING"] = "off"

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
# The models are tiny, so nearly all time is compilation: optimise little, compile nothing twice.
# On a GPU a program compiled so read memory that is not its own (jax 0.11.2, `test_krum_sequence`).
jax.config.update("jax_disable_most_optimizations", jax.default_backend() == "cpu")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """A compilation cache for this session, in a folder that it does not share."""
    folder = tmp_path_factory.mktemp("compiled")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder


@pytest.fixture
def subprocess_env(compilation_cache):
    """The environment in which another process compiles to the same bits as this one."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return os.environ | {
        "JAX_PLATFORMS": jax.default_backend(),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(compilation_cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
    }


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Listed tests are slow; tests marked `gpu` are skipped where JAX has none."""
    listed = set(LISTED.read_text().splitlines())
    config.stash[COLLECTED] = frozenset(item.nodeid for item in items)
    for item in items:
        if item.nodeid in listed:
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and JAX found none here"))

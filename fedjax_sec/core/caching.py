"""Caches between processes, and their folder. Imports nothing of ours."""

import contextlib
import os
import threading
from pathlib import Path

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache


def cache_folder() -> Path:
    """Where decoded data, compiled programs and measured choices are kept.

    `FEDJAX_SEC_CACHE`, else the user's cache folder.

    Not beside prepared data: those folders are often shared between users, or read-only.
    """
    if chosen := os.environ.get("FEDJAX_SEC_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "fedjax_sec"


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_lock = threading.Lock()
_users, _before = 0, {}


@contextlib.contextmanager
def compiled_programs_kept():
    """JAX keeps compiled programs on the disk meanwhile, so that a second start compiles nothing.

    Afterwards JAX's settings are as before. They are left alone where JAX's own cache is set
    (`JAX_COMPILATION_CACHE_DIR`) or where `FEDJAX_SEC_COMPILATION_CACHE=off`. Programs that compile
    in less than 0.2 s are not kept, unless `JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS` says
    otherwise. JAX keys the programs by their text, its version, the compiler's flags and the
    device; what XLA makes of them also depends on the number of cores.
    """
    global _users, _before
    with _lock:  # the settings are the process's: the first thread sets them, the last puts back
        if _users == 0:
            wanted = _settings()
            _before = {name: getattr(jax.config, name) for name in wanted}
            for name, value in wanted.items():
                jax.config.update(name, value)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0 and _before:
                for name, value in _before.items():
                    jax.config.update(name, value)
                reset_cache()  # JAX would go on using the folder that it has opened


def _settings() -> dict:
    """JAX's settings for our cache; none where the user has chosen."""
    if os.environ.get("FEDJAX_SEC_COMPILATION_CACHE", "").lower() in ("off", "0", "false"):
        return {}
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return {}
    folder = cache_folder() / f"compiled-{usable_cores()}-cores"
    defaults = {
        "jax_persistent_cache_min_compile_time_secs": 0.2,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    ours = {name: value for name, value in defaults.items() if name.upper() not in os.environ}
    return {"jax_compilation_cache_dir": str(folder)} | ours

"""What is kept between processes, and where. Imports nothing of ours."""

import os
from pathlib import Path

import jax


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


def keep_compiled_programs() -> None:
    """Makes JAX keep compiled programs on the disk, so that a second start compiles nothing.

    Leaves JAX's settings alone where its own cache is already set (`JAX_COMPILATION_CACHE_DIR`) or
    where `FEDJAX_SEC_COMPILATION_CACHE=off`. Programs that compile in less than 0.2 s are not kept,
    unless `JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS` says otherwise. JAX keys the programs by
    their text, its version, the compiler's flags and the device; what XLA makes of them also
    depends on the number of cores.
    """
    if os.environ.get("FEDJAX_SEC_COMPILATION_CACHE", "").lower() in ("off", "0", "false"):
        return
    if jax.config.jax_compilation_cache_dir is not None:
        return
    folder = cache_folder() / f"compiled-{usable_cores()}-cores"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    defaults = {
        "jax_persistent_cache_min_compile_time_secs": 0.2,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    for name, value in defaults.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)

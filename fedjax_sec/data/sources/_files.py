"""Files of data sets: downloads that are checked, and our cache of decoded arrays."""

import hashlib
import logging
import re
import urllib.request
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from fedjax_sec.core import files
from fedjax_sec.core.caching import cache_folder

_log = logging.getLogger(__name__)

_CACHE_FORMAT = 2  # raise it when the meaning of the cached arrays changes
_DIGEST = "sha256"
_TIMEOUT = 20.0
_BLOCK = 1 << 20


# --- Download ---------------------------------------------------------------------------------


def fetch(url: str, sha256: str, target: Path) -> None:
    """Downloads `url` to `target` in one step. Raises `OSError`, also when the content is wrong."""
    target.parent.mkdir(parents=True, exist_ok=True)
    files.remove_stale(target.parent, re.escape(target.name))
    digest = hashlib.sha256()
    with (
        urllib.request.urlopen(url, timeout=_TIMEOUT) as answer,
        files.replacing(target) as file,
        progress_bar() as bar,
    ):
        total = answer.headers.get("Content-Length")
        task = bar.add_task(f"Downloading {target.name}", total=int(total) if total else None)
        while block := answer.read(_BLOCK):
            digest.update(block)
            file.write(block)
            bar.advance(task, len(block))
        if digest.hexdigest() != sha256:
            raise OSError(f"{url} is not the expected file: SHA-256 {digest.hexdigest()}")


def progress_bar():
    """A bar on stderr, transient, and on terminals only: stdout stays clean, logs keep no bar."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def first_line(error: Exception) -> str:
    """The first line of an error's message, not longer than a reader wants."""
    lines = str(error).splitlines()
    return lines[0][:300] if lines else "no message"


# --- Cache ------------------------------------------------------------------------------------


def cache_file(name: str, files: Iterable[Path]) -> Path:
    """Where the decoded content of `files` is kept: files that change are decoded anew."""
    state = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(files)]
    key = hashlib.sha256(repr((_CACHE_FORMAT, state)).encode()).hexdigest()[:16]
    return cache_folder() / f"{name}-{key}.npz"


def load_cache(path: Path, keys: Iterable[str]) -> dict[str, np.ndarray] | None:
    """The cached arrays of both splits, or None where there are none that can be trusted.

    They are what `store_cache` was given for this file: content, types, shapes and the file's name
    go into a digest, so a damaged file and one of other data are decoded again.
    """
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in keys}
            if str(stored[_DIGEST]) != _digest(path, arrays):
                raise ValueError("its content is not what was stored under this name")
    except Exception as error:  # zipfile and NumPy raise whatever damaged bytes make them raise
        _log.warning("Ignoring the damaged cache file %s (%s); reading again.", path, error)
        return None
    return arrays


def _digest(path: Path, arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(path.name.encode())
    for key, array in sorted(arrays.items()):
        digest.update(repr((key, array.dtype.str, array.shape)).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def store_cache(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes the cache in one step, so that parallel runs never see half a file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.remove_stale(path.parent)
        with files.replacing(path) as file:
            np.savez(file, **arrays, **{_DIGEST: _digest(path, arrays)})
    except OSError as error:
        _log.warning(
            "Cannot keep decoded data in %s (%s): it will be decoded again next time. "
            "Set FEDJAX_SEC_CACHE to a writable folder.",
            path.parent,
            error,
        )

"""The common state of a group of runs: one file a checkpoint, whole or not there, with a digest."""

import hashlib
import json
import logging
import re
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sec import files
from fedjax_sec.results import differences
from fedjax_sec.schema import ConfigError

_log = logging.getLogger(__name__)

_FORMAT = "fedjax_sec checkpoint 1"
_KEPT = 2  # if the newest is damaged, the one before it serves
_DAMAGE = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)


class Saved(NamedTuple):
    """A checkpoint: `state` after `done` rounds, with what belongs to it.

    `elapsed` are the seconds spent; `rows[i]` the digests of run i's rows of metrics so far;
    `start[i]` the digest of the parameters that it started from, None for initial ones.
    """

    done: int
    state: Any
    elapsed: float
    rows: list[list[str]]
    start: list[str | None]


class Checkpoints:
    """The newest two states in a folder, `ROUND.npz` each, of runs with these configurations."""

    def __init__(self, folder: str | Path, configs: Sequence[dict]):
        self.folder = Path(folder).absolute()
        self._configs = json.loads(json.dumps(list(configs)))  # as they are read back

    def rounds(self) -> list[int]:
        """The rounds after which a state was saved, the newest first."""
        if not self.folder.is_dir():
            return []
        names = (re.fullmatch(r"(\d+)\.npz", path.name) for path in self.folder.iterdir())
        return sorted((int(name[1]) for name in names if name), reverse=True)

    def files(self) -> list[Path]:
        """Every file here that we write, the newest checkpoint first."""
        return [*map(self._path, self.rounds()), *files.leftovers(self.folder, r"\d+\.npz")]

    def _path(self, done: int) -> Path:
        return self.folder / f"{done}.npz"

    def save(self, saved: Saved) -> None:
        """Saves a state, and removes all but the newest two."""
        self.folder.mkdir(parents=True, exist_ok=True)
        leaves = {name: np.asarray(leaf) for name, leaf in _named(saved.state).items()}
        about = {
            "format": _FORMAT,
            "done": saved.done,
            "elapsed": saved.elapsed,
            "rows": saved.rows,
            "start": saved.start,
            "configs": self._configs,
        }
        about["sha256"] = _digest(about, leaves)
        with files.replacing(self._path(saved.done)) as file:
            text = np.frombuffer(json.dumps(about).encode(), np.uint8)
            np.savez(file, about=text, **leaves)
        newer = [done for done in self.rounds() if done > saved.done]  # of a run that was damaged
        older = [done for done in self.rounds() if done < saved.done]
        files.remove_files(self._path(done) for done in [*newer, *older[_KEPT - 1 :]])

    def restore(
        self, state: Any, accept: Callable[[Saved], None] = lambda saved: None, remedy: str = ""
    ) -> Saved | None:
        """The newest state that can be trusted, with a warning where a newer one cannot.

        Args:
          state: of the same structure, shapes and types.
          accept: raises `ConfigError` for a checkpoint that does not fit what lies beside it.
          remedy: the advice in the error.

        Returns: None where nothing was saved. Raises: `ConfigError` where nothing can be trusted.
        """
        problems = []
        for done in self.rounds():
            try:
                saved = self._restored(done, state)
                accept(saved)
            except ConfigError as error:
                problems.append(str(error))
                continue
            if problems:
                _log.warning("%s Going on from round %d instead.", " ".join(problems), done)
            return saved
        if problems:
            raise ConfigError(f"{' '.join(problems)} No checkpoint is left to go on from. {remedy}")
        return None

    def params(self, done: int) -> np.ndarray | None:
        """The global parameters [R, D] after `done` rounds, None where no state was saved then."""
        return self._read(done)[1][".params"] if done in self.rounds() else None

    def _restored(self, done: int, state) -> Saved:
        about, leaves = self._read(done)
        expected = _named(state)
        shapes = {name: (leaf.shape, leaf.dtype) for name, leaf in expected.items()}
        if {name: (leaf.shape, leaf.dtype) for name, leaf in leaves.items()} != shapes:
            raise ConfigError(
                f"{str(self._path(done))!r} holds a state of another structure: it is of another "
                f"version."
            )
        restored = [jnp.array(leaves[name]) for name in expected]
        state = jax.tree.unflatten(jax.tree.structure(state), restored)
        return Saved(done, state, about["elapsed"], about["rows"], about["start"])

    def _read(self, done: int) -> tuple[dict, dict[str, np.ndarray]]:
        """What a checkpoint says of itself, and its leaves by name; checked."""
        path = self._path(done)
        try:
            with np.load(path) as stored:
                leaves = {name: stored[name] for name in stored.files}
            about = json.loads(leaves.pop("about").tobytes())
            digest = about.pop("sha256")
            intact = digest == _digest(about, leaves) and about["done"] == done
            intact = intact and about["format"] == _FORMAT
            pairs = list(zip(about["configs"], self._configs, strict=False))
            same_runs = len(about["configs"]) == len(self._configs)
        except _DAMAGE as error:
            reason = files.describe(error) if isinstance(error, OSError) else error
            raise ConfigError(f"{str(path)!r} is damaged: {_first_line(reason)}.") from None
        if not intact:
            raise ConfigError(f"{str(path)!r} is damaged: it is not as it was written.")
        different = {key for pair in pairs for key in differences(*pair)} - {"rounds"}
        if different or not same_runs:
            keys = ", ".join(sorted(different)) or "the number of runs"
            raise ConfigError(f"{str(path)!r} is of another configuration; it differs in {keys}.")
        return about, leaves


def _named(state) -> dict[str, Any]:
    """The leaves by their path, such as `.params`."""
    paths, _ = jax.tree.flatten_with_path(state)
    return {jax.tree_util.keystr(path): leaf for path, leaf in paths}


def _digest(about: dict, leaves: dict[str, np.ndarray]) -> str:
    """SHA-256 of what is said of a state and of its leaves: names, types, shapes and bytes."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(leaves):
        leaf = np.ascontiguousarray(leaves[name])
        digest.update(f"{name} {leaf.dtype.str} {leaves[name].shape}".encode())
        digest.update(leaf.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _first_line(reason) -> str:
    return (str(reason) or type(reason).__name__).splitlines()[0].rstrip(".")

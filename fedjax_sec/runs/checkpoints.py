"""The common state of a group of runs: orbax keeps the arrays, our file beside them vouches."""

import itertools
import json
import logging
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sec.core import ConfigError, files
from fedjax_sec.runs.config import differences

_log = logging.getLogger(__name__)

_FORMAT = "fedjax_sec checkpoint 3"
_KEPT = 2  # if the newest is damaged, the one before it serves
#: Our names of orbax's folders, and what orbax appends until a folder is complete.
_FOLDER = re.compile(r"(\d+)-\d+(\.orbax-checkpoint-tmp.*)?")
#: The files that orbax writes in one, and the locks of TensorStore, which it writes arrays with.
_WRITTEN = re.compile(
    r"_METADATA|_CHECKPOINT_METADATA|_sharding|commit_success\.txt|array_metadatas/process_\d+|"
    r"(ocdbt\.process_\d+/)?(manifest\.ocdbt|d/[0-9a-f]{32})(\.__lock)?"
)


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
    """The newest two states in a folder, of runs with these configurations.

    The state after round 4 is `4.json`, written last, and the folder of arrays that it names,
    `4-0`, with the digests of the files in it. A folder that no such file names does not count.
    """

    def __init__(self, folder: str | Path, configs: Sequence[dict]):
        self.folder = Path(folder).absolute()
        self._configs = json.loads(json.dumps(list(configs)))  # as they are read back

    def rounds(self) -> list[int]:
        """The rounds after which a state was saved, the newest first."""
        if not self.folder.is_dir():
            return []
        names = (re.fullmatch(r"(\d+)\.json", path.name) for path in self.folder.iterdir())
        return sorted((int(name[1]) for name in names if name), reverse=True)

    def files(self, kept: Collection[int] = ()) -> list[Path]:
        """Every file here that we write, but the states after the rounds `kept`.

        In the order of removal: a kill on the way leaves arrays that do not count.
        """
        states = [self._path(done) for done in self.rounds() if done not in kept]
        arrays = itertools.chain(*self._arrays_but(kept).values())
        return [*states, *arrays, *files.leftovers(self.folder, r"\d+\.json")]

    def _arrays_but(self, kept: Collection[int]) -> dict[Path, list[Path]]:
        """Orbax's folders but those of these states, and the files in each that orbax wrote."""
        known = {done: self._known(done) for done in self.rounds()}
        written = {}
        for folder in self._folders():
            done = int(_FOLDER.fullmatch(folder.name)[1])
            name, digests = known.get(done, ("", {}))
            if done in kept and name in (folder.name, None):
                continue
            names = digests if name == folder.name else ()
            written[folder] = [
                path
                for path in sorted(folder.rglob("*"))
                if (inner := path.relative_to(folder).as_posix()) in names
                or _WRITTEN.fullmatch(inner)
            ]
        return written

    def keep_only(self, rounds: Collection[int]) -> list[Path]:
        """Removes, file by file, all but the states after these rounds.

        Returns: folders that stay, since other files are in them too.
        """
        arrays = self._arrays_but(rounds)
        files.remove_files(self.files(rounds))
        for folder in arrays:
            inner = (path for path in folder.rglob("*") if path.is_dir())
            files.remove_empty([*sorted(inner, reverse=True), folder])
        files.remove_empty([self.folder])
        return [folder for folder, paths in arrays.items() if paths and folder.exists()]

    def tidy(self, rounds: Collection[int] | None = None) -> None:
        """Removes what killed processes left, and states but those after `rounds`."""
        for folder in self.keep_only(self.rounds() if rounds is None else rounds):
            files.mention_rest(folder)

    def _path(self, done: int) -> Path:
        return self.folder / f"{done}.json"

    def _folders(self) -> list[Path]:
        paths = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        paths = [path for path in paths if _FOLDER.fullmatch(path.name)]
        return [path for path in paths if path.is_dir() and not path.is_symlink()]

    def _known(self, done: int) -> tuple[str | None, dict[str, str]]:
        """A state's folder and the digests of its files; None where `ROUND.json` is damaged."""
        try:
            about = files.read_json(self._path(done), digest=True)
            return about["folder"], about["files"]
        except (ConfigError, KeyError):
            return None, {}

    def save(self, saved: Saved) -> None:
        """Saves a state, and removes all but the newest two."""
        import orbax.checkpoint as ocp

        self.folder.mkdir(parents=True, exist_ok=True)
        leaves = {name: np.asarray(leaf) for name, leaf in _named(saved.state).items()}
        folder = self._free(saved.done)
        try:
            with _orbax() as orbax:
                orbax.save(folder, args=ocp.args.StandardSave(_stored(leaves)))
        except OSError:
            raise
        except Exception as error:  # TensorStore's, for a full disk too
            raise OSError(f"{str(folder)!r} cannot be written: {_first_line(error)}.") from error
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        about = {
            "format": _FORMAT,
            "done": saved.done,
            "elapsed": saved.elapsed,
            "rows": saved.rows,
            "start": saved.start,
            "configs": self._configs,
            "leaves": _described(leaves),
            "folder": folder.name,
            "files": {
                path.relative_to(folder).as_posix(): files.file_digest(path) for path in paths
            },
        }
        files.write_json(self._path(saved.done), about)
        # Newer ones are of a run that was damaged.
        self.tidy([done for done in self.rounds() if done <= saved.done][:_KEPT])

    def _free(self, done: int) -> Path:
        """A folder that is not there: in one that could not be removed are files of others."""
        names = (f"{done}-{number}" for number in itertools.count())
        return self.folder / next(name for name in names if not any(self.folder.glob(f"{name}*")))

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
            said = " ".join(dict.fromkeys(problems))  # rows that are lost fit no checkpoint
            raise ConfigError(
                f"{said.replace(remedy, '').rstrip()} No checkpoint is left to go on from. {remedy}"
            )
        return None

    def params(self, done: int) -> np.ndarray | None:
        """The global parameters [R, D] after `done` rounds, None where no state was saved then."""
        if done not in self.rounds():
            return None
        return self._arrays(self._read(done))["['params']"]

    def at(self, done: int, state: Any) -> Saved:
        """The state after `done` rounds, of the structure of `state`.

        Raises: `ConfigError` where it was not saved, or cannot be trusted.
        """
        return self._restored(done, state)

    def _restored(self, done: int, state) -> Saved:
        about, expected = self._read(done), _named(state)
        if about["leaves"] != _described(expected):
            raise ConfigError(
                f"{str(self._path(done))!r} holds a state of another structure: it is of another "
                f"version."
            )
        leaves = self._arrays(about)
        restored = [jnp.array(leaves[name]) for name in expected]
        state = jax.tree.unflatten(jax.tree.structure(state), restored)
        return Saved(done, state, about["elapsed"], about["rows"], about["start"])

    def _read(self, done: int) -> dict:
        """A checkpoint's description of itself; every file of it is checked."""
        path = self._path(done)
        about = files.read_json(path, digest=True)
        if isinstance(about.get("format"), (int, str)) and about["format"] != _FORMAT:
            raise ConfigError(
                f"{str(path)!r} is a state that another version of fedjax_sec wrote "
                f"({about['format']}; this one reads {_FORMAT})."
            )
        if (about.get("format"), about.get("done")) != (_FORMAT, done):
            raise ConfigError(f"{str(path)!r} is damaged: it is not as it was written.")
        for name, digest in about["files"].items():
            part = self.folder / about["folder"] / name
            try:
                intact = files.file_digest(part) == digest
            except OSError as error:
                raise ConfigError(f"{str(part)!r} is damaged: {files.describe(error)}") from None
            if not intact:
                raise ConfigError(f"{str(part)!r} is damaged: it is not as it was written.")
        pairs = list(zip(about["configs"], self._configs, strict=False))
        different = {key for pair in pairs for key in differences(*pair)} - {"rounds"}
        if different or len(about["configs"]) != len(self._configs):
            keys = ", ".join(sorted(different)) or "the number of runs"
            raise ConfigError(f"{str(path)!r} is of another configuration; it differs in {keys}.")
        return about

    def _arrays(self, about: dict) -> dict[str, np.ndarray]:
        """The leaves of a checked checkpoint by name."""
        import orbax.checkpoint as ocp

        leaves = {
            name: np.zeros(shape, jnp.dtype(dtype))
            for name, (dtype, shape) in about["leaves"].items()
        }
        folder = self.folder / about["folder"]
        try:
            with _orbax() as orbax:
                args = ocp.args.StandardRestore(_stored(leaves))
                return leaves | orbax.restore(folder, args=args)
        except Exception as error:
            raise ConfigError(f"{str(folder)!r} is damaged: {_first_line(error)}.") from error


def _orbax():
    """Orbax's checkpointer, which waits for no other process: one alone writes and reads."""
    import orbax.checkpoint as ocp  # slow to import, and not needed without an output folder

    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix="first" if jax.process_count() > 1 else None,
    )
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _named(state) -> dict[str, Any]:
    """The leaves by their path, such as `['params']`."""
    paths, _ = jax.tree.flatten_with_path(state)
    return {jax.tree_util.keystr(path): leaf for path, leaf in paths}


def _described(leaves: dict[str, Any]) -> dict[str, list]:
    return {name: [str(leaf.dtype), list(leaf.shape)] for name, leaf in leaves.items()}


def _stored(leaves: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those with elements; orbax refuses others, and their shapes say all of them."""
    return {name: leaf for name, leaf in leaves.items() if leaf.size}


def _first_line(reason) -> str:
    return (str(reason) or type(reason).__name__).splitlines()[0].rstrip(".")

"""The folder of a run: configuration, metrics, summary; a kill loses nothing, damage is noticed."""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from fedjax_sec.core import ConfigError, files
from fedjax_sec.core.registry import headlines
from fedjax_sec.runs import config as config_lib
from fedjax_sec.runs.checkpoints import Checkpoints
from fedjax_sec.runs.loggers.tensorboard import TensorBoard, event_files

CONFIG, METRICS, SUMMARY = "config.yaml", "metrics.jsonl", "summary.json"
PARAMS, EXECUTION, CHECKPOINTS = "params.npy", "execution.json", "checkpoints"
#: The mark of a folder that is ours, written before anything else, and the lock of who runs in it.
MARK, LOCK = ".fedjax_sec.json", ".fedjax_sec.lock"
#: How the kind of a folder with a paper's tables and figures begins; the paper's name follows.
PAPER = "paper "
_VERSION = 1  # of the folder's layout
_NUMBERS = frozenset((int, float, bool, type(None)))
_PACKAGES = ("fedjax_sec", "jax", "jaxlib", "flax", "optax", "numpy", "tensorflow-datasets")


def figures() -> tuple[str, ...]:
    """The figures that a run's folder may hold, one of each task's headline."""
    return tuple(f"figures/{name}.{kind}" for name in headlines() for kind in ("png", "pdf"))


class Mark(NamedTuple):
    """A folder's kind: `run`, `cell` (a sweep's run), `sweep`, or a word for other content.

    `paper NAME` is a folder of a paper's tables and figures; `free` one that does not exist or
    holds nothing; `older` a run without a mark, as versions before the mark made them; `other`
    everything else.
    """

    kind: str
    problem: str = ""


def read_mark(folder: Path) -> Mark:
    """A folder's kind by its mark; `free` or `other` where it has none."""
    try:
        names = {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        return Mark("free")
    except OSError as error:
        raise files.refusal(folder, error) from error
    if MARK not in names:
        waste = {path.name for path in files.leftovers(folder, rf"{re.escape(MARK)}|{files.PROBE}")}
        return Mark("free" if names <= {LOCK} | waste else "other")
    try:
        content = files.read_json(folder / MARK)
    except ConfigError as error:
        return Mark("other", f" {error}")
    if (content.get("format"), content.get("version")) != ("fedjax_sec", _VERSION):
        return Mark("other", f" {str(folder / MARK)!r} is of another version.")
    return Mark(str(content.get("kind")))


def write_mark(folder: Path, kind: str) -> None:
    """Marks a folder as ours."""
    content = {"format": "fedjax_sec", "version": _VERSION, "kind": kind}
    files.write_json(folder / MARK, content)


def in_use(folder: Path, mark: Mark) -> ConfigError:
    """The refusal of a folder that is not ours."""
    return ConfigError(
        f"Output folder {str(folder)!r} is in use by something else: it holds files but not our "
        f"mark, {MARK}.{mark.problem} Choose another folder."
    )


class RunFolder:
    """`DIR/config.yaml`, `DIR/metrics.jsonl`, `DIR/summary.json` of one run.

    A folder is ours by its mark, and belongs to one configuration. Opening it again needs `resume`
    (and the same configuration) or `overwrite`; anything else is a `ConfigError`.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).absolute()

    # --- Claiming -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps all others from writing here. Raises `ConfigError` where somebody else writes."""
        self._refuse_others(self.mark())
        self.path.mkdir(parents=True, exist_ok=True)
        lock = files.acquire(self.path / LOCK)
        if lock is None:
            raise ConfigError(
                f"Output folder {str(self.path)!r}: another process is running in it. Wait for its "
                f"end, or choose another folder."
            )
        try:
            yield
        finally:
            lock.release()

    def _refuse_others(self, mark: Mark) -> None:
        if mark.kind == "sweep":
            raise ConfigError(
                f"Output folder {str(self.path)!r} holds a sweep, not a run. Choose another folder."
            )
        if mark.kind.startswith(PAPER):
            raise ConfigError(
                f"Output folder {str(self.path)!r} holds a paper's results, not a run. Choose "
                f"another folder."
            )
        if mark.kind == "other":
            raise in_use(self.path, mark)

    def mark(self) -> Mark:
        """The folder's kind."""
        mark = read_mark(self.path)
        return Mark("older") if mark.kind == "other" and self._is_older_run() else mark

    def _is_older_run(self) -> bool:
        """Whether a configuration of ours lies here beside rows or a summary that fit it."""
        try:
            experiment = self.experiment()
            if self.finished:
                return bool(self.summary())
            rows, _ = self._parsed()
            return (
                bool(rows)
                and {"round", "loss"} <= rows[0].keys()
                and any(name in rows[0] for name in headlines())
                and (experiment.rounds >= rows[-1]["round"])
            )
        except ConfigError:
            return False

    def check(
        self, config: dict, *, resume: bool = False, overwrite: bool = False, kind: str = "run"
    ) -> None:
        """Raises `ConfigError` where `open` would refuse the folder; writes nothing."""
        mark, name = self.mark(), f"Output folder {str(self.path)!r}"
        self._refuse_others(mark)
        if mark.kind in ("run", "cell") and mark.kind != kind and not self.finished:
            raise ConfigError(
                f"{name} is one of a sweep's: go on with the sweep's command, or choose another "
                f"folder."
                if mark.kind == "cell"
                else f"{name} holds a run that is not the sweep's: finish it with run --resume, or "
                f"choose another folder."
            )
        if mark.kind == "free" or self._is_begun_only():
            return
        if overwrite:
            if mark.kind == "older":
                raise ConfigError(
                    f"{name} holds a run of an older version without our mark, so nothing in it is "
                    f"removed. Choose another folder, or remove it yourself."
                )
            if mark.kind == "cell":
                raise ConfigError(f"{name} is one of a sweep's. Choose another folder.")
            return
        if not resume:
            replace = " or --overwrite to replace it" if mark.kind == "run" else ""
            raise ConfigError(
                f"{name} already holds a run. Choose another folder, or pass --resume to continue "
                f"it{replace}."
            )
        self.check_config(config, more_rounds=kind == "run" and mark.kind != "cell")
        if self.finished:
            self.summary()
            self.rows()

    def _is_begun_only(self) -> bool:
        """Whether a kill came before the configuration was written, so that nothing can be lost."""
        kept = (CONFIG, METRICS, SUMMARY, PARAMS)
        if self.mark().kind not in ("run", "cell") or self._states.rounds():
            return False
        return not any((self.path / name).exists() for name in kept)

    def open(
        self, config: dict, *, resume: bool = False, overwrite: bool = False, kind: str = "run"
    ) -> None:
        """Claims the folder, while `locked`, for a configuration.

        A run that shall have more rounds than it had is no longer finished.
        """
        self.check(config, resume=resume, overwrite=overwrite, kind=kind)
        self.path.mkdir(parents=True, exist_ok=True)
        if read_mark(self.path).kind not in ("run", "cell"):
            write_mark(self.path, kind)
        if kind == "run":  # a sweep's cells may be written to by who runs their group
            self.tidy()
        if overwrite:
            self.remove()
        elif self.finished:
            if self.summary()["final"]["round"] == config["rounds"]:
                return
            files.remove_files([self.path / SUMMARY])
        files.write_atomically(self.path / CONFIG, config_lib.dump_yaml(config))

    def remove(self) -> None:
        """Removes what we wrote, file by file, and names what stays."""
        files.remove_files([self.path / SUMMARY])  # a kill on the way leaves a run
        self._states.keep_only(())
        files.remove_files(self.path / name for name in (PARAMS, METRICS, *figures(), EXECUTION))
        files.remove_files([self.path / CONFIG])
        events = self.path / TensorBoard.below
        files.remove_files(event_files(events))
        files.remove_empty([self.path / "figures", events])
        files.mention_rest(self.path, (self.path / MARK, self.path / LOCK))

    @property
    def _states(self) -> Checkpoints:
        return Checkpoints(self.path / CHECKPOINTS, ())

    def tidy(self) -> None:
        """Removes temporary files of processes that died here; nobody else may be writing."""
        names = "|".join(
            re.escape(Path(name).name)
            for name in (MARK, files.PROBE, CONFIG, METRICS, SUMMARY, PARAMS, EXECUTION, *figures())
        )
        for part in (self.path, self.path / "figures"):
            files.remove_files(files.leftovers(part, names))
        self._states.tidy()

    # --- Configuration --------------------------------------------------------------------------

    def experiment(self) -> config_lib.Experiment:
        """The folder's configuration; an error in it names the file."""
        try:
            return config_lib.load(self.path / CONFIG)
        except ConfigError as error:
            path = str(self.path / CONFIG)
            raise ConfigError(str(error) if path in str(error) else f"{path!r}: {error}") from error

    def check_config(self, config: dict, more_rounds: bool = False) -> None:
        """Raises `ConfigError` that lists the keys in which the folder's configuration differs.

        With `more_rounds`, `rounds` may be larger than it was.
        """
        name, path = f"Output folder {str(self.path)!r}", self.path / CONFIG
        if not path.is_file():
            raise ConfigError(f"{name}: {CONFIG} of the run in it is missing. {self.remedy}")
        if config_lib.is_written(path, config):
            return
        known = config_lib.read_yaml(path)
        different = config_lib.differences(known, config)
        before = known.get("rounds")
        if more_rounds and different == ["rounds"] and isinstance(before, int):
            if config["rounds"] > before:
                return
            raise ConfigError(
                f"{name} holds a run of {before} rounds, got rounds = {config['rounds']}: they can "
                f"only become more. Give rounds={before}, or choose another folder."
            )
        if different:
            raise ConfigError(
                f"{name} holds a run of another configuration; it differs in "
                f"{', '.join(different)}. Choose another folder."
            )

    @property
    def remedy(self) -> str:
        """The advice where a file of the folder is damaged."""
        if read_mark(self.path).kind == "run":
            return "Choose another folder, or pass --overwrite to begin this run again."
        return f"Remove {str(self.path)!r} yourself and start the same command again."

    # --- Metrics --------------------------------------------------------------------------------

    def append(self, row: dict) -> str:
        """Adds one line to the metrics, makes sure that it is on the disk, gives its digest."""
        line = json.dumps(to_json(row))
        path = self.path / METRICS
        with files.naming(path), open(path, "a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        return line_digest(line)

    def rows(self) -> list[dict]:
        """The metrics, one mapping an evaluation; of a finished run, exactly those that it made.

        Raises: `ConfigError` that names the line which is broken, doubled, missing or another's.
        """
        rows, _ = self._parsed()
        if not self.finished:
            return rows
        path = self.path / METRICS
        digest = self.summary().get("files", {}).get(METRICS)
        if path.exists() and digest == files.file_digest(path):
            return rows
        _check_rounds(path, rows, evaluated(self.experiment()), self.remedy)
        self._check_digest()
        return rows

    def written_rows(self) -> list[dict]:
        """The metrics as far as they are written, also while the run goes on.

        Builds no configuration, so components of one's own need not be there. Raises: `ConfigError`
        for a broken line, and for a finished run whose file is not as the run wrote it.
        """
        rows, _ = self._parsed()
        if self.finished:
            self._check_digest()
        return rows

    def _check_digest(self) -> None:
        path, digest = self.path / METRICS, self.summary().get("files", {}).get(METRICS)
        if digest not in (None, files.file_digest(path)):  # older runs have none
            raise ConfigError(f"{str(path)!r} is not as the run wrote it. {self.remedy}")

    def take_up(self, digests: Sequence[str], rounds: Sequence[int]) -> list[dict]:
        """The rows at these rounds, if they are those with these digests; drops later ones.

        What comes after them is measured again, a line that a kill cut short among it.
        """
        rows, path = self.check_rows(digests, rounds), self.path / METRICS
        text = "".join(line + "\n" for line in self._parsed()[1][: len(rows)])
        if path.exists() and path.read_text() != text:
            files.write_atomically(path, text)
        return rows

    def check_rows(self, digests: Sequence[str], rounds: Sequence[int]) -> list[dict]:
        """The rows at these rounds. Raises `ConfigError` where they have other digests."""
        path = self.path / METRICS
        rows, lines = self._parsed()
        _check_rounds(path, rows[: len(rounds)], rounds, self.remedy)
        for number, (line, digest) in enumerate(zip(lines, digests, strict=False), 1):
            if line_digest(line) != digest:
                raise ConfigError(
                    f"{str(path)!r}, line {number} is not as the run wrote it. {self.remedy}"
                )
        return rows[: len(rounds)]

    def _parsed(self) -> tuple[list[dict], list[str]]:
        """The rows and their lines; a last line that a kill cut short is left out."""
        path = self.path / METRICS
        try:
            text = path.read_text()
        except FileNotFoundError:
            return [], []
        except OSError as error:
            raise ConfigError(files.describe(error)) from error
        except UnicodeDecodeError:
            raise ConfigError(f"{str(path)!r} is no text. {self.remedy}") from None
        *lines, _ = text.split("\n")
        rows: list[dict] = []
        known: dict = {}
        for number, line in enumerate(lines, 1):
            row, problem = _read_row(line, rows, known)
            if problem:
                raise ConfigError(f"{str(path)!r}, line {number} {problem}. {self.remedy}")
            rows.append(row)
        return rows, lines

    # --- What a finished run leaves -------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether the run has reached its last round."""
        return (self.path / SUMMARY).exists()

    @property
    def has_rows(self) -> bool:
        """Whether any metrics are written."""
        path = self.path / METRICS
        return path.exists() and path.stat().st_size > 0

    @property
    def lacks_figures(self) -> bool:
        """Whether a kill came between the summary and the figures."""
        return sum((self.path / name).exists() for name in figures()) < 2

    def write_params(self, flat) -> None:
        """Keeps the final parameters [D]."""
        with files.replacing(self.path / PARAMS) as file:
            np.save(file, np.asarray(flat))

    def params(self) -> np.ndarray | None:
        """The final parameters [D], if they were kept; `ConfigError` if they are damaged."""
        path = self.path / PARAMS
        if not path.exists():
            return None
        summary = self.summary()
        try:
            digest, params = files.file_digest(path), np.load(path)
        except (OSError, ValueError, EOFError) as error:
            raise ConfigError(f"{str(path)!r} is damaged: {error}. {self.remedy}") from None
        known = summary.get("files", {}).get(PARAMS, digest)  # older runs have none
        if digest != known or params.shape != (summary.get("parameters"),):
            raise ConfigError(f"{str(path)!r} is not as the run wrote it. {self.remedy}")
        return params

    def write_summary(self, summary: dict) -> None:
        """Marks the run as finished; the summary holds digests of the files beside it."""
        known = [name for name in (METRICS, PARAMS) if (self.path / name).exists()]
        digests = {name: files.file_digest(self.path / name) for name in known}
        files.write_json(self.path / SUMMARY, to_json(summary) | {"files": digests})

    def summary(self) -> dict:
        """The summary of a finished run. Raises `ConfigError` where it is damaged or another's."""
        path = self.path / SUMMARY
        try:
            summary = files.read_json(path)
        except ConfigError as error:
            raise ConfigError(f"{error} {self.remedy}") from None
        final = summary.get("final")
        score = next((name for name in headlines() if name in (final or ())), headlines()[0])
        known = {"data": ("label",), "final": ("round", score), "best": ("round", score)}
        for name, keys in known.items():
            part = summary.get(name)
            if not isinstance(part, dict) or not all(key in part for key in keys):
                raise ConfigError(
                    f"{str(path)!r} is no summary of a run: {name!r} lacks {', '.join(keys)}. "
                    f"{self.remedy}"
                )
        return summary


def evaluated(experiment: config_lib.Experiment) -> list[int]:
    """The rounds done at each evaluation of a whole run.

    >>> evaluated(config_lib.from_mapping({"rounds": 5, "evaluation": {"every": 2}}))
    [0, 2, 4, 5]
    """
    return [*range(0, experiment.rounds, experiment.evaluation.every), experiment.rounds]


def line_digest(line: str) -> str:
    """The digest of one row of metrics."""
    return hashlib.sha256(line.encode()).hexdigest()[:16]


def _check_rounds(path, rows, rounds, remedy) -> None:
    for number, due in enumerate(rounds, 1):
        there = rows[number - 1]["round"] if number <= len(rows) else None
        if there != due:
            got = "ends" if there is None else f"holds round {there}"
            raise ConfigError(
                f"{str(path)!r}, line {number}: round {due} is due, but the file {got} there. "
                f"{remedy}"
            )
    if len(rows) > len(rounds):
        raise ConfigError(
            f"{str(path)!r}, line {len(rounds) + 1}: the run has no more than {len(rounds)} rows. "
            f"{remedy}"
        )


def _read_row(line: str, before: Sequence[dict], known: dict) -> tuple[dict, str]:
    """A row, and the reason why it cannot come after these rows, or nothing.

    `known` is empty at first and keeps the shapes of the second row for the rows that follow it.
    """
    try:
        row = json.loads(line)
    except ValueError:
        return {}, "is no JSON"
    if not isinstance(row, dict) or type(row.get("round")) is not int:
        return {}, "is no row of metrics"
    if before and row["round"] <= before[-1]["round"]:
        return row, f"holds round {row['round']} after round {before[-1]['round']}"
    if len(before) == 1:  # round 0 has fewer metrics
        known |= _shapes(row)
    elif before and _shapes(row) != known:
        return row, "holds other metrics than the rows before it"
    return row, ""


def _shapes(row: Mapping) -> dict:
    """metric -> the shape of its value; numbers and null have none."""
    return {name: _shape(value) for name, value in row.items()}


def _shape(value):
    if isinstance(value, list):
        if _NUMBERS.issuperset(map(type, value)):  # most lists: one look is enough
            return len(value)
        return [_shape(item) for item in value]
    return None if value is None or isinstance(value, (int, float)) else type(value).__name__


def to_json(value):
    """Arrays as lists and non-finite numbers as null, since JSON has no NaN."""
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if hasattr(value, "dtype"):
        return to_json(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def environment() -> dict:
    """Device, platform, versions and git revision, as every summary states them."""
    device = jax.devices()[0]
    return {
        "device": f"{device.platform}: {device.device_kind} x {jax.device_count()}",
        "host": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {_processor()}",
        # On a GPU "default" means TF32 for products of float32.
        "matmul_precision": jax.config.jax_default_matmul_precision or "default",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "git_revision": _git_revision(),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown processor"


@functools.cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _git_revision() -> str | None:
    """The commit of the source tree when first asked for, with `-dirty` for other changes."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None

"""The rows of runs, handed to their loggers; a logger that fails stops no run."""

import contextlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedjax_sec.core.advice import one_line
from fedjax_sec.core.optional import require
from fedjax_sec.runs.loggers import PACKAGES, Logger, Run
from fedjax_sec.runs.loggers.tensorboard import TensorBoard
from fedjax_sec.runs.loggers.wandb import Wandb

_log = logging.getLogger(__name__)

LOGGERS: dict[str, type] = {"tensorboard": TensorBoard, "wandb": Wandb}


def check_installed(names: Iterable[str]) -> None:
    """Raises `ConfigError` where the package of a logger is not there."""
    for name in names:
        require(PACKAGES[name], f"The logger {name!r}")


class Writing:
    """Loggers of runs that are measured together: an `on_evaluation` that closes them at the end.

    A logger that raises is left out from then on, after one warning. Used as a context: leaving it
    by an error marks the runs as not finished.

    Args:
      runs: in the order of the rows.
      names: the loggers of each run.
      folder: the run's or the sweep's, in which each logger has a folder of its own.
    """

    def __init__(self, runs: Sequence[Run], names: Sequence[Sequence[str]], folder: Path):
        self._runs, self._folder = runs, folder
        self._members = {
            name: [i for i, given in enumerate(names) if name in given] for name in LOGGERS
        }
        self._open: dict[str, list[Logger]] = {}
        self._goes_on = False

    def __enter__(self) -> "Writing":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close(finished=kind is None)

    def replay(self, rows: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        """Hands on what was measured before an interruption: rows of each run."""
        evaluations = list(zip(*rows, strict=True))
        self._goes_on = bool(evaluations)
        for one in evaluations:
            self(one[0]["round"], one)

    def __call__(self, done: int, rows: Sequence[Mapping[str, Any]]) -> None:
        for name, members in list(self._members.items()):
            try:
                if members and name not in self._open:
                    self._begin(name)
                for logger, i in zip(self._open.get(name, ()), members, strict=True):
                    logger.log(rows[i])
            except Exception as error:
                self._drop(name, error)

    def close(self, *, finished: bool) -> None:
        """Closes all that are open."""
        for name, loggers in list(self._open.items()):
            try:
                for logger in loggers:
                    logger.close(finished)
            except Exception as error:
                self._drop(name, error)
        self._open.clear()

    def _begin(self, name: str) -> None:
        cls, opened = LOGGERS[name], self._open.setdefault(name, [])
        folder = self._folder / cls.below
        for i in self._members[name]:
            opened.append(cls(self._runs[i], folder, self._goes_on))

    def _drop(self, name: str, error: Exception) -> None:
        said = f"{type(error).__name__}: {one_line(error)}"
        _log.warning("The logger %r is left out from here on, and the run goes on: %s", name, said)
        self._members[name] = []
        for logger in self._open.pop(name, ()):
            with contextlib.suppress(Exception):
                logger.close(False)

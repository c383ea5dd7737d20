"""Event files of TensorBoard (extra `[tensorboard]`)."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from fedjax_sec.core import files
from fedjax_sec.core.optional import require
from fedjax_sec.runs.config import dump_yaml
from fedjax_sec.runs.loggers import Run, points

#: How the names of our event files begin and end; all others are left alone.
PREFIX, SUFFIX = "events.out.tfevents.", ".fedjax_sec"


class TensorBoard:
    """Points by round, the configuration as text, and the axes as hyper-parameters.

    Whoever goes on replaces the event file of before by one with all rows, so that no point is
    there twice; a TensorBoard that is watching forgets what it has read.

    Source: tensorboardX 2.6; its file's writer is used as it is, since the writer around it has a
    thread that dies unnoticed on a full disk, and then stops whoever hands it a point.
    """

    below: ClassVar[str] = "tensorboard"

    def __init__(self, run: Run, folder: Path, goes_on: bool):
        purpose = "The logger 'tensorboard'"
        self._summaries = require("tensorboardX.summary", purpose)
        self._events = require("tensorboardX.proto.event_pb2", purpose)
        self._summary = require("tensorboardX.proto.summary_pb2", purpose).Summary
        writer = require("tensorboardX.event_file_writer", purpose)
        place = folder / run.path
        place.mkdir(parents=True, exist_ok=True)
        files.remove_files(event_files(place))
        self._writer = writer.EventsWriter(str(place / "events"), SUFFIX)
        self._session("START")  # what was read of earlier files no longer counts
        self._settings, self._named = run.settings, False
        text = f"    {dump_yaml(run.config)}".replace("\n", "\n    ").rstrip()
        self._write(self._summaries.text("config", text), 0)

    def log(self, row: Mapping[str, Any]) -> None:
        """Writes a row of `metrics.jsonl`."""
        numbers = points(row)
        if not self._named:
            begin, about, self._end = self._summaries.hparams(self._settings, numbers)
            self._write(begin, 0)
            self._write(about, 0)
            self._named = True
        values = [self._summary.Value(tag=n, simple_value=value) for n, value in numbers.items()]
        self._write(self._summary(value=values), row["round"])
        self._writer.flush()

    def close(self, finished: bool) -> None:
        """Ends; `finished` says whether the run has reached its last round."""
        if finished and self._named:
            self._write(self._end, 0)
        self._writer.close()

    def _write(self, summary, step: int) -> None:
        event = self._events.Event(summary=summary, step=step, wall_time=time.time())
        self._writer.write_event(event)

    def _session(self, status: str) -> None:
        log = self._events.SessionLog(status=status)
        self._writer.write_event(self._events.Event(session_log=log, step=0, wall_time=time.time()))


def event_files(folder: Path) -> list[Path]:
    """The event files in a folder that we have written."""
    return sorted(folder.glob(f"{PREFIX}*{SUFFIX}"))

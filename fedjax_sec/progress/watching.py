"""Callbacks of runs and sweeps that show their progress."""

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedjax_sec.core import ConfigError
from fedjax_sec.progress.displays import Display
from fedjax_sec.progress.words import Rate, State, newest
from fedjax_sec.sweeps import Cell, survey
from fedjax_sec.sweeps.status import RunStatus, Status

#: Seconds between two looks at what other processes have done; at least `_REST` times what a look
#: took, since a folder may hold thousands of runs.
_PAUSE, _REST = 1.0, 50


class OfRun:
    """An `on_evaluation` of a run."""

    def __init__(
        self,
        display: Display,
        rounds: int,
        title: str = "",
        clock: Callable[[], float] = time.monotonic,
    ):
        self._display, self._rounds, self._title = display, rounds, title
        self._rate = Rate(clock)
        self._measured = False
        display.show(State(title, 0, rounds, note="compiling"))

    def end(self) -> None:
        """The end, whether or not anything was computed."""
        if not self._measured:
            self._display.show(State(self._title, 0, self._rounds, note="nothing was computed"))

    def __call__(self, done: int, rows: Sequence[Mapping]) -> None:
        self._measured = True
        rate = self._rate.at(done)
        left = (self._rounds - done) / rate if rate else None
        self._display.show(State(self._title, done, self._rounds, rate, left, newest(rows)))


class OfSweep:
    """`on_group`, `on_wait` and `on_status` of a sweep, in rounds of all its runs.

    The speed is that of the group that runs here, with the rounds of all its runs. The time that is
    left is that of all rounds at this speed, and for each group to come the mean of what the groups
    here took beside their rounds: preparing and compiling. Now and then the folder says what
    other processes that share it have done and how many work: their rounds count as done, and the
    rest is shared with them.
    """

    def __init__(
        self,
        display: Display,
        cells: Sequence[Cell],
        unfinished: Sequence[Cell],
        out: Path,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._display, self._out = display, out
        self._total = sum(cell.experiment.rounds for cell in cells)
        left = sum(cell.experiment.rounds for cell in unfinished)
        self._earlier, self._done = self._total - left, {}
        self._unfinished = {cell.name for cell in unfinished}
        self._here: set[str] = set()  # the cells of the groups that started here
        self._others: list[RunStatus] = []
        self._next_look = -math.inf
        self._beside: dict[int, float] = {}  # of each group, the seconds beside its rounds
        self._clock, self._title = clock, ""
        self._failed: set[str] = set()

    @property
    def done(self) -> int:
        """The rounds of all runs that are done, here and in other processes."""
        others = sum(run.done for run in self._others if run.name not in self._here)
        return self._earlier + sum(self._done.values()) + others

    def on_group(self, number: int, total: int, members: Sequence[Cell]) -> Callable:
        """A group starts; what it returns is called after every evaluation."""
        names = ", ".join(dict.fromkeys(cell.title for cell in members))
        runs = f"{len(members)} run{'s' * (len(members) != 1)}"
        self._title, rate = f"group {number + 1}/{total} ({runs}): {names}", Rate(self._clock)
        begin, first = self._clock(), None
        self._here |= {cell.name for cell in members}
        self._look_around(begin)
        self._display.show(State(self._title, self.done, self._total, note="compiling"))

        def look(done: int, rows: Sequence[Mapping]) -> None:
            nonlocal first
            here = self._done[number] = done * len(members)
            first = here if first is None else first
            speed, left = rate.at(here), None
            now = self._clock()
            self._look_around(now)
            if speed:
                self._beside[number] = max(now - begin - (here - first) / speed, 0.0)
                mean = sum(self._beside.values()) / len(self._beside)
                left = (self._total - self.done) / speed + len(self._to_come()) * mean
                left /= 1 + len(self._groups_in("running"))
            self._display.show(
                State(self._title, self.done, self._total, speed, left, newest(rows))
            )

        return look

    def _look_around(self, now: float) -> None:
        """What the folder says of the runs that this process has not started."""
        if now < self._next_look:
            return
        begin, names = time.monotonic(), self._unfinished - self._here
        with contextlib.suppress(ConfigError, OSError):  # to show something must stop no run
            self._others = [run for run in survey(self._out).runs if run.name in names]
        self._next_look = now + max(_PAUSE, _REST * (time.monotonic() - begin))

    def _groups_in(self, state: str) -> set[str]:
        """The groups of other runs in this state, where no run has been started here since."""
        groups = {run.group for run in self._others if run.state == state and run.group}
        return groups - {run.group for run in self._others if run.name in self._here}

    def _to_come(self) -> set[str]:
        return self._groups_in("waiting") | self._groups_in("interrupted")

    def on_wait(self, left: Sequence[Cell]) -> None:
        """All that is left is run by other processes."""
        title = f"waiting for {len(left)} runs of other processes"
        self._look_around(self._clock())
        self._display.show(State(title, self.done, self._total))

    def on_status(self, status: Status) -> list[tuple[str, str]]:
        """What other processes have done; returns each run that failed since, and its error."""
        done = sum(run.done for run in status.runs)
        total = sum(run.rounds or run.done for run in status.runs)
        counts = ", ".join(f"{n} {name}" for name, n in status.counts.items() if n)
        left, rate = status.seconds_left, status.rounds_per_second
        rows = [run.newest for run in status.runs if run.state == "running"]
        self._display.show(State(counts, done, total, rate, left, newest(rows)))
        new = [
            (run.name, run.error)
            for run in status.runs
            if run.error is not None and run.name not in self._failed
        ]
        self._failed |= {name for name, _ in new}
        return new

"""Callbacks of runs and sweeps that show their progress."""

import time
from collections.abc import Callable, Mapping, Sequence

from fedjax_sec.progress.displays import Display
from fedjax_sec.progress.words import Rate, State, newest
from fedjax_sec.sweeps import Cell
from fedjax_sec.sweeps.status import Status


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
    here took beside their rounds: preparing and compiling.
    """

    def __init__(
        self,
        display: Display,
        cells: Sequence[Cell],
        unfinished: Sequence[Cell],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._display = display
        self._total = sum(cell.experiment.rounds for cell in cells)
        left = sum(cell.experiment.rounds for cell in unfinished)
        self._earlier, self._done = self._total - left, {}
        self._beside: dict[int, float] = {}  # of each group, the seconds beside its rounds
        self._clock, self._title = clock, ""
        self._failed: set[str] = set()

    @property
    def done(self) -> int:
        """The rounds of all runs that are done."""
        return self._earlier + sum(self._done.values())

    def on_group(self, number: int, total: int, members: Sequence[Cell]) -> Callable:
        """A group starts; what it returns is called after every evaluation."""
        names = ", ".join(dict.fromkeys(cell.title for cell in members))
        runs = f"{len(members)} run{'s' * (len(members) != 1)}"
        self._title, rate = f"group {number + 1}/{total} ({runs}): {names}", Rate(self._clock)
        begin, first = self._clock(), None
        self._display.show(State(self._title, self.done, self._total, note="compiling"))

        def look(done: int, rows: Sequence[Mapping]) -> None:
            nonlocal first
            here = self._done[number] = done * len(members)
            first = here if first is None else first
            speed, left = rate.at(here), None
            if speed:
                self._beside[number] = max(self._clock() - begin - (here - first) / speed, 0.0)
                mean = sum(self._beside.values()) / len(self._beside)
                left = (self._total - self.done) / speed + (total - number - 1) * mean
            self._display.show(
                State(self._title, self.done, self._total, speed, left, newest(rows))
            )

        return look

    def on_wait(self, left: Sequence[Cell]) -> None:
        """All that is left is run by other processes."""
        title = f"waiting for {len(left)} runs of other processes"
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

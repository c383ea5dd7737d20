"""Programs of groups that come next, compiled while another group is compiled or runs."""

import contextlib
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from fedjax_sec.core.caching import usable_cores
from fedjax_sec.runs.program import Program
from fedjax_sec.runs.tuning import Tuning
from fedjax_sec.sweeps import groups as groups_lib
from fedjax_sec.sweeps.groups import Group

#: Programs that are kept ready at most, each with a copy of its data on the device.
MOST = 4


class Ahead:
    """Compiles the programs of groups on the cores of this machine, a core each.

    Experiments are traced by the caller, whose settings of JAX count; XLA compiles in threads.
    """

    def __init__(self, out: Path, at_once: int | None):
        self._out, self._at_once = out, at_once
        self._most = min(usable_cores(), MOST)
        self._threads = ThreadPoolExecutor(self._most)
        self._programs: dict[str, tuple[Tuning, Future[Program]]] = {}

    def take(self, group: Group, tuning: Tuning) -> Future[Program]:
        """The program of a group for this choice, begun now unless it is already."""
        known, future = self._programs.pop(group.name, (None, None))
        return future if future is not None and known == tuning else self._begin(group, tuning)

    def _begin(self, group: Group, tuning: Tuning) -> Future[Program]:
        return self._threads.submit(groups_lib.traced(group, self._at_once, tuning).finish)

    def fill(self, left: dict[str, Group], *, measures: bool) -> None:
        """Begins the next of the groups that are `left`, and keeps them there prepared.

        Layouts are measured only where that is asked for, once all compilation has ended.
        """
        self._programs = {name: one for name, one in self._programs.items() if name in left}
        for name in list(left):
            if len(self._programs) >= self._most:
                return
            if name in self._programs:
                continue
            # What is wrong with it is its own error, when it is its turn.
            with contextlib.suppress(Exception):
                left[name] = groups_lib.with_prepared(left[name], {})
                before = self._wait if measures else _not_now
                tuning = groups_lib.tuning_ahead(self._out, left[name], before)
                if tuning is not None:
                    self._programs[name] = tuning, self._begin(left[name], tuning)

    def _wait(self) -> None:
        wait([future for _, future in self._programs.values()])

    def close(self) -> None:
        """Gives up what has not begun."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class _NotNow(Exception):
    """A layout is not known, and this is no time to measure it."""


def _not_now() -> None:
    raise _NotNow

"""The common part of launchers whose workers are other processes: start, watch, restart, stop."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from fedjax_sec.core import ConfigError, files
from fedjax_sec.sweeps import groups as groups_lib
from fedjax_sec.sweeps.groups import Group
from fedjax_sec.sweeps.launchers import worker
from fedjax_sec.sweeps.launchers.worker import Job

#: Seconds between two looks at the workers.
PAUSE = 1.0
#: How often a worker may end with an error before it has taken a group.
_BARREN = 2


class Workers(Protocol):
    """Processes somewhere, each of which is a number."""

    def start(self, numbers: Sequence[int]) -> None:
        """Starts workers, or those with these numbers again."""
        ...

    def ended(self, number: int) -> str | None:
        """None while it runs or waits for a machine; else why it ended, empty where all is well."""
        ...

    def stop(self, number: int) -> None:
        """Ends it, whatever it does."""
        ...


def supervise(
    job: Job,
    workers: Workers,
    count: int,
    *,
    patience: float,
    on_status: Callable[[], None] | None = None,
) -> None:
    """Keeps `count` workers on the job's groups until each is done, failed or in other hands.

    A worker that died is started again, and so is one whose group has given no sign of life for
    `patience` seconds, after it is stopped. An interruption stops all.

    Raises: `ConfigError` where workers end with an error before they have taken a group.
    """
    out, watch = Path(job.out), _Watch(Path(job.out), patience)
    groups_lib.forget_failures(out, job.groups)
    running = set(range(min(count, len(job.groups))))
    barren = dict.fromkeys(running, 0)
    with worker.launching(out):
        try:
            taken = {number: worker.taken(out, number) for number in running}
            workers.start(sorted(running))
            while running:
                time.sleep(PAUSE)
                watch.look(job.groups)
                for number in sorted(running):
                    stuck = number in watch.silent
                    why = "it gave no sign of life" if stuck else workers.ended(number)
                    if why is None:
                        continue
                    if stuck:
                        workers.stop(number)
                        watch.forget(number)
                    running.discard(number)
                    if not why or not _left(out, job.groups):
                        continue
                    before, taken[number] = taken[number], worker.taken(out, number)
                    barren[number] = 0 if taken[number] > before else barren[number] + 1
                    if barren[number] > _BARREN:
                        raise ConfigError(f"Worker {number} cannot start: {why}")
                    workers.start([number])
                    running.add(number)
                if on_status is not None:
                    on_status()
        finally:
            for number in running:
                workers.stop(number)


def _left(out: Path, names: Sequence[str]) -> bool:
    """Whether a group is neither done nor failed."""
    return any(
        groups_lib.is_planned(out, name) and groups_lib.failure_of(out, name) is None
        for name in names
    )


class _Watch:
    """Which workers show no sign of life in the group that they hold."""

    def __init__(self, out: Path, patience: float):
        self.out, self.patience = out, patience
        self.seen: dict[str, tuple[tuple, float]] = {}  # group -> (sign of life, when it was new)
        self.silent: set[int] = set()

    def look(self, names: Sequence[str]) -> None:
        """Sees which workers are `silent` now."""
        now, self.silent = time.monotonic(), set()
        for name in names:
            path = self.out / groups_lib.GROUPS / name / groups_lib.WORKER
            try:
                number, sign = int(files.read_json(path)["worker"]), path.stat().st_mtime
            except (ConfigError, OSError, KeyError, ValueError):
                self.seen.pop(name, None)
                continue
            if self.seen.get(name, (None, 0.0))[0] != (number, sign):
                self.seen[name] = (number, sign), now
            elif now - self.seen[name][1] > self.patience and groups_lib.is_held(self.out, name):
                self.silent.add(number)

    def forget(self, number: int) -> None:
        """Waits anew for signs of life of a worker."""
        self.seen = {name: one for name, one in self.seen.items() if one[0][0] != number}


def job_of(out: Path, groups: Sequence[Group], at_once: int | None, retries: int) -> Job:
    """The job of these groups.

    Raises: `ConfigError` where a group cannot be read back in another process: it holds objects
    that were given from Python.
    """
    for group in groups:
        objects = [name for cell in group.cells for name in cell.experiment.in_no_file]
        if objects:
            raise ConfigError(
                f"launcher: other processes read experiments from the folder, and {objects[0]!r} "
                f"of {group.cells[0].name!r} is Python's and in no file. Leave the launcher out to "
                f"run in this process."
            )
        try:
            groups_lib.read_group(out, group.name)
        except ConfigError as error:
            raise ConfigError(
                f"launcher: other processes read experiments from the folder, and "
                f"{group.cells[0].name!r} cannot be read there: {error} Leave the launcher out to "
                f"run in this process."
            ) from error
    return Job(str(out), tuple(group.name for group in groups), at_once, retries)

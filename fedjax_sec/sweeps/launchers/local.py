"""Groups run in this process, one after another; several processes may share the folder."""

import contextlib
import errno
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import filelock

from fedjax_sec.core.host import undisturbed
from fedjax_sec.sweeps import groups as groups_lib
from fedjax_sec.sweeps.grid import Cell
from fedjax_sec.sweeps.groups import Group
from fedjax_sec.sweeps.launchers.ahead import Ahead

#: Errors of the system that the next group would meet, too.
_EVERYBODYS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class Local:
    """This process works through the groups, and takes those that no other process has.

    A group that fails stops no other: its error is written down, and raised when all others are
    done. While a group compiles and runs, the programs of the next ones are compiled: XLA compiles
    most of a program on one core. This needs no lock: if another process takes that group, the
    compilation is lost, but no device waits at the end for a group that a busy process has
    reserved. Layouts are measured before a group runs, when nothing else runs or compiles.

    `holding(out, group)` gives what is entered around the work on a group whose lock is held; None
    leaves the group out.
    """

    def __init__(
        self,
        holding: Callable[[Path, Group], contextlib.AbstractContextManager | None] | None = None,
    ):
        self._holding = holding or (lambda out, group: contextlib.nullcontext())

    @undisturbed
    def launch(
        self,
        out: Path,
        groups: Sequence[Group],
        *,
        at_once: int | None = None,
        on_group: Callable[[int, int, list[Cell]], Callable | None] | None = None,
        on_wait: Callable[[list[Cell]], None] | None = None,
        on_status: Callable | None = None,
    ) -> None:
        """See `fedjax_sec.sweeps.launchers.Launcher`; `on_wait` is called once.

        Raises: the error of the first group that failed, with a note on each other one.
        """
        left = {group.name: group for group in groups}
        places = {group.name: place for place, group in enumerate(groups)}
        ahead = Ahead(out, at_once)
        failed: list[tuple[Group, Exception]] = []
        callers: list[Exception] = []

        def work(group):
            def start():
                if on_group is None:
                    return None
                report = _noting(on_group, callers)
                return report(places[group.name], len(groups), list(group.cells))

            def ready(group, tuning):
                program = ahead.take(group, tuning)
                ahead.fill(left, measures=False)
                return program.result()

            if (held := self._holding(out, group)) is not None:
                with held:
                    groups_lib.work_locked(
                        out,
                        group,
                        start=start,
                        ready=ready,
                        before_training=lambda: ahead.fill(left, measures=True),
                    )

        try:
            while (taken := _claim(out, left, on_wait)) is not None:
                group, lock = taken
                try:
                    work(group)
                except Exception as error:
                    if error in callers or _stops_everybody(error):
                        raise
                    groups_lib.record_failure(out, group, error)
                    failed.append((group, error))
                finally:
                    lock.release()
        finally:
            ahead.close()
        if failed:
            raise _first_of(failed)


def _noting(function: Callable, errors: list[Exception]) -> Callable:
    """The caller's function, and what it returns, whose errors are kept apart from a group's."""

    def noting(*args):
        try:
            result = function(*args)
        except Exception as error:
            errors.append(error)
            raise
        return _noting(result, errors) if callable(result) else result

    return noting


def _stops_everybody(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in _EVERYBODYS


def _first_of(failed: Sequence[tuple[Group, Exception]]) -> Exception:
    """The first error, which names the others."""
    (_, first), *others = failed
    for group, error in others:
        first.add_note(f"{group.cells[0].name} failed, too: {type(error).__name__}: {error}")
    return first


def _claim(
    out: Path, left: dict[str, Group], on_wait: Callable | None
) -> tuple[Group, filelock.BaseFileLock] | None:
    """The first group that no other process works on, and its lock; waits until there is one.

    It is taken out of `left`, and so are those that failed in other processes. None where nothing
    is left.
    """
    waits = False
    while left:
        for name in list(left):
            if (lock := groups_lib.take(out, name)) is not None:
                group = left.pop(name)
                if groups_lib.failure_of(out, name) is None:
                    return group, lock
                lock.release()
        if left and on_wait and not waits:
            on_wait([cell for group in left.values() for cell in group.cells])
        if left:
            waits = True
            time.sleep(groups_lib.PAUSE)
    return None

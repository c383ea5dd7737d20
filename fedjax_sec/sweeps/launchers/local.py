"""Groups run in this process, one after another; several processes may share the folder."""

import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import filelock

from fedjax_sec.core.host import undisturbed
from fedjax_sec.runs.program import Program
from fedjax_sec.runs.tuning import Tuning
from fedjax_sec.sweeps import groups as groups_lib
from fedjax_sec.sweeps.grid import Cell
from fedjax_sec.sweeps.groups import Group


class Local:
    """This process works through the groups, and takes those that no other process has.

    While a group runs, the program of the next one is compiled: XLA compiles on one core. This
    needs no lock: if another process takes that group, the compilation is lost, but no device
    waits at the end for a group that a busy process has reserved. Layouts are measured before a
    group runs, when nothing else runs or compiles.
    """

    @undisturbed
    def launch(
        self,
        out: Path,
        groups: Sequence[Group],
        *,
        at_once: int | None = None,
        on_group: Callable[[int, int, list[Cell]], Callable | None] | None = None,
        on_wait: Callable[[list[Cell]], None] | None = None,
    ) -> None:
        """See `fedjax_sec.sweeps.launchers.Launcher`; `on_wait` is called once."""
        left = {group.name: groups_lib.with_prepared(group, {}) for group in groups}
        places = {group.name: place for place, group in enumerate(groups)}
        compiler = ThreadPoolExecutor(max_workers=1)
        ahead: dict[str, tuple[Tuning, Future[Program]]] = {}

        def compile_next():
            for group in left.values():
                if (tuning := groups_lib.tuning_ahead(out, group)) is not None:
                    if ahead.get(group.name, (None,))[0] != tuning:
                        future = compiler.submit(groups_lib.compiled, group, at_once, tuning)
                        ahead.clear()
                        ahead[group.name] = tuning, future
                    return

        try:
            while left:
                group, lock = _claim(out, left.values(), on_wait)
                del left[group.name]

                def start(group=group):
                    if on_group is None:
                        return None
                    return on_group(places[group.name], len(groups), list(group.cells))

                def ready(tuning, group=group):
                    known, future = ahead.pop(group.name, (None, None))
                    return future.result() if known == tuning else None

                try:
                    groups_lib.work_locked(
                        out,
                        group,
                        at_once=at_once,
                        start=start,
                        ready=ready,
                        before_training=compile_next,
                    )
                finally:
                    lock.release()
        finally:
            compiler.shutdown(wait=False, cancel_futures=True)


def _claim(
    out: Path, groups: Collection[Group], on_wait: Callable | None
) -> tuple[Group, filelock.BaseFileLock]:
    """The first group that no other process works on, and its lock; waits until there is one."""
    waits = False
    while True:
        for group in groups:
            if (lock := groups_lib.take(out, group.name)) is not None:
                return group, lock
        if on_wait and not waits:
            on_wait([cell for group in groups for cell in group.cells])
        waits = True
        time.sleep(groups_lib.PAUSE)

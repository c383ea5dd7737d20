"""Where the groups of a sweep run: the protocol of launchers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from fedjax_sec.sweeps.grid import Cell
from fedjax_sec.sweeps.groups import Group


@runtime_checkable
class Launcher(Protocol):
    """Says where planned groups run: in this process, in others, on other machines.

    A launcher needs `fedjax_sec.sweeps.work(out, group.name)` alone, called once for each group
    anywhere that sees the folder `out`, any number of times and in any order.
    """

    def launch(
        self,
        out: Path,
        groups: Sequence[Group],
        *,
        at_once: int | None = None,
        on_group: Callable[[int, int, list[Cell]], Callable | None] | None = None,
        on_wait: Callable[[list[Cell]], None] | None = None,
        on_status: Callable[[], None] | None = None,
    ) -> None:
        """Has every group worked, and returns when `work` has returned for each of them.

        Args:
          out: the sweep's folder, absolute.
          groups: as `plan` gives them.
          at_once: for `work`.
          on_group: called as `on_group(number, total, cells)` when a group starts; what it returns
            is `work`'s `on_evaluation`. A launcher that starts processes may ignore it.
          on_wait: called with the cells that are left when other processes run all of them. May be
            ignored, too.
          on_status: called without arguments every now and then while other processes work.

        Raises: what stopped a group, or nothing where it is written down in the folder; all others
        are finished, unless the error is one that all meet.
        """
        ...

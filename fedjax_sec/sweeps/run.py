"""A sweep from beginning to end: its cells checked, planned, launched and collected."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedjax_sec.core import ConfigError, files
from fedjax_sec.core.advice import shown
from fedjax_sec.core.host import undisturbed
from fedjax_sec.runs.experiment import Result
from fedjax_sec.runs.prepare import Prepared
from fedjax_sec.sweeps import groups as groups_lib
from fedjax_sec.sweeps.grid import Cell
from fedjax_sec.sweeps.launchers import Launcher
from fedjax_sec.sweeps.launchers.local import Local


@undisturbed
def run_cells(
    cells: Sequence[Cell],
    out: str | Path,
    *,
    at_once: int | None = None,
    group_size: int | None = None,
    launcher: Launcher | None = None,
    on_group: Callable[[int, int, list[Cell]], Callable | None] | None = None,
    on_wait: Callable[[list[Cell]], None] | None = None,
    prepared: Mapping[str, Prepared] | None = None,
) -> list[Result]:
    """Runs what is not yet finished and returns all results, in the order of the cells.

    Processes that run the same cells in the same folder share the work, a group at a time, and each
    returns when everything is finished; a group whose process died goes on in another one from its
    checkpoint. All results are read from the folder, so their `params` are None.

    Args:
      cells: of one sweep.
      out: the sweep's folder.
      at_once: replicas vmapped at a time (None: as many as fit an accelerator, 1 on a CPU).
      group_size: the largest number of cells in a group, see `plan`.
      launcher: where the groups run (None: `Local()`, this process).
      on_group: called as `on_group(number, total, cells)` when a group starts; what it returns is
        called after every evaluation with the rounds done and the new rows.
      on_wait: called once when all that is left, these cells, is being run by others.
      prepared: experiments that are prepared already, by their cells' names.
    """
    if not isinstance(out, (str, os.PathLike)):
        raise ConfigError(f"out must be the path of a folder, got {shown(out)}.")
    for name, given in (("on_group", on_group), ("on_wait", on_wait)):
        if given is not None and not callable(given):
            raise ConfigError(f"{name} must be a function, got {shown(given)}.")
    out = Path(out).absolute()
    limit = groups_lib.limit(group_size)
    groups_lib.check_folders(cells, out)
    with files.trying(out):
        # Before anything is written or run.
        known = dict(prepared or {})
        left = [one for one in groups_lib.unfinished(cells, out) if one.name not in known]
        known |= groups_lib.prepare_cells(left)
    launcher = launcher or Local()
    while groups := groups_lib.plan_checked(cells, out, limit):
        groups = [groups_lib.with_prepared(group, known) for group in groups]
        launcher.launch(out, groups, at_once=at_once, on_group=on_group, on_wait=on_wait)
        # Groups that are gone were done, or taken apart by another process: these are planned anew.
        if any(groups_lib.is_planned(out, group.name) for group in groups):
            break  # the launcher left one: `read_results` says what is missing
        if not groups_lib.unfinished(cells, out):
            break
    return groups_lib.read_results(cells, out)

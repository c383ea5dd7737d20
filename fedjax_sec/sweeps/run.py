"""A sweep from beginning to end: its cells checked, planned, launched and collected."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedjax_sec.core import ConfigError, distributed, files
from fedjax_sec.core.advice import shown
from fedjax_sec.core.host import undisturbed
from fedjax_sec.runs.experiment import Result
from fedjax_sec.runs.loggers.writing import check_installed
from fedjax_sec.runs.prepare import Prepared
from fedjax_sec.sweeps import groups as groups_lib
from fedjax_sec.sweeps.grid import Cell
from fedjax_sec.sweeps.launchers.choice import build_launcher
from fedjax_sec.sweeps.status import Status, survey


class SweepFailed(ConfigError):
    """Errors stopped runs of a sweep in other processes; `failures` has each with its traceback."""

    def __init__(self, out: Path, failures: Sequence[groups_lib.Failure], total: int):
        self.failures = tuple(failures)
        names = [name for one in failures for name in one.cells]
        said = [f"{_named(one.cells)}: {one.error} ({one.where})" for one in failures]
        super().__init__(
            f"{len(names)} of {total} runs in {str(out)!r} failed, and the others are kept. "
            f"{'; '.join(said[:5])}{'; ...' * (len(said) > 5)}. Start the sweep again when the "
            f"cause is mended; the tracebacks are in groups/*/{groups_lib.FAILURE}."
        )


def _named(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


@undisturbed
def run_cells(
    cells: Sequence[Cell],
    out: str | Path,
    *,
    at_once: int | None = None,
    group_size: int | None = None,
    launcher: Any = None,
    on_group: Callable[[int, int, list[Cell]], Callable | None] | None = None,
    on_wait: Callable[[list[Cell]], None] | None = None,
    on_status: Callable[[Status], None] | None = None,
    prepared: Mapping[str, Prepared] | None = None,
) -> list[Result]:
    """Runs what is not yet finished and returns all results, in the order of the cells.

    Processes that run the same cells in the same folder share the work, a group at a time, and each
    returns when everything is finished; a group whose process died goes on in another one from its
    checkpoint. A group that fails stops no other. All results are read from the folder, so their
    `params` are None.

    Args:
      cells: of one sweep.
      out: the sweep's folder.
      at_once: replicas vmapped at a time (None: as many as fit an accelerator, 1 on a CPU).
      group_size: the largest number of cells in a group, see `plan`.
      launcher: where the groups run: `local`, `ray` or `slurm`, a mapping with `name` and fields,
        or an object with a method `launch` (None: this process).
      on_group: called as `on_group(number, total, cells)` when a group starts; what it returns is
        called after every evaluation with the rounds done and the new rows.
      on_wait: called once when all that is left, these cells, is being run by others.
      on_status: called every now and then with what `survey` says, while other processes work.
      prepared: experiments that are prepared already, by their cells' names.

    Raises: the error that stopped a run of this process, when all others are done, and
    `SweepFailed` where runs of other processes failed.
    """
    if not isinstance(out, (str, os.PathLike)):
        raise ConfigError(f"out must be the path of a folder, got {shown(out)}.")
    for name, given in (("on_group", on_group), ("on_wait", on_wait), ("on_status", on_status)):
        if given is not None and not callable(given):
            raise ConfigError(f"{name} must be a function, got {shown(given)}.")
    if distributed.together():
        raise ConfigError(
            "A sweep runs in one process, or by a launcher: several processes that compute a round "
            "together take one run, with `fedjax-sec run`."
        )
    check_installed({name for cell in cells for name in cell.experiment.logging})
    out = Path(out).absolute()
    limit = groups_lib.limit(group_size)
    groups_lib.check_folders(cells, out)
    with files.trying(out):
        # Before anything is written or run.
        known = dict(prepared or {})
        left = [one for one in groups_lib.unfinished(cells, out) if one.name not in known]
        known |= groups_lib.prepare_cells(left)
    launcher = build_launcher(launcher)
    while groups := groups_lib.plan_checked(cells, out, limit):
        groups = [groups_lib.with_prepared(group, known) for group in groups]
        groups_lib.forget_failures(out, [group.name for group in groups])
        launcher.launch(
            out,
            groups,
            at_once=at_once,
            on_group=on_group,
            on_wait=on_wait,
            on_status=None if on_status is None else lambda: on_status(survey(out)),
        )
        # Groups that are gone were done, or taken apart by another process: these are planned anew.
        if any(groups_lib.is_planned(out, group.name) for group in groups):
            failures = [groups_lib.failure_of(out, group.name) for group in groups]
            if failures := [one for one in failures if one is not None]:
                raise SweepFailed(out, failures, len(cells))
            break  # the launcher left one: `read_results` says what is missing
        if not groups_lib.unfinished(cells, out):
            break
    return groups_lib.read_results(cells, out)

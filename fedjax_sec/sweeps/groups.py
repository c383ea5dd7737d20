"""Groups of a sweep's cells: planned, worked and collected, each in whatever process.

A group is the unit of work: cells of one structure, which are replicas of one compiled program.
`plan` writes down which cells form a group and computes nothing; `work` runs one group on the
machine that calls it; `collect` reads the finished cells. All three share the sweep's folder only,
so they may run in different processes or on different machines.
"""

import contextlib
import hashlib
import itertools
import json
import os
import platform
import re
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import filelock

from fedjax_sec.core import files, suggestion
from fedjax_sec.core.advice import shown
from fedjax_sec.core.fields import ConfigError
from fedjax_sec.core.host import undisturbed
from fedjax_sec.runs import results
from fedjax_sec.runs.checkpoints import Checkpoints
from fedjax_sec.runs.experiment import Result, read_result, resolve_layout, train
from fedjax_sec.runs.loggers import Run
from fedjax_sec.runs.loggers.writing import Writing
from fedjax_sec.runs.prepare import Prepared, prepare
from fedjax_sec.runs.program import Program
from fedjax_sec.runs.tuning import Tuning
from fedjax_sec.sweeps import catalog
from fedjax_sec.sweeps.catalog import CELLS
from fedjax_sec.sweeps.grid import Cell

#: The folders of a sweep, and the file that says which cells a group's state is of.
GROUPS, LOCKS, MEMBERS = "groups", "locks", "members.json"
#: Why a group stopped, beside its members, until it is worked on again.
FAILURE = "failure.json"
#: Which worker of a launcher has a group; written anew as a sign of life.
WORKER = "worker.json"

#: Cells of a group where no limit is given. An accelerator trains so many replicas of a small model
#: at once that more of them do not make it faster, and every committed sweep has smaller groups,
#: which so remain one program a structure. Only more seeds than that are split among processes.
GROUP_SIZE = 64

#: Seconds between two looks at a lock that another process holds.
PAUSE = 1.0


class Failure(NamedTuple):
    """Why a group stopped: the error in one line, where it happened, and the traceback."""

    cells: tuple[str, ...]
    error: str
    where: str = ""
    traceback: str = ""


class Group(NamedTuple):
    """Cells that are replicas of one program.

    `name` is a digest of the cells' names; `groups/NAME` holds the members and the common state.
    `prepared` are the experiments as this process has prepared them, empty where it has not.
    """

    name: str
    cells: tuple[Cell, ...]
    prepared: tuple[Prepared, ...] = ()


# --- Checking -----------------------------------------------------------------------------------


def prepare_cells(cells: Sequence[Cell]) -> dict[str, Prepared]:
    """cell name -> the experiment prepared; raises what would stop one of them.

    The one place where a sweep prepares experiments: once for each run in a process.
    """
    return {cell.name: prepare(cell.experiment) for cell in cells}


def with_prepared(group: Group, known: Mapping[str, Prepared]) -> Group:
    """The group with its experiments prepared, those that are not `known` anew."""
    if group.prepared:
        return group
    rest = prepare_cells([cell for cell in group.cells if cell.name not in known])
    parts = tuple(known.get(cell.name) or rest[cell.name] for cell in group.cells)
    return group._replace(prepared=parts)


def run_folder(out: Path, cell: Cell) -> results.RunFolder:
    """The folder of a cell's run below the sweep's."""
    return results.RunFolder(out / CELLS / cell.name)


def unfinished(cells: Sequence[Cell], out: Path) -> list[Cell]:
    """The cells that have not reached their last round."""
    return [cell for cell in cells if not run_folder(out, cell).finished]


def check_folders(cells: Sequence[Cell], out: Path) -> None:
    """Raises `ConfigError` where `plan` would refuse the folder; writes nothing."""
    mark = results.read_mark(out)
    if mark.kind in ("run", "cell") or mark.kind.startswith(results.PAPER):
        what = "a run" if mark.kind in ("run", "cell") else "a paper's results"
        raise ConfigError(
            f"Output folder {str(out)!r} holds {what}, not a sweep. Choose another folder."
        )
    older = mark.kind == "other" and (out / CELLS).is_dir() and (out / LOCKS).is_dir()
    if mark.kind == "other" and not older:
        raise results.in_use(out, mark)
    for cell in cells:
        run_folder(out, cell).check(cell.experiment.to_dict(), resume=True, kind="cell")


# --- Planning -----------------------------------------------------------------------------------


def plan(cells: Sequence[Cell], out: str | Path, *, group_size: int | None = None) -> list[Group]:
    """Claims the folder for these cells and groups those that are not finished.

    Uses no device and computes nothing with JAX: cells are grouped by `Experiment.structure()`, and
    `groups/NAME/members.json` names each group's. Groups that were started, or that another process
    runs, keep their members, whatever the limit was then, since their checkpoints hold the state of
    exactly these cells. Groups that nobody has started are taken apart and planned anew.

    Args:
      cells: of one sweep, in the order of its results.
      out: the sweep's folder.
      group_size: the largest number of cells in a group (None: `GROUP_SIZE`). Cells of one
        structure that are more are split into groups whose sizes differ by one at most.

    Returns: the groups that are left to work, in the order of their first cells.

    Raises: `ConfigError` for a folder that is in use by something else, or cells that another
    process is running together with cells that are not given here.
    """
    out = Path(out).absolute()
    most = limit(group_size)
    check_folders(cells, out)
    files.check_writable(out)
    return plan_checked(cells, out, most)


def limit(group_size: int | None) -> int:
    """The largest number of cells in a group."""
    if group_size is None:
        return GROUP_SIZE
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ConfigError(f"group_size must be an integer >= 1, got {shown(group_size)}.")
    return group_size


def plan_checked(cells: Sequence[Cell], out: Path, most: int) -> list[Group]:
    """`plan` where `check_folders` has passed."""
    with filelock.FileLock(out / results.LOCK):
        names = rf"{re.escape(results.MARK)}|{re.escape(catalog.FILE)}"
        files.remove_files(files.leftovers(out, names))
        if results.read_mark(out).kind != "sweep":
            results.write_mark(out, "sweep")
    (out / CELLS).mkdir(exist_ok=True)
    (out / LOCKS).mkdir(exist_ok=True)
    with _grouping(out):  # whoever plans next meets these groups and makes no others
        catalog.add(out, cells)
        for cell in cells:
            folder = run_folder(out, cell)
            if not folder.finished:
                with folder.locked():
                    folder.open(cell.experiment.to_dict(), resume=True, kind="cell")
        groups = _group(cells, out, most)
    places = {cell.name: place for place, cell in enumerate(cells)}
    return sorted(groups, key=lambda group: places[group.cells[0].name])


def _grouping(out: Path) -> filelock.BaseFileLock:
    """The lock under which groups are made and removed."""
    return filelock.FileLock(out / LOCKS / "groups.lock")


def _group(cells: Sequence[Cell], out: Path, most: int) -> list[Group]:
    """The groups that keep their members, and new ones of the other cells, written down."""
    while True:
        left = unfinished(cells, out)
        kept, planned = _existing(cells, left, out)
        taken = {cell.name for group in kept for cell in group.cells}
        new = grouped([cell for cell in left if cell.name not in taken], most)
        names = {group.name for group in new}
        # A group that stays is never gone in between: a process may be about to take it.
        if all([_dissolve(out, name) for name in planned if name not in names]):
            break
    for group in new:
        folder = out / GROUPS / group.name
        if not (folder / MEMBERS).exists():
            folder.mkdir(parents=True, exist_ok=True)
            (out / LOCKS / f"{group.name}.lock").touch()  # so that `work` knows the name ever after
            files.write_json(folder / MEMBERS, {"cells": [cell.name for cell in group.cells]})
    return kept + new


def _existing(
    cells: Sequence[Cell], left: Sequence[Cell], out: Path
) -> tuple[list[Group], list[str]]:
    """Groups that were started, and the names of those that were planned only.

    Removes groups that are done, and what a kill left of one.
    """
    by_name, open_names = {cell.name: cell for cell in cells}, {cell.name for cell in left}
    started, planned = [], []
    for folder in sorted((out / GROUPS).glob("*/")):
        lock = take(out, folder.name)
        try:
            named = (folder / MEMBERS).exists()
            names = _members(folder) if named else []
            mine = [name for name in names if name in by_name]
            if len(mine) < len(names):  # of another sweep in this folder
                if lock is None and open_names.intersection(mine):
                    raise ConfigError(
                        f"Output folder {str(out)!r}: another process is running {mine[0]!r} "
                        f"together with cells that were not asked for here. Run the same cells, or "
                        f"wait."
                    )
            elif not open_names.intersection(names):
                # A kill came before the members were written, or after the group was done.
                if lock is not None and (named or not _states(folder).rounds()):
                    remove(out, folder.name)
            elif lock is None or _is_begun(folder):
                started.append(Group(folder.name, tuple(by_name[name] for name in names)))
            else:
                planned.append(folder.name)
        finally:
            if lock is not None:
                lock.release()
    return started, planned


def _dissolve(out: Path, name: str) -> bool:
    """Removes a group that was planned only; False where a process has started it meanwhile."""
    lock = take(out, name)
    if lock is None:
        return False
    try:
        if _is_begun(out / GROUPS / name):
            return False
        remove(out, name)
        return True
    finally:
        lock.release()


def is_planned(out: Path, name: str) -> bool:
    """Whether a group is there: neither done nor taken apart."""
    return (out / GROUPS / name / MEMBERS).exists()


def _is_begun(folder: Path) -> bool:
    """Whether a process has started to work on a group."""
    return (folder / results.EXECUTION).exists() or bool(_states(folder).rounds())


def grouped(cells: Sequence[Cell], most: int) -> list[Group]:
    """Groups of cells of one structure, of at most `most` cells each."""
    by_structure: dict = {}
    for cell in cells:
        by_structure.setdefault(cell.experiment.structure(), []).append(cell)
    groups = []
    for members in by_structure.values():
        for part in split(members, most):
            names = json.dumps([cell.name for cell in part])
            name = hashlib.sha256(names.encode()).hexdigest()[:12]
            groups.append(Group(name, tuple(part)))
    return groups


def split(items: Sequence, most: int) -> list[list]:
    """The fewest parts of at most `most` items, in order; their lengths differ by one at most.

    Parts of equal length share the programs that are kept on the disk.

    >>> split("abcdefg", 3)
    [['a', 'b'], ['c', 'd'], ['e', 'f', 'g']]
    """
    parts = -(-len(items) // most)
    ends = [len(items) * part // parts for part in range(parts + 1)]
    return [list(items[low:high]) for low, high in itertools.pairwise(ends)]


def _members(folder: Path) -> list[str]:
    """The names of a group's cells. Raises `ConfigError` where they cannot be trusted."""
    remedy = f"Remove {str(folder)!r}, so that its cells begin again."
    try:
        names = files.read_json(folder / MEMBERS).get("cells")
    except ConfigError as error:
        raise ConfigError(f"{error} {remedy}") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{str(folder / MEMBERS)!r} names no cells. {remedy}")
    return names


# --- Working ------------------------------------------------------------------------------------


@undisturbed
def work(
    out: str | Path,
    group: Group | str,
    *,
    wait: bool = True,
    at_once: int | None = None,
    on_evaluation: Callable[[int, list[dict]], None] | None = None,
) -> bool:
    """Runs a planned group on this machine, from its checkpoint where it has one.

    Calling it again, or in several processes, does no harm: one process works at a time, what is
    finished stays, and a group that is done needs nothing. The layout of local training is measured
    here, and kept beside the group's state for those who resume it.

    Args:
      out: the sweep's folder, where `plan` has been called.
      group: one of its groups, or the name alone; the experiments are then read from the cells'
        folders.
      wait: whether to wait while another process works on the group.
      at_once: replicas vmapped at a time, see `fedjax_sec.runs.experiment.train`.
      on_evaluation: called with the rounds done and the rows just measured.

    Returns: whether the group needs no more work; False only without `wait`, where another process
    works on it. A group that a later plan has taken apart needs none either.

    Raises: `ConfigError` for a name that was never planned, and what stops an experiment.
    """
    out = Path(out).absolute()
    if isinstance(group, str):
        _check_name(out, group)
    name = group if isinstance(group, str) else group.name
    while (lock := take(out, name)) is None:
        if not wait:
            return False
        time.sleep(PAUSE)
    try:
        if isinstance(group, str):
            if not is_planned(out, name):
                return True
            group = read_group(out, name)
        work_locked(out, group, at_once=at_once, start=lambda: on_evaluation)
    finally:
        lock.release()
    return True


def _check_name(out: Path, name: str) -> None:
    known = sorted(path.stem for path in (out / LOCKS).glob("*.lock") if path.stem != "groups")
    if name not in known:
        raise ConfigError(
            f"Folder {str(out)!r} has no group {shown(name)}.{suggestion(name, known)} "
            f"Known: {', '.join(known) or 'none'}."
        )


def take(out: Path, name: str) -> filelock.BaseFileLock | None:
    """The lock of a group; None where another process works on it.

    It lies outside the group's folder, which is removed when the group is done, and is let go of by
    the system when its process is killed.
    """
    return files.acquire(out / LOCKS / f"{name}.lock")


def is_held(out: Path, name: str) -> bool:
    """Whether a living process works on a group."""
    return files.is_locked(out / LOCKS / f"{name}.lock")


def read_group(out: Path, name: str) -> Group:
    """A group as it was planned, with the experiments of its cells' folders."""
    cells, known = [], catalog.read(out)
    for path in _members(out / GROUPS / name):
        labels = dict(enumerate(path.rpartition("/")[0].split("_")))
        labels = known.get(path, {str(axis): label for axis, label in labels.items()})
        cells.append(Cell(labels, results.RunFolder(out / CELLS / path).experiment()))
    return Group(name, tuple(cells))


def work_locked(
    out: Path,
    group: Group,
    *,
    at_once: int | None = None,
    start: Callable[[], Callable | None] = lambda: None,
    ready: Callable[[Group, Tuning], Program] | None = None,
    before_training: Callable[[], None] = lambda: None,
) -> None:
    """`work` where this process holds the group's lock.

    `start` is called where there is work to do and gives `on_evaluation`; `ready` compiles the
    program of the group, prepared, for this choice; `before_training` is called when the program is
    compiled and nothing runs.
    """
    state = out / GROUPS / group.name
    if not is_planned(out, group.name):
        return  # done, or taken apart by a later plan
    folders = [run_folder(out, cell) for cell in group.cells]
    if not all(folder.finished for folder in folders):
        group = with_prepared(group, {})
        for folder in folders:
            folder.tidy()
        files.remove_files([*_leftovers(state), state / FAILURE])
        on_evaluation = start()
        tuning = resolve_layout(group.prepared[0], state / "state", len(group.cells))
        ready = ready or (lambda group, tuning: traced(group, at_once, tuning).finish())
        program = ready(group, tuning)
        before_training()
        with _loggers(out, group) as loggers:
            train(
                group.prepared,
                folders,
                checkpoint_dir=state / "state",
                on_evaluation=on_evaluation,
                program=program,
                loggers=loggers,
            )
    with _grouping(out):
        remove(out, group.name)


def _loggers(out: Path, group: Group) -> Writing:
    """The loggers of the group's runs, each of which is one with the labels of its cell."""
    runs, names = [], []
    for cell in group.cells:
        one = cell.experiment
        runs.append(Run(cell.name, cell.name, out.name, cell.labels, one.seed, one.to_dict()))
        names.append(one.logging)
    return Writing(runs, names, out)


def traced(group: Group, at_once: int | None, tuning: Tuning) -> Program:
    """The program of a group whose experiments are prepared, for XLA to compile."""
    return Program(group.prepared[0], at_once, tuning).lower(group.prepared)


def tuning_ahead(out: Path, group: Group, before: Callable[[], object]) -> Tuning | None:
    """The choice that `work` would make here, nothing written; None where it has nothing to do.

    `before` is called where it has to be measured, while nothing else may run.
    """
    lock = take(out, group.name)
    if lock is None:
        return None
    try:
        folder = out / GROUPS / group.name
        if not is_planned(out, group.name):
            return None
        started = (folder / results.EXECUTION).exists()
        state = folder / "state" if started else None
        return resolve_layout(group.prepared[0], state, len(group.cells), before)
    finally:
        lock.release()


def remove(out: Path, name: str) -> None:
    """Removes the state of a group file by file; its members at last."""
    folder = out / GROUPS / name
    _states(folder).keep_only(())
    known = [folder / part for part in (results.EXECUTION, FAILURE, WORKER, MEMBERS)]
    files.remove_files([*_leftovers(folder), *known])
    files.remove_empty([folder])
    files.mention_rest(folder)


def _states(folder: Path) -> Checkpoints:
    return Checkpoints(folder / "state", ())


def _leftovers(folder: Path) -> list[Path]:
    names = (results.EXECUTION, FAILURE, WORKER, MEMBERS)
    return files.leftovers(folder, "|".join(map(re.escape, names)))


# --- Failing ------------------------------------------------------------------------------------


def record_failure(out: Path, group: Group, error: BaseException | str) -> None:
    """Writes down why a group stopped, for those who started its worker and for `status`.

    A disk that is full keeps nothing, and the error is the caller's alone.
    """
    text, trace = str(error), ""
    if isinstance(error, BaseException):
        said = files.describe(error) if isinstance(error, OSError) else str(error)
        text = f"{type(error).__name__}: {said}".removesuffix(": ")
        trace = "".join(traceback.format_exception(error))
    names = [cell.name for cell in group.cells]
    content = {"cells": names, "error": text, "where": here(), "traceback": trace}
    with contextlib.suppress(OSError):
        if is_planned(out, group.name):
            files.write_json(out / GROUPS / group.name / FAILURE, content)


def failure_of(out: Path, name: str) -> Failure | None:
    """Why a group stopped; None where it did not, or where that was not written down."""
    path = out / GROUPS / name / FAILURE
    if not path.exists():
        return None
    with contextlib.suppress(ConfigError, TypeError):
        content = files.read_json(path)
        return Failure(**content | {"cells": tuple(content["cells"])})
    return None


def forget_failures(out: Path, names: Iterable[str]) -> None:
    """Lets groups be tried again, but for those that another process works on."""
    for name in names:
        if (lock := take(out, name)) is not None:
            try:
                folder = out / GROUPS / name
                files.remove_files([folder / FAILURE, folder / WORKER])
            finally:
                lock.release()


def here() -> str:
    """This process, for people: `HOST, process 123`."""
    return f"{platform.node()}, process {os.getpid()}"


def rounds_kept(out: Path, name: str) -> int:
    """The round of a group's newest checkpoint; 0 without one."""
    return max(_states(out / GROUPS / name).rounds(), default=0)


# --- Collecting ---------------------------------------------------------------------------------


def collect(cells: Sequence[Cell], out: str | Path) -> list[Result]:
    """The results of finished cells, in the order of the cells, read from the folder.

    Raises: `ConfigError` that counts and names the cells that are not finished, or for a cell whose
    folder holds another configuration or is damaged.
    """
    out = Path(out).absolute()
    check_folders(cells, out)
    return read_results(cells, out)


def read_results(cells: Sequence[Cell], out: Path) -> list[Result]:
    """`collect` where `check_folders` has passed."""
    if missing := [cell.name for cell in unfinished(cells, out)]:
        names = ", ".join(missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ConfigError(
            f"{len(missing)} of {len(cells)} runs in {str(out)!r} are not finished: {names}{more}. "
            f"Start the sweep again; `fedjax-sec status` on the folder says where each one is."
        )
    return [read_result(cell.experiment, run_folder(out, cell)) for cell in cells]

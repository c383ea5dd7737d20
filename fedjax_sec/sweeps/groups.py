"""The execution of a sweep: one compilation for each distinct structure.

Cells whose static fields agree, and all seeds, are replicas of one program. Every finished cell is
kept in the output folder and not run again; an interrupted group goes on from its checkpoint.
Several processes may work in one folder: each takes groups that no other has.
"""

import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock

from fedjax_sec.core import files
from fedjax_sec.core.fields import ConfigError
from fedjax_sec.core.host import undisturbed
from fedjax_sec.runs import results
from fedjax_sec.runs.checkpoints import Checkpoints
from fedjax_sec.runs.experiment import Result, read_result, settle, train, verify
from fedjax_sec.runs.program import Program
from fedjax_sec.runs.tuning import Tuning
from fedjax_sec.sweeps.grid import Cell

#: The file that says which cells a group's state is of.
MEMBERS = "members.json"


@dataclasses.dataclass
class _Group:
    """Cells that are replicas of one program, and the folder of their common state.

    The lock is held by the process that runs them. It lies outside the folder, which is removed
    when the group is done, and is let go of by the system when its process is killed.
    """

    folder: Path
    cells: list[Cell]
    lock_file: Path
    lock: filelock.BaseFileLock | None = None

    def take(self) -> bool:
        """Takes the lock; False where another process runs the group now."""
        lock = files.acquire(self.lock_file)
        self.lock = lock or self.lock
        return lock is not None

    def release(self) -> None:
        """Lets go of the lock."""
        self.lock.release()

    @property
    def is_free(self) -> bool:
        """Whether no other process runs the group now."""
        if free := self.take():
            self.release()
        return free

    def remove(self) -> None:
        """Removes the state of a group that is done, file by file; whose it was, at last."""
        Checkpoints(self.folder / "state", ()).keep_only(())
        known = [self.folder / name for name in (results.EXECUTION, MEMBERS)]
        files.remove_files([*_leftovers(self.folder), *known])
        files.remove_empty([self.folder])
        files.mention_rest(self.folder)


def _leftovers(folder: Path) -> list[Path]:
    return files.leftovers(folder, "|".join(map(re.escape, (results.EXECUTION, MEMBERS))))


@undisturbed
def run_cells(
    cells: Sequence[Cell],
    out: str | Path,
    *,
    at_once: int | None = None,
    on_group: Callable[[int, int, list[Cell]], Callable | None] | None = None,
    on_wait: Callable[[list[Cell]], None] | None = None,
) -> list[Result]:
    """Runs what is not yet finished and returns all results, in the order of the cells.

    Processes that run the same cells in the same folder share the work, a group at a time, and each
    returns when everything is finished; a group whose process died goes on in another one from its
    checkpoint.

    `on_group(number, total, cells)` is called as a group starts; what it returns is called after
    every evaluation with the rounds done and the new rows. `on_wait(cells)` is called once when
    all that is left, these cells, is being run by others.
    """
    out = Path(out).absolute()
    _check_folder(out)
    folders = {cell.name: results.RunFolder(out / "cells" / cell.name) for cell in cells}
    for cell in cells:
        folders[cell.name].check(cell.experiment.to_dict(), resume=True, kind="cell")
    with files.trying(out):
        for cell in cells:
            verify(cell.experiment)  # before anything is written or run
    with filelock.FileLock(out / results.LOCK):
        files.remove_files(files.leftovers(out, re.escape(results.MARK)))
        if results.read_mark(out).kind != "sweep":
            results.write_mark(out, "sweep")
    (out / "cells").mkdir(exist_ok=True)
    (out / "locks").mkdir(exist_ok=True)
    with _making_groups(out):  # whoever comes next finds these groups and makes no others
        for cell in cells:
            with folders[cell.name].locked():
                folders[cell.name].open(cell.experiment.to_dict(), resume=True, kind="cell")
        groups = _groups(cells, folders, out)
        # Settled beforehand: what is measured must not be disturbed by a compilation.
        tuned = {
            group.folder: settle(group.cells[0].experiment, group.folder / "state")
            for group in groups
        }
    fresh: dict[str, Result] = {}
    left, ahead = list(groups), {}
    # One program is compiled while the one before it runs: XLA compiles on one core.
    compiler = ThreadPoolExecutor(max_workers=1)
    try:

        def prepare(group):
            return compiler.submit(_prepare, group.cells, at_once, tuned[group.folder])

        while left:
            group = _claim(left, on_wait)
            left.remove(group)
            try:
                if all(folders[cell.name].finished for cell in group.cells):
                    continue  # another process has run it
                for cell in group.cells:
                    folders[cell.name].tidy()
                files.remove_files(_leftovers(group.folder))
                callback = None
                if on_group:
                    callback = on_group(groups.index(group), len(groups), group.cells)
                program = (ahead.pop(group.folder, None) or prepare(group)).result()
                following = next((other for other in left if other.is_free), None)
                if following and following.folder not in ahead:
                    ahead = {following.folder: prepare(following)}
                found = train(
                    [cell.experiment for cell in group.cells],
                    [folders[cell.name] for cell in group.cells],
                    checkpoint_dir=group.folder / "state",
                    on_evaluation=callback,
                    program=program,
                )
                fresh |= {cell.name: one for cell, one in zip(group.cells, found, strict=True)}
                with _making_groups(out):
                    group.remove()
            finally:
                group.release()
    finally:
        compiler.shutdown(wait=False, cancel_futures=True)
    return [
        fresh.get(cell.name) or read_result(cell.experiment, folders[cell.name]) for cell in cells
    ]


def _claim(groups: Sequence[_Group], on_wait: Callable | None) -> _Group:
    """The first group that no other process runs, its lock taken; waits until there is one."""
    waits = False
    while True:
        for group in groups:
            if group.take():
                return group
        if on_wait and not waits:
            on_wait([cell for group in groups for cell in group.cells])
        waits = True
        time.sleep(1.0)


def _check_folder(out: Path) -> None:
    """Raises `ConfigError` for a folder that is neither free nor a sweep's."""
    mark = results.read_mark(out)
    if mark.kind in ("run", "cell") or mark.kind.startswith(results.PAPER):
        what = "a run" if mark.kind in ("run", "cell") else "a paper's results"
        raise ConfigError(
            f"Output folder {str(out)!r} holds {what}, not a sweep. Choose another folder."
        )
    older = mark.kind == "other" and (out / "cells").is_dir() and (out / "locks").is_dir()
    if mark.kind == "other" and not older:
        raise results.in_use(out, mark)


def _making_groups(out: Path) -> filelock.BaseFileLock:
    return filelock.FileLock(out / "locks" / "groups.lock")


def _prepare(members: Sequence[Cell], at_once: int | None, tuning: Tuning) -> Program:
    experiments = [cell.experiment for cell in members]
    return Program(experiments[0], at_once, tuning).prepare(experiments)


def _groups(cells: Sequence[Cell], folders: Mapping, out: Path) -> list[_Group]:
    """Groups that were begun as they are, then the other unfinished cells grouped by structure.

    A group's members are written down when it is made: its checkpoint holds the state of exactly
    these, whatever has been finished or added since.
    """
    by_name = {cell.name: cell for cell in cells}
    groups, taken = [], set()
    for folder in sorted((out / "groups").glob("*/")):
        if not (folder / MEMBERS).exists():
            group = _group(out, folder, [])
            if group.is_free and not Checkpoints(folder / "state", ()).rounds():
                group.remove()  # a kill came before its members were written, or after it was done
            continue
        names = _members(folder)
        group = _group(out, folder, [by_name.get(name) for name in names])
        if None in group.cells:  # of another sweep in this folder
            mine = [cell.name for cell in group.cells if cell]
            if any(not folders[name].finished for name in mine) and not group.is_free:
                raise ConfigError(
                    f"Output folder {str(out)!r}: another process is running {mine[0]!r} together "
                    f"with cells that were not asked for here. Run the same cells, or wait."
                )
        elif all(folders[name].finished for name in names):
            if group.is_free:
                group.remove()
        else:
            groups.append(group)
            taken |= set(names)
    by_structure: dict = {}
    for cell in cells:
        if cell.name not in taken and not folders[cell.name].finished:
            by_structure.setdefault(cell.experiment.structure(), []).append(cell)
    for members in by_structure.values():
        names = [cell.name for cell in members]
        digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:12]
        folder = out / "groups" / digest
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(folder / MEMBERS, {"cells": names})
        groups.append(_group(out, folder, members))
    places = {name: place for place, name in enumerate(by_name)}
    return sorted(groups, key=lambda group: places[group.cells[0].name])


def _group(out: Path, folder: Path, cells: list[Cell | None]) -> _Group:
    return _Group(folder, cells, out / "locks" / f"{folder.name}.lock")


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

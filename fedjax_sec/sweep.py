"""Sweeps: many experiments with one compilation for each distinct structure.

A sweep is a base experiment, a grid of labelled alternatives (their product), and seeds. Cells
whose static fields agree, and all seeds, are replicas of one program. Every finished cell is kept
in the output folder and not run again; an interrupted group goes on from its checkpoint. Several
processes may work in one folder: each takes groups that no other has.
"""

import dataclasses
import hashlib
import itertools
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import filelock
import pandas as pd

from fedjax_sec import config as config_lib
from fedjax_sec import files, results, schema
from fedjax_sec.checkpoints import Checkpoints
from fedjax_sec.config import Experiment
from fedjax_sec.experiment import Result, read_result, settle, train, verify
from fedjax_sec.program import Program
from fedjax_sec.schema import ConfigError, static
from fedjax_sec.tuning import Tuning

#: The file that says which cells a group's state is of.
MEMBERS = "members.json"


class Cell(NamedTuple):
    """One experiment of a sweep. `labels` maps each axis of the grid to this cell's label."""

    labels: dict[str, str]
    experiment: Experiment

    @property
    def name(self) -> str:
        """The cell's folder below the sweep's: one part an axis, and the seed."""
        parts = [_slug(label) for label in self.labels.values()]
        return "/".join(["_".join(parts) or "run", f"seed{self.experiment.seed}"])


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The schema of a sweep file."""

    experiment: str | dict = static({}, "A path beside this file, or an experiment inline.")
    overrides: dict = static({}, "Dotted keys changed in every cell.")
    grid: dict = static(
        {},
        "axis -> {label: value} or a list of values; an axis is a dotted key.",
    )
    seeds: tuple[int, ...] = static((0,), "Seeds of every cell.", low=0)
    at_once: int | None = static(
        None, "Replicas vmapped at a time (null: as many as fit an accelerator, 1 on a CPU).", low=1
    )
    title: str = static("", "Title of the figure.")


def load(
    path: str | Path, overrides: Sequence[str] = (), cell_overrides: Mapping | None = None
) -> tuple[Sweep, list[Cell]]:
    """A sweep file and its cells, all checked.

    `overrides` change the sweep's own keys (`seeds=[0]`) or, as `overrides.client.l2=1e-4`, a key
    of every cell's experiment; `cell_overrides` is a mapping of such keys.
    """
    own = [text for text in overrides if not text.startswith("overrides.")]
    dotted = [text.removeprefix("overrides.") for text in overrides if text not in own]
    spec = config_lib.apply_overrides(config_lib.read_yaml(path), own)
    sweep = schema.build(Sweep, spec, "")
    changes = dict(config_lib.parse_override(text) for text in dotted)
    base = sweep.experiment
    if isinstance(base, str):
        base = config_lib.read_yaml(Path(path).parent / base)
    return sweep, make_cells(
        base, sweep.grid, sweep.seeds, {**sweep.overrides, **changes, **(cell_overrides or {})}
    )


def make_cells(
    base: Mapping, grid: Mapping, seeds: Sequence[int] = (0,), overrides: Mapping | None = None
) -> list[Cell]:
    """All cells of a grid: the product of its axes and the seeds.

    A label's value is what the axis key is set to; with the axis name in parentheses, such as
    `(setting)`, it is a mapping of several dotted keys.

    >>> cells = make_cells({}, {"defense": ["mean", "median"]}, seeds=(0, 1))
    >>> [cell.name for cell in cells][:2]
    ['mean/seed0', 'mean/seed1']
    """
    axes = {axis: _labelled(axis, values) for axis, values in grid.items()}
    cells = []
    for choice in itertools.product(*(values.items() for values in axes.values())):
        changes = dict(overrides or {})
        for axis, (label, value) in zip(axes, choice, strict=True):
            if axis.startswith("("):
                if not isinstance(value, Mapping):
                    raise ConfigError(f"grid.{axis}.{label}: expected dotted keys, got {value!r}.")
                changes |= value
            else:
                changes[axis] = value
        labels = {axis: label for axis, (label, _) in zip(axes, choice, strict=True)}
        for seed in seeds:
            experiment = config_lib.from_mapping(base, changes | {"seed": seed})
            cells.append(Cell(labels, experiment))
    names = [cell.name for cell in cells]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"grid: two cells have the same name {sorted(twice)[0]!r}; label them.")
    return cells


def _labelled(axis, values) -> dict:
    if isinstance(values, Mapping):
        found = {str(label): value for label, value in values.items()}
    elif isinstance(values, (list, tuple)):
        found = {_label(value): value for value in values}
        if len(found) < len(values):
            raise ConfigError(f"grid.{axis}: values look alike; give labels, {{label: value}}.")
    else:
        raise ConfigError(f"grid.{axis}: expected a list or {{label: value}}, got {values!r}.")
    if not found:
        raise ConfigError(f"grid.{axis} is empty.")
    return found


def _label(value) -> str:
    if isinstance(value, Mapping):
        rest = [f"{key}={item}" for key, item in value.items() if key != "name"]
        return " ".join([str(value.get("name", "")), *rest]).strip()
    if isinstance(value, (list, tuple)):
        return " + ".join(_label(item) for item in value)
    return "none" if value is None else str(value)


def _slug(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=+-]+", "-", label).strip("-") or "none"


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
        state = self.folder / "state"
        files.remove_files(Checkpoints(state, ()).files())
        known = [self.folder / name for name in (results.EXECUTION, MEMBERS)]
        files.remove_files([*_leftovers(self.folder), *known])
        files.remove_empty((state, self.folder))
        files.mention_rest(self.folder)


def _leftovers(folder: Path) -> list[Path]:
    return files.leftovers(folder, "|".join(map(re.escape, (results.EXECUTION, MEMBERS))))


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
        tuned = {group.folder: settle(group.cells[0].experiment, group.folder / "state")
                 for group in groups}  # fmt: skip
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
    if mark.kind in ("run", "cell"):
        raise ConfigError(
            f"Output folder {str(out)!r} holds a run, not a sweep. Choose another folder."
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


def to_frame(cells: Sequence[Cell], found: Sequence[Result]) -> pd.DataFrame:
    """One row a run: labels, seed, accuracies and, where there is a backdoor, its success (%)."""
    rows = []
    for cell, result in zip(cells, found, strict=True):
        row = dict(cell.labels) | {"seed": cell.experiment.seed}
        row["final accuracy"] = 100 * result.summary["final"]["accuracy"]
        row["best accuracy"] = 100 * result.summary["best"]["accuracy"]
        if "attack_success_rate" in result.metrics:
            row["attack success rate"] = 100 * result.metrics["attack_success_rate"][-1]
        if "base_class_accuracy" in result.metrics:
            row["base class accuracy"] = 100 * result.metrics["base_class_accuracy"][-1]
        rows.append(row)
    return pd.DataFrame(rows)


def mean_and_spread(values: pd.Series) -> str:
    """`mean +- standard deviation` (over seeds, ddof 1), or the value alone when there is one.

    >>> import pandas as pd
    >>> mean_and_spread(pd.Series([90.0, 92.0]))
    '91.0 ± 1.4'
    """
    values = values.dropna()
    if values.empty:
        return ""
    spread = f" ± {values.std():.1f}" if len(values) > 1 else ""
    return f"{values.mean():.1f}{spread}"


def pivot(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Attack x defence (first axis down, the others across) -> mean and spread over seeds."""
    reserved = (
        "seed", "final accuracy", "best accuracy", "attack success rate", "base class accuracy",
    )  # fmt: skip
    axes = [c for c in frame.columns if c not in reserved]
    for axis in axes:  # keep the order of the grid
        frame = frame.assign(**{axis: pd.Categorical(frame[axis], frame[axis].unique())})
    if not axes:
        frame, axes = frame.assign(run="run"), ["run"]
    cells = frame.groupby(axes, observed=True)[metric].apply(mean_and_spread)
    return cells.unstack(axes[1:]) if len(axes) > 1 else cells.to_frame(metric)

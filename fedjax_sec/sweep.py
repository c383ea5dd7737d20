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
import math
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import filelock
import pandas as pd

from fedjax_sec import config as config_lib
from fedjax_sec import results, schema
from fedjax_sec.advice import shown
from fedjax_sec.config import Experiment
from fedjax_sec.experiment import Result, read_result, settle, train, verify
from fedjax_sec.program import Program
from fedjax_sec.schema import COUNT, SEED, ConfigError, static
from fedjax_sec.tuning import Tuning

#: Cells of a sweep, each of which has a folder: more are a mistake in the grid.
MOST_CELLS = 100_000


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
    seeds: tuple[int, ...] = static((0,), "Seeds of every cell.", low=0, high=SEED)
    at_once: int | None = static(
        None,
        "Replicas vmapped at a time (null: as many as fit an accelerator, 1 on a CPU).",
        low=1,
        high=COUNT,
    )
    title: str = static("", "Title of the figure.")


def load(
    path: str | Path, overrides: Sequence[str] = (), cell_overrides: Mapping | None = None
) -> tuple[Sweep, list[Cell]]:
    """A sweep file and its cells, all checked.

    `overrides` change the sweep's own keys (`seeds=[0]`) or, as `overrides.client.l2=1e-4`, a key
    of every cell's experiment; `cell_overrides` is a mapping of such keys.
    """
    own = [text for text in overrides if not str(text).startswith("overrides.")]
    dotted = [text.removeprefix("overrides.") for text in overrides if text not in own]
    spec = config_lib.apply_overrides(config_lib.read_yaml(path), own)
    changes = dict(config_lib.parse_override(text) for text in dotted) | dict(cell_overrides or {})
    return from_mapping(spec, changes, Path(path))


def from_mapping(
    mapping: Mapping, cell_overrides: Mapping | None = None, path: Path | None = None
) -> tuple[Sweep, list[Cell]]:
    """A sweep from a plain mapping and its cells; `path`, its file, is where others are beside.

    >>> from_mapping({"experiment": {"rounds": 3}, "seeds": [4, 5]})[1][1].name
    'run/seed5'
    """
    spec = config_lib.apply_overrides(mapping, ())
    try:
        sweep = schema.build(Sweep, spec, "")
    except schema.UnknownKey as error:
        keys = {field.name for field in dataclasses.fields(Experiment)}
        if error.key not in keys or {"grid", "experiment"} & spec.keys():
            raise
        file = path or "FILE"
        raise ConfigError(
            f"{path or 'This'} is an experiment, not a sweep: it has the key {error.key!r}. Run it "
            f"with `fedjax-sec run {file} --out DIR`, or name it in a sweep file, experiment: "
            f"{file}."
        ) from None
    base = sweep.experiment
    if isinstance(base, str):
        try:
            base = config_lib.read_yaml((path or Path()).parent / base)
        except ConfigError as error:
            raise ConfigError(f"experiment: {error}") from error
    changes = {**sweep.overrides, **(cell_overrides or {})}
    return sweep, make_cells(base, sweep.grid, sweep.seeds, changes)


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
    seeds = schema.plain(seeds)
    seeds = list(seeds) if isinstance(seeds, tuple) else seeds
    if isinstance(seeds, str) or not isinstance(seeds, Sequence) or not seeds:
        raise ConfigError(f"seeds must be a list of one or more integers, got {shown(seeds)}.")
    for name, given in (("grid", grid), ("overrides", overrides or {})):
        if not isinstance(given, Mapping):
            raise ConfigError(f"{name} must be a mapping of dotted keys, got {shown(given)}.")
    if len(set(map(repr, seeds))) < len(seeds):
        raise ConfigError(f"seeds must differ, got {shown(seeds)}.")
    axes = {axis: _labelled(axis, values) for axis, values in grid.items()}
    number = math.prod(map(len, axes.values())) * len(seeds)
    if number > MOST_CELLS:
        raise ConfigError(f"grid: {number} cells, of which {MOST_CELLS} are allowed.")
    cells = []
    for choice in itertools.product(*(values.items() for values in axes.values())):
        changes = dict(overrides or {})
        for axis, (label, value) in zip(axes, choice, strict=True):
            if axis.startswith("("):
                if not isinstance(value, Mapping):
                    raise ConfigError(
                        f"grid.{axis}.{label}: expected a mapping of dotted keys, got "
                        f"{shown(value)}."
                    )
                changes |= value
            else:
                changes[axis] = value
        if "seed" in changes:
            raise ConfigError(
                f"seed is set for each cell by the sweep's seeds, so {shown(changes['seed'])} "
                f"would be ignored; give seeds: [{shown(changes['seed'])}] instead."
            )
        labels = {axis: label for axis, (label, _) in zip(axes, choice, strict=True)}
        for seed in seeds:
            experiment = config_lib.from_mapping(base, changes | {"seed": seed})
            cells.append(Cell(labels, experiment))
    names = [cell.name for cell in cells]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(
            f"grid: two cells have the same name {sorted(twice)[0]!r}; give labels, "
            f"{{label: value}}, that differ in letters or digits."
        )
    return cells


def _labelled(axis, values) -> dict:
    if not isinstance(axis, str):
        raise ConfigError(f"grid: an axis is a dotted key such as client.l2, got {shown(axis)}.")
    values = schema.plain(values)
    if isinstance(values, Mapping):
        found = {str(label): value for label, value in values.items()}
    elif isinstance(values, (list, tuple)):
        found = {_label(value): value for value in values}
        if len(found) < len(values):
            raise ConfigError(f"grid.{axis}: values look alike; give labels, {{label: value}}.")
    else:
        raise ConfigError(f"grid.{axis}: expected a list or {{label: value}}, got {shown(values)}.")
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


class _Group(NamedTuple):
    """Cells that are replicas of one program, and the folder of their common state.

    The lock is held by the process that runs them. It lies outside the folder, which is removed
    when the group is done, and is let go of by the system when its process is killed.
    """

    folder: Path
    cells: list[Cell]
    lock: filelock.FileLock

    @property
    def is_free(self) -> bool:
        """Whether no other process runs the group now."""
        try:
            with self.lock.acquire(blocking=False):
                return True
        except filelock.Timeout:
            return False


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
    out = Path(out)
    if out.exists() and any(out.iterdir()) and not (out / "cells").exists():
        raise ConfigError(
            f"Output folder {str(out)!r} is in use by something else: it holds files but no sweep. "
            f"Choose another folder."
        )
    folders = {cell.name: results.RunFolder(out / "cells" / cell.name) for cell in cells}
    for cell in cells:
        verify(cell.experiment)  # before anything is written or run
    (out / "cells").mkdir(parents=True, exist_ok=True)
    with _lock(out, "groups"):  # whoever comes next finds these groups and makes no others
        for cell in cells:
            folders[cell.name].open(cell.experiment.to_dict(), resume=True)
        groups = _groups(cells, folders, out)
        # Settled beforehand: what is measured must not be disturbed by a compilation.
        tuned = {group.folder: settle(group.cells[0].experiment, group.folder / "state")
                 for group in groups}  # fmt: skip
    fresh: dict[str, Result] = {}
    left, ahead = list(groups), {}
    # One program is compiled while the one before it runs: XLA compiles on one core.
    with ThreadPoolExecutor(max_workers=1) as compiler:

        def prepare(group):
            return compiler.submit(_prepare, group.cells, at_once, tuned[group.folder])

        while left:
            group = _claim(left, on_wait)
            left.remove(group)
            try:
                if all(folders[cell.name].finished for cell in group.cells):
                    continue  # another process has run it
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
                with _lock(out, "groups"):
                    shutil.rmtree(group.folder)
            finally:
                group.lock.release()
    return [
        fresh.get(cell.name) or read_result(cell.experiment, folders[cell.name]) for cell in cells
    ]


def _claim(groups: Sequence[_Group], on_wait: Callable | None) -> _Group:
    """The first group that no other process runs, its lock taken; waits until there is one."""
    waits = False
    while True:
        for group in groups:
            try:
                group.lock.acquire(blocking=False)
            except filelock.Timeout:
                continue
            return group
        if on_wait and not waits:
            on_wait([cell for group in groups for cell in group.cells])
        waits = True
        time.sleep(1.0)


def _lock(out: Path, name: str) -> filelock.FileLock:
    (out / "locks").mkdir(exist_ok=True)
    return filelock.FileLock(out / "locks" / f"{name}.lock")


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
    for manifest in sorted((out / "groups").glob("*/members.json")):
        names, folder = json.loads(manifest.read_text()), manifest.parent
        group = _Group(folder, [by_name.get(name) for name in names], _lock(out, folder.name))
        if None in group.cells:  # of another sweep in this folder
            mine = [cell.name for cell in group.cells if cell]
            if any(not folders[name].finished for name in mine) and not group.is_free:
                raise ConfigError(
                    f"Output folder {str(out)!r}: another process is running {mine[0]!r} together "
                    f"with cells that were not asked for here. Run the same cells, or wait."
                )
        elif all(folders[name].finished for name in names):
            if group.is_free:
                shutil.rmtree(folder)
        else:
            groups.append(group)
            taken |= set(names)
    by_structure: dict = {}
    for cell in cells:
        if cell.name not in taken and not folders[cell.name].finished:
            by_structure.setdefault(cell.experiment.structure(), []).append(cell)
    for members in by_structure.values():
        names = json.dumps([cell.name for cell in members])
        folder = out / "groups" / hashlib.sha256(names.encode()).hexdigest()[:12]
        folder.mkdir(parents=True, exist_ok=True)
        results.write_atomically(folder / "members.json", names)
        groups.append(_Group(folder, members, _lock(out, folder.name)))
    places = {name: place for place, name in enumerate(by_name)}
    return sorted(groups, key=lambda group: places[group.cells[0].name])


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

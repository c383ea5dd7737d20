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
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import filelock
import pandas as pd

from fedjax_sec import config as config_lib
from fedjax_sec import files, results, schema
from fedjax_sec.advice import shown
from fedjax_sec.checkpoints import Checkpoints
from fedjax_sec.config import Experiment
from fedjax_sec.experiment import Result, read_result, settle, train, verify
from fedjax_sec.host import undisturbed
from fedjax_sec.program import Program
from fedjax_sec.schema import COUNT, SEED, ConfigError, static
from fedjax_sec.tuning import Tuning

#: Cells of a sweep, each of which has a folder: more are a mistake in the grid.
MOST_CELLS = 100_000

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

    @property
    def parts(self) -> list[str]:
        """The labels, each readable alone: a number with its axis."""
        return [named(axis, label) for axis, label in self.labels.items()] or ["run"]

    @property
    def title(self) -> str:
        """All labels in one line."""
        return " / ".join(self.parts)


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
    title: str = static("", "Title of the figure; the data and the number of seeds follow below.")


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
    _check_nothing_is_lost(axes, overrides or {})
    number = math.prod(map(len, axes.values())) * len(seeds)
    if number > MOST_CELLS:
        raise ConfigError(f"grid: {number} cells, of which {MOST_CELLS} are allowed.")
    cells, clean = [], []
    for choice in itertools.product(*(values.items() for values in axes.values())):
        changes = dict(overrides or {})
        for axis, (_, value) in zip(axes, choice, strict=True):
            changes |= _changes(axis, value)
        if "seed" in changes:
            raise ConfigError(
                f"seed is set for each cell by the sweep's seeds, so {shown(changes['seed'])} "
                f"would be ignored; give seeds: [{shown(changes['seed'])}] instead."
            )
        labels = {axis: label for axis, (label, _) in zip(axes, choice, strict=True)}
        for seed in seeds:
            experiment = config_lib.from_mapping(base, changes | {"seed": seed})
            cells.append(Cell(labels, experiment))
            clean.append(None if experiment.attack.stages else changes | {"seed": seed})
    if (backdoor := _common_backdoor(base, overrides or {}, axes, cells)) is not None:
        measured = {"evaluation.backdoor": backdoor}
        cells = [
            cell._replace(experiment=config_lib.from_mapping(base, own | measured)) if own else cell
            for cell, own in zip(cells, clean, strict=True)
        ]
    names = [cell.name for cell in cells]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(
            f"grid: two cells have the same name {sorted(twice)[0]!r}; give labels, "
            f"{{label: value}}, that differ in letters or digits."
        )
    return cells


def _changes(axis: str, value) -> dict:
    """The dotted keys that one label of an axis sets."""
    return dict(value) if axis.startswith("(") else {axis: value}


def _check_nothing_is_lost(axes: Mapping[str, Mapping], overrides: Mapping) -> None:
    """Raises where a key is set that an axis replaces in every cell."""
    set_by: dict[str, set] = {}
    for axis, values in axes.items():
        for label, value in values.items():
            if axis.startswith("(") and not isinstance(value, Mapping):
                raise ConfigError(
                    f"grid.{axis}.{label}: expected a mapping of dotted keys, got {shown(value)}."
                )
        each = [set(_changes(axis, value)) for value in values.values()]
        for earlier, keys in set_by.items():
            for key in set().union(*each):
                if lost := next((one for one in keys if _replaces(key, one)), None):
                    raise ConfigError(
                        f"grid.{axis} sets {key!r} and replaces {lost!r} of grid.{earlier}, whose "
                        f"labels would not be true; put both into one axis in parentheses."
                    )
        set_by[axis] = set().union(*each)
        for key in overrides:
            if all(any(_replaces(one, key) for one in keys) for keys in each):
                raise ConfigError(
                    f"overrides.{key} would do nothing: grid.{axis} replaces it in every cell; "
                    f"leave one of the two out, or set grid.{axis} to the values wanted."
                )


def _replaces(later: str, earlier: str) -> bool:
    return earlier == later or earlier.startswith(f"{later}.")


def _common_backdoor(base, overrides, axes, cells) -> dict | None:
    """The attacked cells' backdoor where it is one, to be measured without an attack too.

    None where the configuration says itself what is measured.
    """
    key, given = "evaluation.backdoor", base.get("evaluation") or {}
    named_in = [set(_changes(axis, value)) for axis in axes for value in axes[axis].values()]
    if given.get("backdoor") is not None or any(
        _replaces(one, key) or _replaces(key, one) for one in set(overrides).union(*named_in)
    ):
        return None
    specs = [
        schema.dump(cell.experiment.attack.backdoor)
        for cell in cells
        if cell.experiment.attack.backdoor is not None
    ]
    return specs[0] if specs and all(spec == specs[0] for spec in specs) else None


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


#: What `to_frame` tells of a run beside its labels and metrics.
_FACTS = (
    "seed", "rounds", "best_accuracy", "best_round", "diverged", "excluded_updates",
    "malicious_clients",
)  # fmt: skip
#: What tables show, where it was measured, beside what begins with `robust_accuracy/`.
_TABLES = {
    "accuracy": "After the last round.",
    "best_accuracy": "At each run's best evaluation (`best_round` in `runs.csv`).",
    "attack_success_rate": "After the last round.",
    "base_class_accuracy": "After the last round.",
}


def axes_of(cells: Sequence[Cell]) -> list[str]:
    """The columns of the axes: their names, but `grid.NAME` where a fact has that name."""
    return [f"grid.{axis}" if axis in _FACTS else axis for axis in cells[0].labels]


def to_frame(cells: Sequence[Cell], found: Sequence[Result]) -> pd.DataFrame:
    """One row a run: the axes' labels, the seed, the last evaluation's metrics, and other facts.

    Metrics have the names and units that they have in `metrics.jsonl`: shares are in [0, 1].
    `malicious_clients` are numbers separated by blanks, or `redrawn` in every round.
    """
    rows, axes = [], axes_of(cells)
    for cell, result in zip(cells, found, strict=True):
        summary = result.summary
        final, best = dict(summary["final"]), summary["best"]
        row = dict(zip(axes, cell.labels.values(), strict=True)) | {"seed": cell.experiment.seed}
        row["rounds"] = cell.experiment.rounds
        row |= {name: value for name, value in final.items() if name != "round"}
        row |= {"best_accuracy": best["accuracy"], "best_round": best.get("round")}
        row["diverged"] = summary.get("diverged", False)
        row["excluded_updates"] = summary.get("excluded_updates")
        clients = summary.get("malicious_clients", ())
        row["malicious_clients"] = (
            "redrawn" if clients is None else " ".join(str(number) for number in clients)
        )
        rows.append(row)
    return pd.DataFrame(rows)


def metrics_of(frame: pd.DataFrame) -> list[str]:
    """The metrics that have a table."""
    robust = [name for name in frame if name.startswith("robust_accuracy/")]
    return [name for name in (*_TABLES, *robust) if name in frame and frame[name].notna().any()]


def summarized(frame: pd.DataFrame, axes: Sequence[str]) -> pd.DataFrame:
    """One row a cell and metric: mean and standard deviation (ddof 1) over its seeds."""
    rows = []
    for labels, group in _by_cell(frame, axes):
        for metric in metrics_of(frame):
            values = group[metric].dropna()
            row = dict(zip(axes, labels, strict=True)) | {"metric": metric}
            row |= {"mean": values.mean(), "std": values.std(), "seeds": len(values)}
            rows.append(row | {"diverged": int(group["diverged"].sum())})
    return pd.DataFrame(rows)


def _by_cell(frame: pd.DataFrame, axes: Sequence[str]):
    return frame.groupby(list(axes), sort=False) if axes else [((), frame)]


def mean_and_spread(values: pd.Series) -> str:
    """`mean ± standard deviation` (over seeds, ddof 1), or the value alone when there is one.

    >>> import pandas as pd
    >>> mean_and_spread(pd.Series([90.0, 92.0]))
    '91.0 ± 1.4'
    """
    values = values.dropna()
    if values.empty:
        return ""
    spread = f" ± {values.std():.1f}" if len(values) > 1 else ""
    return f"{values.mean():.1f}{spread}"


def pivot(frame: pd.DataFrame, axes: Sequence[str], metric: str) -> pd.DataFrame:
    """First axis down, the others across -> mean and spread over seeds of a share, in percent.

    A cell says how many of its runs diverged, and of how many it is where others have more.
    """
    most = max(group[metric].notna().sum() for _, group in _by_cell(frame, axes))
    found: dict = {}
    for labels, group in _by_cell(frame, axes):
        text, notes = mean_and_spread(100 * group[metric].astype(float)), []
        if 0 < (count := group[metric].notna().sum()) < most:
            notes.append("one seed" if count == 1 else f"{count} seeds")
        if failed := group["diverged"].sum():
            notes.append("diverged" if len(group) == 1 else f"{failed} of {len(group)} diverged")
        text += f" ({', '.join(notes)})" if text and notes else ""
        across = [named(axis, label) for axis, label in zip(axes[1:], labels[1:], strict=True)]
        column = " / ".join(across) or metric
        found.setdefault(column, {})[labels[0] if axes else "run"] = text
    table = pd.DataFrame(found)
    table.index.name = axes[0] if axes else None
    return table


def named(axis: str, label: str) -> str:
    """A label that can be read alone: with its axis where it is a number, true, false or none.

    >>> named("client.l2", "0.1"), named("defense", "krum")
    ('l2 = 0.1', 'krum')
    """
    alone = label in ("none", "True", "False", "true", "false") or _is_number(label)
    return f"{axis.rpartition('.')[2]} = {label}" if alone and axis[:1] != "(" else label


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def over_seeds(frame: pd.DataFrame, axes: Sequence[str]) -> str:
    """Of how many seeds the numbers are."""
    counts = {len(group) for _, group in _by_cell(frame, axes)}
    if counts == {1}:
        return "one seed"
    low, high = min(counts), max(counts)
    return f"over {high} seeds" if low == high else f"over {low} to {high} seeds"


def data_of(found: Sequence[Result]) -> str:
    """The data sets, and which part of them, of all runs."""
    return " / ".join(dict.fromkeys(result.summary["data"]["label"] for result in found))


def about_backdoor(cells: Sequence[Cell]) -> str:
    """Whether cells without an attack say how often the backdoor succeeds that nobody taught."""
    attacked = [cell for cell in cells if cell.experiment.attack.backdoor is not None]
    clean = [cell for cell in cells if not cell.experiment.attack.stages]
    if not attacked or not clean:
        return ""
    if all(cell.experiment.backdoor is not None for cell in clean):
        return "Without an attack it is the base rate: of the backdoor that nobody taught."
    return (
        "Cells without an attack have no base rate: the attacks' backdoors differ; "
        "evaluation.backdoor names one."
    )


def tables(
    cells: Sequence[Cell], found: Sequence[Result]
) -> dict[str, tuple[str, str, pd.DataFrame]]:
    """metric -> (heading, what it is, table) of a sweep."""
    frame, axes = to_frame(cells, found), axes_of(cells)
    seeds, written = over_seeds(frame, axes), {}
    if seeds != "one seed":
        seeds = f"mean ± standard deviation {seeds}"
    for metric in metrics_of(frame):
        said = _TABLES.get(metric, "After the last round.")
        if metric == "attack_success_rate":
            said = f"{said} {about_backdoor(cells)}".strip()
        heading = f"{metric} (%), {data_of(found)}, {seeds}"
        written[metric] = heading, said, pivot(frame, axes, metric)
    return written


def warnings_of(cells: Sequence[Cell], found: Sequence[Result]) -> list[str]:
    """Every warning once, with the runs that have it."""
    having: dict[str, list[Cell]] = {}
    for cell, result in zip(cells, found, strict=True):
        for text in result.summary.get("warnings", ()):
            having.setdefault(text, []).append(cell)
    return [f"{_named_runs(some, len(cells))}: {text}" for text, some in having.items()]


def _named_runs(some: Sequence[Cell], total: int, most: int = 6) -> str:
    if len(some) == total:
        return f"all {total} runs" if total > 1 else some[0].title
    seeds: dict[str, list[str]] = {}
    for cell in some:
        seeds.setdefault(cell.title, []).append(str(cell.experiment.seed))
    names = [
        f"{title}, seed{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}"
        for title, numbers in seeds.items()
    ]
    more = f"; and {len(names) - most} more" if len(names) > most else ""
    return "; ".join(names[:most]) + more

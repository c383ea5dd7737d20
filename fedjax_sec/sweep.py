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
from fedjax_sec.config import Experiment
from fedjax_sec.experiment import Result, read_result, settle, train, verify
from fedjax_sec.host import undisturbed
from fedjax_sec.program import Program
from fedjax_sec.schema import ConfigError, static
from fedjax_sec.tuning import Tuning


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
    seeds: tuple[int, ...] = static((0,), "Seeds of every cell.", low=0)
    at_once: int | None = static(
        None, "Replicas vmapped at a time (null: as many as fit an accelerator, 1 on a CPU).", low=1
    )
    title: str = static("", "Title of the figure; the data and the number of seeds follow below.")


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
    _check_nothing_is_lost(axes, overrides or {})
    cells, clean = [], []
    for choice in itertools.product(*(values.items() for values in axes.values())):
        changes = dict(overrides or {})
        for axis, (_, value) in zip(axes, choice, strict=True):
            changes |= _changes(axis, value)
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
        raise ConfigError(f"grid: two cells have the same name {sorted(twice)[0]!r}; label them.")
    return cells


def _changes(axis: str, value) -> dict:
    """The dotted keys that one label of an axis sets."""
    return dict(value) if axis.startswith("(") else {axis: value}


def _check_nothing_is_lost(axes: Mapping[str, Mapping], overrides: Mapping) -> None:
    """Raises where a key is set that an axis replaces in every cell."""
    for name in ("seed", *axes):
        where = "overrides" if name == "seed" and "seed" in overrides else "grid"
        if name == "seed" and (name in overrides or name in axes):
            raise ConfigError(f"{where}.seed: seeds are no axis or override; give seeds: [0, 1].")
    set_by: dict[str, set] = {}
    for axis, values in axes.items():
        for label, value in values.items():
            if axis.startswith("(") and not isinstance(value, Mapping):
                raise ConfigError(f"grid.{axis}.{label}: expected dotted keys, got {value!r}.")
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
    `malicious_clients` are numbers separated by blanks.
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
        row["malicious_clients"] = " ".join(str(number) for number in clients)
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

"""Sweeps: many experiments with one compilation for each distinct structure.

A sweep is a base experiment, a grid of labelled alternatives (their product), and seeds. Cells
whose static fields agree, and all seeds, are replicas of one program. Every finished cell is kept
in the output folder and not run again; an interrupted group goes on from its checkpoint.
"""

import dataclasses
import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from fedjax_sec import config as config_lib
from fedjax_sec import results, schema
from fedjax_sec.config import Experiment
from fedjax_sec.experiment import Result, read_result, settle, train, verify
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


def run_cells(
    cells: Sequence[Cell],
    out: str | Path,
    *,
    at_once: int | None = None,
    on_group: Callable[[int, int, list[Cell]], Callable | None] | None = None,
) -> list[Result]:
    """Runs what is not yet finished and returns all results, in the order of the cells.

    `on_group(number, total, cells)` is called as a group starts; what it returns is called after
    every evaluation with the rounds done and the new rows.
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
    for cell in cells:
        folders[cell.name].open(cell.experiment.to_dict(), resume=True)
    by_name = {cell.name: cell for cell in cells}
    groups = _groups(cells, folders, out / "groups", by_name)
    fresh: dict[str, Result] = {}
    # Settled beforehand: what is measured must not be disturbed by a compilation.
    tuned = [settle(members[0].experiment, folder / "state") for folder, members in groups]
    # One program is compiled while the one before it runs: XLA compiles on one core.
    with ThreadPoolExecutor(max_workers=1) as compiler:
        waiting = (
            compiler.submit(_prepare, members, at_once, choice)
            for (_, members), choice in zip(groups, tuned, strict=True)
        )
        programs = [next(waiting, None)]
        for number, (group_dir, members) in enumerate(groups):
            callback = on_group(number, len(groups), members) if on_group else None
            program = programs.pop().result()
            programs.append(next(waiting, None))
            found = train(
                [cell.experiment for cell in members],
                [folders[cell.name] for cell in members],
                checkpoint_dir=group_dir / "state",
                on_evaluation=callback,
                program=program,
            )
            fresh |= {cell.name: result for cell, result in zip(members, found, strict=True)}
            shutil.rmtree(group_dir)
    return [
        fresh.get(cell.name) or read_result(cell.experiment, folders[cell.name]) for cell in cells
    ]


def _prepare(members: Sequence[Cell], at_once: int | None, tuning: Tuning) -> Program:
    experiments = [cell.experiment for cell in members]
    return Program(experiments[0], at_once, tuning).prepare(experiments)


def _groups(cells, folders, root: Path, by_name):
    """Interrupted groups as they were, then the other unfinished cells grouped by structure.

    A group's members are written down when it starts: its checkpoint holds the state of exactly
    these, whatever has been finished or added since.
    """
    groups, taken = [], set()
    for manifest in sorted(root.glob("*/members.json")):
        names = json.loads(manifest.read_text())
        if all(name in by_name for name in names):
            if all(folders[name].finished for name in names):
                shutil.rmtree(manifest.parent)
                continue
            groups.append((manifest.parent, [by_name[name] for name in names]))
            taken |= set(names)
    by_structure: dict = {}
    for cell in cells:
        if cell.name not in taken and not folders[cell.name].finished:
            by_structure.setdefault(cell.experiment.structure(), []).append(cell)
    for members in by_structure.values():
        names = json.dumps([cell.name for cell in members])
        group_dir = root / hashlib.sha256(names.encode()).hexdigest()[:12]
        group_dir.mkdir(parents=True, exist_ok=True)
        results.write_atomically(group_dir / "members.json", names)
        groups.append((group_dir, members))
    return groups


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

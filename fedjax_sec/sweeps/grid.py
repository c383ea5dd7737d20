"""A sweep: a base experiment, a grid of labelled alternatives (their product), and seeds."""

import dataclasses
import itertools
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fedjax_sec import core
from fedjax_sec.core import objects, plugins
from fedjax_sec.core.advice import shown
from fedjax_sec.core.fields import COUNT, SEED, ConfigError, static
from fedjax_sec.data import Source
from fedjax_sec.runs import config as config_lib
from fedjax_sec.runs import loggers
from fedjax_sec.runs.config import Experiment

#: Cells of a sweep, each of which has a folder: more are a mistake in the grid.
MOST_CELLS = 100_000

#: The seed of an experiment that names none.
_SEED = Experiment.seed


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
    seeds: tuple[int, ...] | None = static(
        None, "Seeds of every cell (null: the experiment's `seed` alone).", low=0, high=SEED
    )
    at_once: int | None = static(
        None,
        "Replicas vmapped at a time (null: as many as fit an accelerator, 1 on a CPU).",
        low=1,
        high=COUNT,
    )
    group_size: int | None = static(
        None,
        "Runs of one compiled program that one process takes at a time (null: 64). More seeds of "
        "one structure are split among processes.",
        low=1,
        high=COUNT,
    )
    launcher: str | dict | None = static(
        None,
        "Where runs are computed: local (processes of this machine), ray, slurm, or a mapping with "
        "name and fields (null: this process).",
    )
    workers: int | None = static(
        None, "Workers of the launcher (null: what it has by default).", low=1, high=10_000
    )
    title: str = static("", "Title of the figure; the data and the number of seeds follow below.")
    imports: tuple[str, ...] = static(
        (),
        "Modules and Python files that register components of your own, imported first; paths are "
        "relative to this file.",
    )
    logging: tuple[str, ...] = static(
        (), "Where the measurements of every run go beside its folder, as in an experiment."
    )


def load(
    config: str | Path | Mapping,
    overrides: Sequence[str] | Mapping = (),
    cell_overrides: Mapping | None = None,
    imports: Sequence[str] = (),
    logging: Sequence[str] | None = None,
) -> tuple[Sweep, list[Cell]]:
    """A sweep, of a YAML file or a mapping, and its cells, all checked.

    `overrides` change the sweep's own keys (`seeds=[0]`) or, as `overrides.client.l2=1e-4`, a key
    of every cell's experiment; they are strings or a mapping. `cell_overrides` is a mapping of keys
    of every cell's experiment. `imports` are modules and files with components of your own, and
    `logging` loggers, beside those that the file names.
    """
    if not isinstance(overrides, Mapping):
        overrides = dict(config_lib.parse_override(text) for text in overrides)
    prefix = "overrides."
    settings = {key: value for key, value in overrides.items() if not str(key).startswith(prefix)}
    dotted = {
        key.removeprefix(prefix): value for key, value in overrides.items() if key not in settings
    }
    if not isinstance(config, (str, os.PathLike, Mapping)):
        raise ConfigError(f"A sweep is a YAML file or a mapping, got {shown(config)}.")
    path = None if isinstance(config, Mapping) else Path(config)
    spec = config if path is None else config_lib.read_yaml(path)
    spec = config_lib.apply_overrides(spec, settings)
    if imports:
        spec["imports"] = plugins.joined(spec.get("imports"), imports)
    spec = loggers.with_more(spec, logging, "--log")
    return from_mapping(spec, dotted | dict(cell_overrides or {}), path)


def from_mapping(
    mapping: Mapping, cell_overrides: Mapping | None = None, path: Path | None = None
) -> tuple[Sweep, list[Cell]]:
    """A sweep from a plain mapping and its cells; `path`, its file, is where others are beside.

    >>> from_mapping({"experiment": {"rounds": 3}, "seeds": [4, 5]})[1][1].name
    'run/seed5'
    """
    spec = config_lib.apply_overrides(mapping, ())
    if "imports" in spec:
        spec["imports"] = plugins.import_all(spec["imports"], "imports")
    if "logging" in spec:
        spec["logging"] = loggers.names_of(spec["logging"])
    try:
        sweep = core.build(Sweep, spec, "")
    except core.UnknownKey as error:
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
    elif path is not None and base.get("imports"):  # relative to this file, as its own are
        given = plugins.joined(base["imports"], ())
        named = [plugins.resolved(one, "experiment.imports", path.parent) for one in given]
        base = {**base, "imports": named}
    if sweep.imports:  # each cell's folder says what it needs
        base = {**base, "imports": plugins.joined(base.get("imports"), sweep.imports)}
    if sweep.logging:
        base = loggers.with_more(base, sweep.logging)
    changes = {**sweep.overrides, **(cell_overrides or {})}
    return sweep, make_cells(base, sweep.grid, sweep.seeds, changes)


def make_cells(
    base: Mapping,
    grid: Mapping,
    seeds: Sequence[int] | None = None,
    overrides: Mapping | None = None,
) -> list[Cell]:
    """All cells of a grid: the product of its axes and the seeds.

    A label's value is what the axis key is set to; with the axis name in parentheses, such as
    `(setting)`, it is a mapping of several dotted keys. Without `seeds` the cells have the base's
    `seed`; a base with another seed than the default and `seeds` without it contradict each other.

    >>> cells = make_cells({}, {"defense": ["mean", "median"]}, seeds=(0, 1))
    >>> [cell.name for cell in cells][:2]
    ['mean/seed0', 'mean/seed1']
    """
    seeds = seeds_of(base) if seeds is None else core.plain(seeds)
    seeds = list(seeds) if isinstance(seeds, tuple) else seeds
    if isinstance(seeds, str) or not isinstance(seeds, Sequence) or not seeds:
        raise ConfigError(f"seeds must be a list of one or more integers, got {shown(seeds)}.")
    for name, given in (("grid", grid), ("overrides", overrides or {})):
        if not isinstance(given, Mapping):
            raise ConfigError(f"{name} must be a mapping of dotted keys, got {shown(given)}.")
    if len(set(map(repr, seeds))) < len(seeds):
        raise ConfigError(f"seeds must differ, got {shown(seeds)}.")
    if (lost := [seed for seed in seeds_of(base) if seed not in seeds]) and lost != [_SEED]:
        raise ConfigError(
            f"experiment.seed = {shown(lost[0])} would be ignored, since seeds are {shown(seeds)}; "
            f"leave one of the two out, or put {shown(lost[0])} into seeds."
        )
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
            cell._replace(experiment=config_lib.from_mapping(base, settings | measured))
            if settings
            else cell
            for cell, settings in zip(cells, clean, strict=True)
        ]
    names = [cell.name for cell in cells]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(
            f"grid: two cells have the same name {sorted(twice)[0]!r}; give labels, "
            f"{{label: value}}, that differ in letters or digits."
        )
    return cells


def seeds_of(base: Mapping) -> list:
    """The base's own seed, or the default."""
    return [base.get("seed", _SEED) if isinstance(base, Mapping) else _SEED]


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
    return common_backdoor(cells)


def common_backdoor(cells: Sequence[Cell]) -> dict | None:
    """The specification of the attacked cells' backdoor where they have one and the same."""
    specs = [
        core.dump(cell.experiment.attack.backdoor)
        for cell in cells
        if cell.experiment.attack.backdoor is not None
    ]
    return specs[0] if specs and all(spec == specs[0] for spec in specs) else None


def _labelled(axis, values) -> dict:
    if not isinstance(axis, str):
        raise ConfigError(f"grid: an axis is a dotted key such as client.l2, got {shown(axis)}.")
    values = core.plain(values)
    if isinstance(values, Mapping):
        labelled = {str(label): value for label, value in values.items()}
    elif isinstance(values, (list, tuple)):
        labelled = {label_of(value): value for value in values}
        if len(labelled) < len(values):
            raise ConfigError(f"grid.{axis}: values look alike; give labels, {{label: value}}.")
    else:
        raise ConfigError(f"grid.{axis}: expected a list or {{label: value}}, got {shown(values)}.")
    if not labelled:
        raise ConfigError(f"grid.{axis} is empty.")
    return labelled


def label_of(value) -> str:
    """The label of an alternative that is given without one.

    >>> label_of([{"name": "clip_norm", "max_norm": 2.0}, "median"])
    'clip_norm max_norm=2.0 + median'
    >>> label_of(len)
    'len'
    """
    value = value.name if isinstance(value, Source) else objects.described(value)
    if isinstance(value, Mapping):
        rest = [f"{key}={item}" for key, item in value.items() if key != "name"]
        return " ".join([str(value.get("name", "")), *rest]).strip()
    if isinstance(value, (list, tuple)):
        return " + ".join(label_of(item) for item in value)
    return "none" if value is None else str(value)


def _slug(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=+-]+", "-", label).strip("-") or "none"


def named(axis: str, label: str, whole: bool = False) -> str:
    """A label that can be read alone: with its axis where it is a number, true, false or none.

    `whole` is for the axis' name with all its parts.

    >>> named("client.l2", "0.1"), named("client.l2", "0.1", whole=True), named("defense", "krum")
    ('l2 = 0.1', 'client.l2 = 0.1', 'krum')
    """
    alone = label in ("none", "True", "False", "true", "false") or is_number(label)
    name = axis if whole else axis.rpartition(".")[2]
    return f"{name} = {label}" if alone and axis[:1] != "(" else label


def is_number(text: str) -> bool:
    """Whether a label is a number.

    >>> is_number("1e-3"), is_number("krum")
    (True, False)
    """
    try:
        float(text)
    except ValueError:
        return False
    return True

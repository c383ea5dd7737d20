"""Papers as declarations: rows, quantities and titles in, tables and figures out.

A paper's module declares a `Paper`: its options, its scales, and its items (tables and figures),
each with rows and a writer. Everything else is here. A row's experiment is made in one order, file
< scale < row < `--set`, and what comes later wins. Rows of equal experiments, of one item or of
several, share one run.
"""

import csv
import dataclasses
import fnmatch
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from fedjax_sec import core, sweeps
from fedjax_sec.core import ConfigError, shipped
from fedjax_sec.core import files as files_lib
from fedjax_sec.runs import config as config_lib
from fedjax_sec.runs import results as results_lib
from fedjax_sec.runs.config import Experiment
from fedjax_sec.runs.experiment import Result

#: The scales that every paper has.
SCALES = ("smoke", "small", "paper")
#: The columns of a file of published numbers.
SCHEMA = ("item", "dataset", "row", "column", "metric", "value", "place")


# --- What a paper declares ----------------------------------------------------------------------


class Option(NamedTuple):
    """A choice that a paper leaves to the caller, such as its data set.

    `default` is one of `values`, several of them where `many`, or None where it must be given.
    """

    name: str
    values: tuple[str, ...]
    help: str
    default: str | tuple[str, ...] | None = None
    many: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """A request: which scale, how many seeds, what is changed, and the paper's own options.

    `overrides` win over the file, the scale and the row. `only` picks rows: each of its patterns is
    a row's label, `*` stands for any text; none is all. `Paper.plan` makes and checks one.
    """

    scale: str = "paper"
    seeds: int = 1
    overrides: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __getitem__(self, option: str):
        """The value of one of the paper's options."""
        return self.options[option]


class Part(NamedTuple):
    """One data set of an item: the file of `configs/PAPER/` that its rows change.

    `scales` name entries of the paper's scales, the later winning; `dataset` is where published
    numbers are looked up (empty: `file`); `axes` are further labels of its cells; `suffix` ends the
    names of its output files; `title` is its name in the paper (empty: the item's).
    """

    file: str
    scales: tuple[str, ...]
    dataset: str = ""
    axes: Mapping[str, str] = {}
    suffix: str = ""
    title: str = ""


class Case(NamedTuple):
    """The input of an item's rows: `base` is the file at its scale with `--set` in it."""

    plan: Plan
    part: Part
    base: dict


class Row(NamedTuple):
    """One row, or one cell of a table with columns, or one point of a curve over `x`.

    `changes` maps dotted keys to what the row sets, or is a function of the seed that gives such a
    mapping. `finish` maps the experiment, `--set` included, to the one that is run. `name` is the
    cell's, where it is not the item and the row's texts.
    """

    row: str
    changes: Mapping[str, Any] | Callable[[int], Mapping[str, Any]]
    column: str = ""
    x: str = ""
    name: str = ""
    finish: Callable[[Experiment], Experiment] | None = None

    @property
    def label(self) -> str:
        """`ROW / COLUMN`, or the one that there is: what `--only` names."""
        return " / ".join(filter(None, (self.row, self.column)))

    def at(self, seed: int) -> dict:
        """The row's changes for one seed."""
        return dict(self.changes(seed) if callable(self.changes) else self.changes)


@dataclasses.dataclass(frozen=True)
class Item:
    """A table or figure.

    Attributes:
      title: its name in the paper.
      rows: a case -> its rows.
      write: a report -> the files written.
      parts: a plan -> its data sets; none where the paper has the item for others only.
      needs: a row and its experiment -> pairs (whether it holds, what the numbers need).
      whole: whether it cannot be written from a part of its rows.
      published: the item whose published numbers are shown (empty: its own).
      join: writes more from the reports of all its parts.
    """

    title: str
    rows: Callable[[Case], Iterable[Row]]
    write: Callable[["Report"], list[Path]]
    parts: Callable[[Plan], Sequence[Part]]
    needs: Callable[[Row, Experiment], Iterable[tuple[bool, str]]] = lambda row, experiment: ()
    whole: bool = False
    published: str = ""
    join: Callable[[Sequence["Report"]], list[Path]] | None = None


@dataclasses.dataclass(frozen=True)
class Paper:
    """A paper: everything that its module declares.

    Attributes:
      module: the module's `__name__`; its last part names the command, the folder of `configs/`,
        and two files beside the module: the published numbers (`NAME.csv`, see `SCHEMA`) and the
        scales (`NAME.yaml`: scale -> one of a part's scales, or a row's label -> changes).
      title: the paper's title in headings.
      items: name -> item.
      options: the choices of its command, beside those that all papers have.
      derive: the file and the file at its scale -> further changes that follow from the scale.
      seeds: the default of `--seeds`.
      labelled: whether headings name the data set.
    """

    module: str
    title: str
    items: Mapping[str, Item]
    options: tuple[Option, ...] = ()
    derive: Callable[[Mapping, Mapping], Mapping] | None = None
    seeds: int = 1
    labelled: bool = False

    @property
    def name(self) -> str:
        """The name of its command, of its folder of configurations, and of its CSV file."""
        return self.module.rpartition(".")[2]

    def plan(
        self,
        scale: str = "paper",
        seeds: int | None = None,
        overrides: Sequence[str] = (),
        only: Sequence[str] = (),
        **options,
    ) -> Plan:
        """A plan with the defaults filled in. Raises: `ConfigError` for what is no choice."""
        _choose(scale, SCALES, "scale")
        known = {option.name: option for option in self.options}
        for name in options:
            _choose(name, known, f"option of {self.name}")
        chosen = {}
        for name, option in known.items():
            given = options.get(name) or option.default
            if given is None:
                raise ConfigError(f"{name}: {self.name} needs one of {', '.join(option.values)}.")
            given = tuple(given) if option.many else given
            for value in given if option.many else (given,):
                _choose(value, option.values, name)
            chosen[name] = given
        seeds = self.seeds if seeds is None else seeds
        return Plan(scale, seeds, tuple(overrides), tuple(only), chosen)

    def scaled(self, scale: str, name: str) -> Mapping:
        """A scale's changes for one of a part's scales, or for a row by its label."""
        return _scales(self.module).get(scale, {}).get(name, {})

    def published(self, item: str, dataset: str) -> dict[tuple[str, str, str], float]:
        """(row, column, metric) -> the paper's number, as the paper prints it."""
        return {
            (line["row"], line["column"], line["metric"]): float(line["value"])
            for line in published_lines(self.module)
            if (line["item"], line["dataset"]) == (item, dataset)
        }


def _choose(value, known: Iterable[str], what: str) -> None:
    if value not in known:
        near = core.suggestion(str(value), known)
        raise ConfigError(f"{what}: expected one of {', '.join(known)}, got {value!r}.{near}")


@functools.cache
def _scales(module: str) -> dict[str, dict[str, dict]]:
    path = _beside(module, ".yaml")
    return config_lib.read_yaml(path) if path.is_file() else {}


def _beside(module: str, suffix: str) -> Path:
    """The data file of a paper's module."""
    return Path(sys.modules[module].__file__).with_suffix(suffix)


def published_lines(module: str) -> list[dict[str, str]]:
    """The lines of a paper's CSV file, which must have `SCHEMA` and no number twice."""
    path = _beside(module, ".csv")
    reader = csv.DictReader(path.read_text().splitlines())
    if tuple(reader.fieldnames or ()) != SCHEMA:
        raise ConfigError(f"{path.name}: the columns must be {','.join(SCHEMA)}.")
    lines, places = list(reader), set()
    for number, line in enumerate(lines, 2):
        place = tuple(line[key] for key in SCHEMA[:5])
        if place in places:
            raise ConfigError(f"{path.name}, line {number}: {', '.join(place)} is there twice.")
        places.add(place)
    return lines


# --- Configurations -----------------------------------------------------------------------------


def config_path(paper: str, name: str) -> Path:
    """The file `configs/PAPER/NAME.yaml`: of the checkout, else of the installed package.

    Raises: `ConfigError` that names the files that there are.
    """
    return shipped.config_file(paper, name)


class Files:
    """The files of a paper by name, read once; `changes` are made in each."""

    def __init__(self, paper: Paper, changes: Mapping | None = None):
        self._paper, self._changes, self._read = paper.name, dict(changes or {}), {}

    def __getitem__(self, name: str) -> dict:
        if name not in self._read:
            spec = config_lib.read_yaml(config_path(self._paper, name))
            self._read[name] = config_lib.apply_overrides(spec, self._changes)
        return self._read[name]


def base_of(paper: Paper, plan: Plan, part: Part, file: Mapping, *scales: str) -> dict:
    """The experiment that rows change: the file at the plan's scale, with `--set` in it already.

    An override that needs a row's component, such as `attack.z=1` on a file without an attack, is
    left to the rows.
    """
    base = dict(file)
    for name in (*part.scales, *scales):
        base = config_lib.apply_overrides(base, paper.scaled(plan.scale, name))
    if paper.derive is not None:
        base = config_lib.apply_overrides(base, paper.derive(file, base))
    for text in plan.overrides:
        if config_lib.parse_override(text)[0] == "seed":
            raise ConfigError(f"--set {text}: seeds are 0 to --seeds - 1; give --seeds instead.")
    for text in plan.overrides:
        with suppress(ConfigError):
            base = config_lib.apply_overrides(base, [text])
    with naming_overrides(plan.overrides, "all rows"):
        for key in ("rounds", "data.num_clients", "threat.num_malicious"):
            section, _, name = key.rpartition(".")
            values = base.get(section) if section else base
            if isinstance(values, Mapping) and name in values:
                core.coerce(values[name], int, key)  # rows are computed from it
    return base


@contextmanager
def naming_overrides(overrides: Sequence[str], where: str):
    """Errors of a row's settings as one message that names the row and what was set."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        if not overrides:
            raise
        given = " ".join(f"--set {text}" for text in overrides)
        raise ConfigError(f"{where} with {given}, which is for every row: {error}") from error


# --- Cells --------------------------------------------------------------------------------------


class Planned(NamedTuple):
    """A row and its cells, one a seed."""

    row: Row
    cells: list[sweeps.Cell]


class Sheet(NamedTuple):
    """An item of one data set: its rows, in order."""

    item: str
    part: Part
    rows: list[Planned]


class Twins:
    """Makes cells; of equal experiments, by their fingerprint, the first one's cell is shared."""

    def __init__(self):
        self._cells: dict[str, sweeps.Cell] = {}
        self._names: set[str] = set()

    def cell(self, axes: Mapping[str, str], experiment: Experiment) -> sweeps.Cell:
        """The cell of this experiment, named by `axes` where it is new."""
        key = experiment.fingerprint()
        if key not in self._cells:
            cell = sweeps.Cell(dict(axes), experiment)
            if cell.name in self._names:
                raise ConfigError(f"Two rows of different experiments have the name {cell.name!r}.")
            self._names.add(cell.name)
            self._cells[key] = cell
        return self._cells[key]


def make_cells(
    paper: Paper, plan: Plan, items: Sequence[str], files: Mapping[str, Mapping] | None = None
) -> list[Sheet]:
    """The rows of items with their cells; equal experiments share a cell.

    `files` maps names to the experiments that rows change (None: those of `configs/`).
    Raises: `ConfigError` for a pattern of `plan.only` that no row has, for items that the paper has
    for other options only, and for settings from which an item cannot be written.
    """
    files = Files(paper) if files is None else files
    for name in items:
        _choose(name, paper.items, f"item of {paper.name}")
    rows = [
        (name, part, _rows(paper, plan, name, part, files[part.file]))
        for name in items
        for part in paper.items[name].parts(plan)
    ]
    rows = [(name, part, pairs) for name, part, pairs in rows if pairs]
    if not rows:
        given = " ".join(f"--{option.replace('_', '-')} {plan[option]}" for option in plan.options)
        raise ConfigError(f"{', '.join(items)}: not in the paper for {given}.")
    twins, sheets = Twins(), []
    for name, part, pairs in _picked(paper, plan, rows):
        planned = []
        for base, row in pairs:
            where = f"{name}, {row.label}"
            text = row.name or " ".join(filter(None, (name, row.row, row.column, row.x)))
            cells = []
            for seed in range(plan.seeds):
                with naming_overrides(plan.overrides, where):
                    spec = config_lib.apply_overrides(base, row.at(seed) | {"seed": seed})
                    experiment = config_lib.from_mapping(spec, plan.overrides)
                if row.finish is not None:
                    experiment = row.finish(experiment)
                for holds, need in paper.items[name].needs(row, experiment):
                    if not holds:
                        raise ConfigError(
                            f"{where}: its numbers need {need}; do not --set that away."
                        )
                cells.append(twins.cell({**part.axes, "run": text}, experiment))
            planned.append(Planned(row, cells))
        sheets.append(Sheet(name, part, planned))
    return sheets


def _rows(paper, plan, name: str, part: Part, file: Mapping) -> list[tuple[dict, Row]]:
    """The rows of an item, each with what it changes.

    Where a scale is of a row, all that the row is computed from is at that scale.
    """
    make, pairs = paper.items[name].rows, []
    with naming_overrides(plan.overrides, name):
        base = base_of(paper, plan, part, file)
        for row in make(Case(plan, part, base)):
            if paper.scaled(plan.scale, row.label):
                scaled = base_of(paper, plan, part, file, row.label)
                (row,) = [
                    other
                    for other in make(Case(plan, part, scaled))
                    if (other.label, other.x) == (row.label, row.x)
                ]
                pairs.append((scaled, row))
            else:
                pairs.append((base, row))
    return pairs


def _picked(paper, plan, rows) -> list:
    """The rows that `plan.only` leaves; a pattern that no row has is a `ConfigError`."""
    if not plan.only:
        return rows
    known = list(dict.fromkeys(row.label for _, _, pairs in rows for _, row in pairs))
    for pattern in plan.only:
        if not fnmatch.filter(known, pattern):
            raise ConfigError(
                f"only: {pattern!r} is no row of {', '.join(dict.fromkeys(n for n, _, _ in rows))}."
                f" Give one, with * for any text; here are {', '.join(known)}."
                f"{core.suggestion(pattern, known)}"
            )
    wanted = {label for pattern in plan.only for label in fnmatch.filter(known, pattern)}
    picked = []
    for name, part, pairs in rows:
        left = [(base, row) for base, row in pairs if row.label in wanted]
        if left and len(left) < len(pairs) and paper.items[name].whole:
            raise ConfigError(f"only: {name} needs all of its rows; leave it out, or --only.")
        if left:
            picked.append((name, part, left))
    return picked


# --- Running and writing ------------------------------------------------------------------------


class Entry(NamedTuple):
    """A row with its runs: a result a seed, and the folder of the first seed's."""

    row: Row
    results: list[Result]
    folder: Path


@dataclasses.dataclass(frozen=True)
class Report:
    """The input of a writer: an item of one data set, its entries, and the output path.

    `note` is what captions say of `--set`; `path` is the output file without suffix; `heading` the
    first line.
    """

    plan: Plan
    name: str
    part: Part
    entries: list[Entry]
    published: Mapping[tuple[str, str, str], float]
    note: str
    path: Path
    heading: str

    def __getitem__(self, label: str) -> Entry:
        """The entry of a row by its label."""
        return next(entry for entry in self.entries if entry.row.label == label)

    def __contains__(self, label: str) -> bool:
        return any(entry.row.label == label for entry in self.entries)

    @property
    def over(self) -> str:
        """Over how many seeds the numbers are."""
        return over(self.plan.seeds)

    @property
    def first(self) -> Result:
        """The first row's run of seed 0."""
        return self.entries[0].results[0]

    @property
    def last(self) -> Result:
        """The last row's run of seed 0: attacked, where any is."""
        return self.entries[-1].results[0]


def regenerate(
    paper: Paper,
    plan: Plan,
    items: Sequence[str],
    out: Path,
    *,
    run: Callable | None = None,
    files: Mapping[str, Mapping] | None = None,
) -> list[Path]:
    """Runs what is missing in `out/runs` and writes the items in `out`; returns the files written.

    `run(cells, folder)` runs cells (default: `sweeps.run_cells`); `files` as in `make_cells`.
    Raises: `ConfigError` for what `make_cells` refuses, and for a folder that holds something else.
    """
    out = Path(out)
    sheets = make_cells(paper, plan, items, files)
    planned = [planned for sheet in sheets for planned in sheet.rows]
    cells = list({cell.name: cell for one in planned for cell in one.cells}.values())
    with claimed(out, paper):
        done = (run or sweeps.run_cells)(cells, out / "runs")
    result_of = {cell.name: result for cell, result in zip(cells, done, strict=True)}
    written, reports = [], {}
    for name, part, rows in sheets:
        entries = [
            Entry(
                row,
                [result_of[cell.name] for cell in cells],
                out / "runs" / "cells" / cells[0].name,
            )
            for row, cells in rows
        ]
        item = paper.items[name]
        heading = f"{paper.title}, {part.title or item.title}"
        if paper.labelled:
            heading += f": {entries[0].results[0].summary['data']['label']}"
        report = Report(
            plan,
            name,
            part,
            entries,
            paper.published(item.published or name, part.dataset or part.file),
            note_of(plan.overrides, [row.at(0) for row, _ in rows]),
            out / f"{name}{part.suffix}",
            heading,
        )
        written += item.write(report)
        reports.setdefault(name, []).append(report)
    for name, several in reports.items():
        if (join := paper.items[name].join) is not None:
            written += join(several)
    return written


@contextmanager
def claimed(out: Path, paper: Paper) -> Iterator[None]:
    """Marks a folder as one of this paper's results; taken back where nothing comes to be run.

    Folders of versions that marked only `runs/` inside are taken up.
    Raises: `ConfigError` for a folder that holds something else.
    """
    mark, kind = results_lib.read_mark(out), f"{results_lib.PAPER}{paper.name}"
    if mark.kind.startswith(results_lib.PAPER) and mark.kind != kind:
        other = mark.kind.removeprefix(results_lib.PAPER)
        raise ConfigError(
            f"Output folder {str(out)!r} holds the results of another paper, {other}. Choose "
            f"another folder."
        )
    if mark.kind in ("run", "cell", "sweep"):
        what = "a sweep" if mark.kind == "sweep" else "a run"
        raise ConfigError(
            f"Output folder {str(out)!r} holds {what}, not a paper's results. Choose another "
            f"folder."
        )
    if mark.kind == "other" and not _is_older(out):
        raise results_lib.in_use(out, mark)
    made = files_lib.check_writable(out)
    if mark.kind != kind:
        results_lib.write_mark(out, kind)
    try:
        yield
    except BaseException:
        if mark.kind != kind and not (out / "runs").exists():
            files_lib.remove_files([out / results_lib.MARK])
            files_lib.remove_empty(made)
        raise


def _is_older(out: Path) -> bool:
    """Whether a folder without a mark holds a paper's runs and nothing but tables and figures."""
    if results_lib.read_mark(out / "runs").kind != "sweep":
        return False
    rest = [path for path in out.iterdir() if path.name not in ("runs", results_lib.LOCK)]
    return all(path.is_file() and path.suffix in (".csv", ".md", ".png", ".pdf") for path in rest)


# --- Captions -----------------------------------------------------------------------------------


def note_of(overrides: Sequence[str], rows: Iterable[Mapping]) -> str:
    """The sentence of a caption about `--set`, beginning with a blank; empty without it.

    >>> note_of(["defense=median"], [{"defense": "mean"}, {"defense": "krum"}])
    " `--set defense=median` replaces every row's. Published numbers are of the paper's settings."
    """
    if not overrides:
        return ""
    keys = {key for row in rows for key in row}
    replaced: dict[str, list[str]] = {"every row's": [], "the file's and the scale's": []}
    for text in overrides:
        key = config_lib.parse_override(text)[0]
        wins = any(_within(key, other) or _within(other, key) for other in keys)
        replaced["every row's" if wins else "the file's and the scale's"].append(f"`--set {text}`")
    parts = [
        f"{', '.join(texts)} replace{'s' * (len(texts) == 1)} {whose}"
        for whose, texts in replaced.items()
        if texts
    ]
    return f" {'; '.join(parts)}. Published numbers are of the paper's settings."


def _within(key: str, other: str) -> bool:
    return key == other or key.startswith(f"{other}.")


def over(seeds: int) -> str:
    """Over how many seeds a table's numbers are.

    >>> over(1), over(3)
    ('one seed', 'mean and standard deviation over 3 seeds')
    """
    return "one seed" if seeds == 1 else f"mean and standard deviation over {seeds} seeds"

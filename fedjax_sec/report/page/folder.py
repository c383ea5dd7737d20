"""A folder of runs as it is now, finished or not: configurations, rows of metrics, summaries."""

import contextlib
import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from fedjax_sec.core import ConfigError
from fedjax_sec.core.yaml import read_text
from fedjax_sec.runs import results
from fedjax_sec.runs.experiment import stack_rows
from fedjax_sec.sweeps import catalog, survey
from fedjax_sec.sweeps.grid import named
from fedjax_sec.sweeps.status import RunStatus

#: Keys of a configuration that say where something lies or which seed it is, not what is computed.
WHEREABOUTS = ("seed", "data.data_dir", "data.download", "imports")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Run(NamedTuple):
    """One run. `metrics` and `summary` are empty where there are none yet.

    `problem` says which file could not be read, in place of its content.
    """

    name: str
    seed: int
    status: RunStatus
    config: dict[str, Any]
    metrics: dict[str, np.ndarray]
    summary: dict[str, Any]
    problem: str = ""

    @property
    def finished(self) -> bool:
        return bool(self.summary)

    @property
    def attacked(self) -> bool:
        """Whether the configuration has an attack."""
        return self.config.get("attack") not in (None, "none", [])


class Cell(NamedTuple):
    """Runs that differ in the seed alone, with their labels on the axes that the sweep names."""

    name: str
    labels: dict[str, str]
    runs: list[Run]

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of all its runs but for the seed, and where things lie."""
        return self.runs[0].config

    @property
    def title(self) -> str:
        """The labels in one line, each readable alone."""
        return " / ".join(named(axis, one) for axis, one in self.labels.items()) or self.name


class Folder(NamedTuple):
    """`kind` is `run`, `sweep` or `runs`; `refused` has an arena's combinations that were not run.

    Each of `refused` maps axes to labels, and `refused` to the reason.
    """

    path: Path
    kind: str
    cells: list[Cell]
    refused: list[dict[str, str]]

    @property
    def runs(self) -> list[Run]:
        return [run for cell in self.cells for run in cell.runs]


def read(path: str | Path) -> Folder:
    """Everything in the folder of a run, a sweep, an arena or a paper, or in a folder of runs.

    Raises: `ConfigError` for a folder that holds none of these, or in which nothing is readable.
    """
    path = Path(path).absolute()
    kind = results.RunFolder(path).mark().kind
    if kind == "other" and (runs := _runs_below(path)):
        folder = Folder(path, "runs", _by_configuration(runs), [])
    else:
        status = survey(path)
        place, pairs = Path(status.path), []
        for one in status.runs:
            at = place / catalog.CELLS / one.name if status.kind == "sweep" else place
            pairs.append((at, one))
        runs = [_run(at, one) for at, one in pairs]
        if status.kind == "run":
            folder = Folder(path, "run", [Cell(path.name, {}, runs)], [])
        else:
            folder = Folder(path, "sweep", _by_name(runs, _labels(place)), _refused(path))
    if not any(run.config for run in folder.runs):
        raise ConfigError(f"Folder {str(path)!r} holds no run yet whose configuration is written.")
    return folder


def _runs_below(path: Path) -> list[Run]:
    """The runs in the folders of a folder that is not ours, such as `results/`."""
    below = [one for one in sorted(path.iterdir()) if one.is_dir() and one.name[:1] != "."]
    ours = [one for one in below if results.RunFolder(one).mark().kind in ("run", "cell", "older")]
    return [_run(one, survey(one).runs[0]) for one in ours]


def _run(path: Path, status: RunStatus) -> Run:
    folder, problems = results.RunFolder(path), []

    def read(part, nothing):
        try:
            return part()
        except (ConfigError, OSError) as error:
            problems.append(str(error))
            return nothing

    config: dict = read(lambda: _config(path / results.CONFIG), {})
    summary: dict = read(folder.summary, {}) if folder.finished else {}
    rows = read(folder.written_rows, [])
    metrics = stack_rows(rows) if rows else {}
    if not rows:
        summary = {}  # a finished run has rows
    seed = int(config.get("seed", 0))
    return Run(status.name, seed, status, config, metrics, summary, " ".join(problems))


def _config(path: Path) -> dict:
    """What a run has written down: plain YAML without references, so it is read quickly."""
    if not path.exists():
        return {}
    try:
        content = yaml.load(read_text(path), _LOADER)
    except yaml.YAMLError:
        raise ConfigError(f"{str(path)!r} is damaged: it is no YAML.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{str(path)!r} is damaged: it holds no mapping.")
    return content


def _labels(path: Path) -> dict[str, dict[str, str]]:
    """Each run's labels on the axes, none where they are damaged: the names still tell the runs."""
    with contextlib.suppress(ConfigError):
        return catalog.read(path)
    return {}


def _by_name(runs: list[Run], labels: Mapping[str, dict]) -> list[Cell]:
    """The cells of a sweep, in its order where it has written that down."""
    cells: dict[str, Cell] = {}
    places = {name: place for place, name in enumerate(labels)}
    for run in sorted(runs, key=lambda run: places.get(run.name, len(places))):
        name = run.name.rpartition("/")[0]
        cells.setdefault(name, Cell(name, dict(labels.get(run.name, {})), [])).runs.append(run)
    return [_in_order(cell) for cell in cells.values()]


def _by_configuration(runs: list[Run]) -> list[Cell]:
    """Runs that differ in their seeds alone are one cell, named after the first of them."""
    cells: dict[str, Cell] = {}
    for run in runs:
        key = json.dumps(comparable(run.config), sort_keys=True)
        cells.setdefault(key, Cell(run.name, {"run": run.name}, [])).runs.append(run)
    return [_in_order(cell) for cell in cells.values()]


def _in_order(cell: Cell) -> Cell:
    return cell._replace(runs=sorted(cell.runs, key=lambda run: run.seed))


def _refused(path: Path) -> list[dict[str, str]]:
    """The combinations that an arena names as refused in its table, once it is written."""
    with contextlib.suppress(OSError, ValueError), open(path / "arena.csv", newline="") as file:
        return [
            {"attack": row["attack"], "defense": row["defense"], "refused": row["refused"]}
            for row in csv.DictReader(file)
            if row.get("refused")
        ]
    return []


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a configuration by their dotted keys; lists of components are numbered.

    >>> dict(flat({"client": {"l2": 0.0}, "attack": [{"name": "zero"}, {"name": "boost"}]}))
    {'client.l2': 0.0, 'attack.0.name': 'zero', 'attack.1.name': 'boost'}
    """
    if isinstance(value, dict) and value:
        pairs = value.items()
    elif isinstance(value, list) and any(isinstance(one, dict) for one in value):
        pairs = enumerate(value)
    else:
        yield path, value
        return
    for key, one in pairs:
        yield from flat(one, f"{path}.{key}" if path else str(key))


def comparable(config: Mapping) -> dict[str, Any]:
    """The leaves of a configuration, but for the seed and where things lie.

    >>> comparable({"seed": 3, "rounds": 5, "data": {"data_dir": "x", "name": "mnist"}})
    {'rounds': 5, 'data.name': 'mnist'}
    """
    leaves = flat(dict(config))
    return {
        key: value
        for key, value in leaves
        if not any(key == one or key.startswith(f"{one}.") for one in WHEREABOUTS)
    }

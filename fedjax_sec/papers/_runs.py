"""What the papers' modules share: settings in one order, and cells that are run once.

The order is file < scale < row < `--set`: what comes later wins.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from fedjax_sec import core, sweeps
from fedjax_sec.core import ConfigError
from fedjax_sec.runs import config as config_lib
from fedjax_sec.runs.config import Experiment
from fedjax_sec.runs.experiment import Result


def foundation(file: Mapping, scale: Mapping, overrides: Sequence[str]) -> dict:
    """What rows are computed from, such as the number of clients: `--set` is in it already.

    An override that needs a row's component, such as `attack.z=1` on a file without an attack, is
    left to the rows.
    """
    for text in overrides:
        if config_lib.parse_override(text)[0] == "seed":
            raise ConfigError(f"--set {text}: seeds are 0 to --seeds - 1; give --seeds instead.")
    base = config_lib.apply_overrides(file, scale)
    for text in overrides:
        with suppress(ConfigError):
            base = config_lib.apply_overrides(base, [text])
    with computed_from(overrides, "all rows"):
        for key in ("rounds", "data.num_clients", "threat.num_malicious"):
            section, _, name = key.rpartition(".")
            part = base.get(section) if section else base
            if isinstance(part, Mapping) and name in part:
                core.coerce(part[name], int, key)  # rows are computed from it
    return base


@contextmanager
def computed_from(overrides: Sequence[str], where: str):
    """Errors of a row's settings as one message that names the row and what was set."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        if not overrides:
            raise
        set_ = " ".join(f"--set {text}" for text in overrides)
        raise ConfigError(f"{where} with {set_}, which is for every row: {error}") from error


def settled(
    base: Mapping, row: Mapping, seed: int, overrides: Sequence[str], where: str
) -> Experiment:
    """The experiment of a row: `base` < `row` < `overrides`.

    >>> base = foundation({"rounds": 9}, {}, ["defense=median"])
    >>> one = settled(base, {"defense": "krum"}, 0, ["defense=median"], "table1")
    >>> one.defense.stages[0].registered_name, one.rounds
    ('median', 9)
    """
    with computed_from(overrides, where):
        spec = config_lib.apply_overrides(base, {**row, "seed": seed})
        return config_lib.from_mapping(spec, overrides)


def demand(holds: bool, where: str, need: str) -> None:
    """Raises, before anything is run, where an item could not be written from the settings."""
    if not holds:
        raise ConfigError(f"{where}: its numbers need {need}; do not --set that away.")


def said_of(overrides: Sequence[str], rows: Iterable[Mapping]) -> str:
    """What a caption says of `--set`, beginning with a blank; nothing without it.

    >>> said_of(["defense=median"], [{"defense": "mean"}, {"defense": "krum"}])
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


def over(seeds: int) -> str:
    """Over how many seeds a table's numbers are.

    >>> over(1), over(3)
    ('one seed', 'mean and standard deviation over 3 seeds')
    """
    return "one seed" if seeds == 1 else f"mean and standard deviation over {seeds} seeds"


def diverged(results: Sequence[Result]) -> str:
    """How many of a row's runs diverged, such as `1 of 3 seeds`; empty where none did."""
    failed = sum(bool(result.summary.get("diverged")) for result in results)
    return f"{failed} of {len(results)} seeds" if failed else ""


def percent(results: Sequence[Result], metric: str, at=-1) -> np.ndarray:
    """Each seed's metric in percent, NaN where it was not measured.

    `at` is an evaluation, or a function of a result that picks one.
    """
    pick = at if callable(at) else lambda result: at
    return 100 * np.array(
        [
            result.metrics[metric][pick(result)] if metric in result.metrics else np.nan
            for result in results
        ]
    )


def _within(key: str, other: str) -> bool:
    return key == other or key.startswith(f"{other}.")


class Shared:
    """Makes cells; of equal experiments the first one's cell is everybody's."""

    def __init__(self):
        self._known: dict[str, sweeps.Cell] = {}

    def cell(self, axes: Mapping, experiment: Experiment) -> sweeps.Cell:
        """The cell of this experiment, named by `axes` where it is new."""
        key = config_lib.dump_yaml(experiment.to_dict())
        return self._known.setdefault(key, sweeps.Cell(dict(axes), experiment))


def finish(
    by_key: Mapping[Hashable, Sequence[sweeps.Cell]], out: Path, run: Callable | None = None
) -> dict[Hashable, list[Result]]:
    """Runs what is missing in `out/runs`; key -> the results of its cells.

    `run(cells, folder)` runs cells (default: `sweeps.run_cells`).
    """
    cells = list({cell.name: cell for found in by_key.values() for cell in found}.values())
    done = (run or sweeps.run_cells)(cells, out / "runs")
    by_name = {cell.name: result for cell, result in zip(cells, done, strict=True)}
    return {key: [by_name[cell.name] for cell in found] for key, found in by_key.items()}


def folder_of(cell: sweeps.Cell, out: Path) -> Path:
    """The folder of a cell's finished run."""
    return out / "runs" / "cells" / cell.name

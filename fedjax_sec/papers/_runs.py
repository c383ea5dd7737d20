"""What the papers' modules share: cells of equal experiments are one, and run once."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path

from fedjax_sec import config as config_lib
from fedjax_sec import sweep
from fedjax_sec.config import Experiment
from fedjax_sec.experiment import Result


class Shared:
    """Makes cells; of equal experiments the first one's cell is everybody's."""

    def __init__(self):
        self._known: dict[str, sweep.Cell] = {}

    def cell(self, axes: Mapping, experiment: Experiment) -> sweep.Cell:
        """The cell of this experiment, named by `axes` where it is new."""
        key = config_lib.dump_yaml(experiment.to_dict())
        return self._known.setdefault(key, sweep.Cell(dict(axes), experiment))


def finish(
    by_key: Mapping[Hashable, Sequence[sweep.Cell]], out: Path, run: Callable | None = None
) -> dict[Hashable, list[Result]]:
    """Runs what is missing in `out/runs`; key -> the results of its cells.

    `run(cells, folder)` runs cells (default: `sweep.run_cells`).
    """
    cells = list({cell.name: cell for found in by_key.values() for cell in found}.values())
    done = (run or sweep.run_cells)(cells, out / "runs")
    by_name = {cell.name: result for cell, result in zip(cells, done, strict=True)}
    return {key: [by_name[cell.name] for cell in found] for key, found in by_key.items()}


def folder_of(cell: sweep.Cell, out: Path) -> Path:
    """The folder of a cell's finished run."""
    return out / "runs" / "cells" / cell.name

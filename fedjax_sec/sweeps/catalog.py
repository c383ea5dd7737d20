"""Which runs a folder holds, and the labels of cells, whose folders' names have lost letters."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fedjax_sec.core import ConfigError, files
from fedjax_sec.runs import results
from fedjax_sec.sweeps.grid import Cell

#: The folder of a sweep's runs, and the file with their labels.
CELLS, FILE = "cells", "cells.json"


class Place(NamedTuple):
    """A run's folder. `path` is its name below the sweep's cells, empty of a single run."""

    path: str
    labels: dict[str, str]
    seed: int
    folder: results.RunFolder

    @property
    def name(self) -> str:
        """The name of the run, for people."""
        return self.path or self.folder.path.name


def located(out: str | Path) -> tuple[Path, str]:
    """(folder, `run` or `sweep`) of what a folder holds; a paper's are its runs.

    Raises: `ConfigError` for a folder that holds neither a run nor a sweep.
    """
    out = Path(out).absolute()
    kind = results.RunFolder(out).mark().kind
    of_paper = kind == "other" or kind.startswith(results.PAPER)  # older ones have no mark
    if of_paper and results.read_mark(out / "runs").kind == "sweep":
        out, kind = out / "runs", "sweep"
    if kind == "free":
        raise ConfigError(f"Folder {str(out)!r} does not exist or is empty: nothing was run in it.")
    if kind == "other" or kind.startswith(results.PAPER):
        raise ConfigError(f"Folder {str(out)!r} holds neither a run nor a sweep.")
    return out, "sweep" if kind == "sweep" else "run"


def places(out: str | Path) -> list[Place]:
    """All runs of a folder, in the order of a sweep's cells; reads no configuration as a whole.

    A cell whose labels were not written down has one, `cell`, from its folder's name.

    Raises: `ConfigError` for a folder that holds neither a run nor a sweep.
    """
    out, kind = located(out)
    if kind == "run":
        return [Place("", {}, _seed(out / results.CONFIG), results.RunFolder(out))]
    known = read(out)
    there = {path.relative_to(out / CELLS).as_posix() for path in (out / CELLS).glob("*/seed*/")}
    names = [name for name in known if name in there] + sorted(there - known.keys())
    return [
        Place(
            name,
            known.get(name, {"cell": name.partition("/")[0]}),
            int(name.rpartition("/seed")[2]),
            results.RunFolder(out / CELLS / name),
        )
        for name in names
    ]


def _seed(path: Path) -> int:
    """`seed` of a resolved configuration."""
    known = re.search(r"^seed: (\d+)$", path.read_text(), flags=re.MULTILINE)
    if known is None:
        raise ConfigError(f"{str(path)!r} names no seed.")
    return int(known[1])


def add(out: Path, cells: Sequence[Cell]) -> None:
    """Adds the labels of cells to those that are known; nobody else may be adding."""
    known = read(out)
    labels = known | {cell.name: cell.labels for cell in cells}
    if labels != known:
        files.write_json(out / FILE, {"cells": labels})


def read(out: Path) -> dict[str, dict[str, str]]:
    """Cell name -> axis -> label; empty where an earlier version made the folder.

    Raises: `ConfigError` for a file that is damaged.
    """
    path = out / FILE
    if not path.exists():
        return {}
    try:
        return files.read_json(path)["cells"]
    except (ConfigError, KeyError) as error:
        said = str(error) if isinstance(error, ConfigError) else f"{str(path)!r} names no cells."
        raise ConfigError(f"{said} Remove it, and start the sweep again.") from None

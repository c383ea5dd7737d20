"""Papers, one module each: rows, quantities and titles, for the engine in `report/paper.py`.

Beside a module lie its published numbers (`NAME.csv`) and its scales (`NAME.yaml`).
"""

import importlib
import json
import os
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedjax_sec import core, progress, sweeps
from fedjax_sec.report import paper as engine
from fedjax_sec.report.paper import Paper
from fedjax_sec.runs.config import Experiment


def names() -> list[str]:
    """The papers that there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(name: str) -> Paper:
    """A paper by its name. Raises: `ConfigError` with the nearest name for one that is not there.

    >>> find("alie").title
    'A Little Is Enough'
    """
    if name not in (known := names()):
        raise core.ConfigError(
            f"{name!r} is no paper; there are {', '.join(known)}.{core.suggestion(name, known)}"
        )
    return importlib.import_module(f"{__name__}.{name}").PAPER


def regenerate(
    name: str,
    items: str | Sequence[str],
    out: str | os.PathLike,
    *,
    scale: str = "paper",
    seeds: int | None = None,
    changes: Mapping[str, Any] | None = None,
    only: Sequence[str] = (),
    **options,
) -> list[Path]:
    """Runs what is missing and writes a paper's tables and figures, as `fedjax-sec paper`.

    Args:
      name: the paper's, of `names()`.
      items: a table or figure, several, or `"all"`.
      out: folder for them; the runs lie in `out/runs/cells/`, and finished ones are kept.
      scale: `smoke`, `small` or `paper`.
      seeds: of every row (None: the paper's own number).
      changes: dotted keys that every row's experiment gets, as `--set`.
      only: labels of rows, `*` for any text (none: all).
      **options: the paper's own, such as `dataset`.

    Returns: the files written. In a notebook the progress stands below the cell.

    Raises: `ConfigError` (a `ValueError`) for names that the paper does not have, and for a folder
    that holds something else.
    """
    paper = find(name)
    plan = _plan(paper, scale, seeds, changes, only, options)

    def run(cells, folder):
        if not progress.in_notebook():
            return sweeps.run_cells(cells, folder)
        with progress.choose() as display:
            watch = progress.OfSweep(display, cells, sweeps.unfinished(cells, folder), folder)
            return sweeps.run_cells(cells, folder, on_group=watch.on_group, on_wait=watch.on_wait)

    return engine.regenerate(paper, plan, _items(paper, items), Path(out).absolute(), run=run)


def experiments(
    name: str,
    item: str,
    *,
    scale: str = "paper",
    changes: Mapping[str, Any] | None = None,
    only: Sequence[str] = (),
    **options,
) -> dict[str, Experiment]:
    """The experiments behind a table or figure at seed 0, by row, to start one's own from.

    Arguments are those of `regenerate`. A label is `ROW / COLUMN` where the table has columns.

    >>> rows = experiments("alie", "table1", dataset="mnist", scale="small")
    >>> list(rows), rows["1.5"].rounds, rows["1.5"].threat.num_malicious
    (['0', '0.5', '1', '1.5'], 150, 51)
    """
    paper = find(name)
    plan = _plan(paper, scale, 1, changes, only, options)
    made = {}
    for sheet in engine.make_cells(paper, plan, [item]):
        for planned in sheet.rows:
            place = (sheet.part.suffix.strip("-_"), planned.row.label, planned.row.x)
            made[" / ".join(filter(None, place))] = planned.cells[0].experiment
    return made


def _plan(paper: Paper, scale, seeds, changes, only, options) -> engine.Plan:
    texts = [f"{key}={json.dumps(value)}" for key, value in (changes or {}).items()]
    only = (only,) if isinstance(only, str) else only
    return paper.plan(scale, seeds, texts, only, **options)


def _items(paper: Paper, items: str | Sequence[str]) -> list[str]:
    items = [items] if isinstance(items, str) else list(items)
    return list(paper.items) if "all" in items else items

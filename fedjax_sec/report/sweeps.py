"""The files that a finished sweep leaves beside its runs: tables and a figure."""

from collections.abc import Sequence
from pathlib import Path

from fedjax_sec.core.registry import headline_in
from fedjax_sec.report import plotting, tables
from fedjax_sec.runs.experiment import Result
from fedjax_sec.sweeps.grid import Cell


def write(cells: Sequence[Cell], results: Sequence[Result], out: Path, title: str = "") -> Path:
    """Writes `runs.csv`, `table.csv`, `table.md` and the headline's figure (PNG, PDF) into `out`.

    Where every run measures a backdoor, its success over rounds is a second figure. `title` is the
    figures'; the data and the number of seeds stand below it. Returns: the headline's figure.
    """
    frame, axes = tables.to_frame(cells, results), tables.axes_of(cells)
    frame.to_csv(out / "runs.csv", index=False)
    tables.summarized(frame, axes).to_csv(out / "table.csv", index=False)
    written = tables.tables(cells, results).values()
    texts = [f"### {head}\n\n{said}\n\n{table.to_markdown()}\n" for head, said, table in written]
    (out / "table.md").write_text("\n".join(texts))
    groups: dict = {}
    axis, *others = cells[0].labels or [""]
    for cell, result in zip(cells, results, strict=True):
        first, *rest = cell.parts
        # The labels of a single axis are lines of one panel.
        panel, line = (first, " / ".join(rest)) if others else (axis, first)
        groups.setdefault(panel, {}).setdefault(line, []).append(result)
    lines = [f"{tables.data_of(results)}; {plotting.band_of(frame['seed'].nunique())}"]
    lines = [title, *lines] if title else lines
    headline = headline_in(results[0].summary["final"])
    if all(plotting.SUCCESS in result.metrics for result in results):
        plotting.grid_of_curves(groups, lines, out / plotting.SUCCESS, plotting.SUCCESS)
    return plotting.grid_of_curves(groups, lines, out / headline, headline)[0]

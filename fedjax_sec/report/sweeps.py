"""The files that a finished sweep leaves beside its runs: tables and figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from fedjax_sec.core.registry import headline_in
from fedjax_sec.report import plotting, sweep_figures, tables
from fedjax_sec.runs.experiment import Result
from fedjax_sec.sweeps.grid import Cell, named


def write(cells: Sequence[Cell], results: Sequence[Result], out: Path, title: str = "") -> Path:
    """Writes `runs.csv`, `table.csv`, `table.md` and figures (PNG, PDF) into `out`.

    Figures of the headline: over rounds, as heat maps of two axes, and over each numeric axis.
    Where runs measure a backdoor, its success stands beside the headline over rounds, and has a
    heat map. `title` is the figures'; the data and the number of seeds stand below it.

    Returns: the headline's figure over rounds.
    """
    frame, axes = tables.to_frame(cells, results), tables.axes_of(cells)
    frame.to_csv(out / "runs.csv", index=False)
    tables.summarized(frame, axes).to_csv(out / "table.csv", index=False)
    written = tables.tables(cells, results).values()
    texts = [f"### {head}\n\n{said}\n\n{table.to_markdown()}\n" for head, said, table in written]
    (out / "table.md").write_text("\n".join(texts))
    groups, seeds = grouped(cells, results), frame["seed"].nunique()
    data, headline = tables.data_of(results), headline_in(results[0].summary["final"])
    head = [title] if title else []
    over = [*head, f"{data}; {plotting.band_of(seeds)}"]
    spread = "one seed" if seeds == 1 else f"mean over {seeds} seeds ± one standard deviation"
    last = [*head, f"{data}; after the last round, {spread}"]
    sweep_figures.heat_maps(cells, results, headline, last, out / f"{headline}_heat_map")
    sweep_figures.over_axes(cells, results, headline, over, out)
    backdoors = measuring(groups, plotting.SUCCESS)
    if backdoors:
        plotting.grid_of_curves(backdoors, over, out / plotting.SUCCESS, headline, plotting.SUCCESS)
        name = f"{plotting.SUCCESS}_heat_map"
        sweep_figures.heat_maps(cells, results, plotting.SUCCESS, last, out / name)
    return plotting.grid_of_curves(groups, over, out / headline, headline)[0]


def grouped(cells: Sequence[Cell], results: Sequence[Result]) -> dict[str, dict[str, list[Result]]]:
    """panel -> line -> results: the first axis' labels are panels, those of a single one lines.

    A number has its axis before it: `attack.z = 0.5` as a panel, `z = 0.5` as a line.
    """
    groups: dict = {}
    for cell, result in zip(cells, results, strict=True):
        axis, *others = cell.labels or [""]
        first, *rest = cell.parts
        panel, line = (axis, first)
        if others:
            panel, line = named(axis, cell.labels[axis], whole=True), " / ".join(rest)
        groups.setdefault(panel, {}).setdefault(line, []).append(result)
    return groups


def measuring(
    groups: Mapping[str, Mapping[str, list[Result]]], metric: str
) -> dict[str, dict[str, list[Result]]]:
    """The panels and lines all of whose runs have a metric."""
    kept = {
        panel: {
            line: some for line, some in lines.items() if all(metric in r.metrics for r in some)
        }
        for panel, lines in groups.items()
    }
    return {panel: lines for panel, lines in kept.items() if lines}

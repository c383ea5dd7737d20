"""Writers of a paper's items: tables beside published numbers, curves, figures.

A writer is called with a `Report` and gives the files that it wrote. What `--set` changed is added
to every caption here.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedjax_sec.report import plotting
from fedjax_sec.report.paper import Entry, Report
from fedjax_sec.runs.experiment import Result


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


def numbers(
    title: str, values: np.ndarray | None, published: float | None, difference: bool = False
) -> dict:
    """A quantity's columns: the published number, our mean, spread over seeds, and difference.

    `values` has a number a seed; None was not measured.

    >>> numbers("error", np.array([1.0, 3.0]), 1.5, difference=True)["error: difference"]
    np.float64(0.5)
    """
    mean = None if values is None else values.mean()
    columns = {f"{title}: paper": published, f"{title}: ours": mean}
    if values is not None and len(values) > 1:
        columns[f"{title}: spread"] = values.std(ddof=1)
    if difference:
        missing = published is None or mean is None
        columns[f"{title}: difference"] = None if missing else mean - published
    return columns


# --- Tables -------------------------------------------------------------------------------------


def write_table(
    frame: pd.DataFrame, head: str, path: Path, *, digits: int = 2, shown: int = 1
) -> list[Path]:
    """Writes a table as Markdown below `head`, with `shown` digits, and as CSV with `digits`."""
    frame.to_csv(path.with_suffix(".csv"), index=False, float_format=f"%.{digits}f")
    filled = frame.astype(object).where(frame.notna(), None)  # an empty field, not `nan`
    text = filled.to_markdown(index=False, floatfmt=f".{shown}f", missingval="")
    path.with_suffix(".md").write_text(f"{head}\n\n{text}\n")
    return [path.with_suffix(".md"), path.with_suffix(".csv")]


@dataclasses.dataclass(frozen=True)
class Table:
    """Writes a row a line: each quantity beside its published number.

    Attributes:
      index: headings of the columns that name a row, for those of row, column and x that it has.
      measure: a report and one of its entries -> title -> a number for each seed, None where not
        measured, or one number that makes a column by itself.
      caption: a report -> the text below the heading.
      difference: whether the difference from the published number has a column.
    """

    index: tuple[str, ...]
    measure: Callable[[Report, Entry], Mapping[str, np.ndarray | float | None]]
    caption: Callable[[Report], str]
    difference: bool = False
    digits: int = 2
    shown: int = 1

    def __call__(self, report: Report) -> list[Path]:
        """Writes `PATH.md` and `PATH.csv`."""
        lines, titles = [], {}
        for entry in report.entries:
            names = filter(None, (entry.row.row, entry.row.column, entry.row.x))
            line = dict(zip(self.index, names, strict=True))
            for title, values in self.measure(report, entry).items():
                known = report.published.get((entry.row.row, entry.row.column, title))
                columns = {title: values}
                if values is None or isinstance(values, np.ndarray):
                    columns = numbers(title, values, known, self.difference)
                    if not report.published:
                        del columns[f"{title}: paper"]
                line |= columns
                titles.setdefault(title, {}).update(columns)
            if failed := diverged(entry.results):
                line["diverged"] = failed
            lines.append(line)
        ends = ("", ": paper", ": ours", ": spread", ": difference")
        order = [f"{one}{end}" for one in titles for end in ends if f"{one}{end}" in titles[one]]
        last = ["diverged"] if any("diverged" in line for line in lines) else []
        frame = pd.DataFrame(lines, columns=[*self.index, *order, *last])
        head = f"# {report.heading}\n\n{self.caption(report)}{report.note}"
        return write_table(frame, head, report.path, digits=self.digits, shown=self.shown)


@dataclasses.dataclass(frozen=True)
class Grid:
    """Writes rows x columns: cells `paper` and `ours` in Markdown, and a line a cell in CSV.

    Attributes:
      index: headings of a row's and a column's name.
      columns: the columns in order.
      measure: results, and an evaluation (None: each run's best) -> metric -> a number each seed.
      metrics: the metrics that a cell shows, separated by slashes.
      caption: a report -> the text below the heading.
    """

    index: tuple[str, str]
    columns: tuple[str, ...]
    measure: Callable[[Sequence[Result], int | None], Mapping[str, np.ndarray]]
    metrics: tuple[str, ...]
    caption: Callable[[Report], str]

    def __call__(self, report: Report) -> list[Path]:
        """Writes `PATH.md` and `PATH.csv`."""
        shown: dict[str, dict] = {}
        lines = []
        for (name, _, column, *_), results, _ in report.entries:
            last, best = self.measure(results, -1), self.measure(results, None)
            known = {metric: report.published.get((name, column, metric)) for metric in last}
            theirs = [report.published.get((name, column, metric)) for metric in self.metrics]
            shown.setdefault(name, {self.index[0]: name})
            shown[name] |= {
                f"{column}: paper": " / ".join(f"{one:.2f}" for one in theirs if one is not None),
                f"{column}: ours": self._cell(last, results),
            }
            line = dict(zip(self.index, (name, column), strict=True))
            for metric, values in last.items():
                line |= {f"{metric}: mean": values.mean(), f"{metric}: best": best[metric].mean()}
                line[f"{metric}: paper"] = known[metric]
                if len(values) > 1:
                    line[f"{metric}: spread"] = values.std(ddof=1)
            if failed := diverged(results):
                line["diverged"] = failed
            lines.append(line)
        path = report.path.with_suffix(".csv")
        pd.DataFrame(lines).to_csv(path, index=False, float_format="%.4f")
        order = [f"{column}: {whose}" for column in self.columns for whose in ("paper", "ours")]
        frame = pd.DataFrame(shown.values(), columns=[self.index[0], *order]).replace("", None)
        frame = frame.dropna(axis=1, how="all").fillna("")
        text = frame.to_markdown(index=False, disable_numparse=True)
        markdown = path.with_suffix(".md")
        head = f"# {report.heading}\n\n{self.caption(report)}{report.note}"
        markdown.write_text(f"{head}\n\n{text}\n")
        return [markdown, path]

    def _cell(self, values: Mapping[str, np.ndarray], results: Sequence[Result]) -> str:
        """`0.03 ± 0.01`, several metrics with a slash; says how many seeds diverged."""
        parts = []
        for metric in self.metrics:
            if metric in values:
                many = len(values[metric]) > 1
                spread = f" ± {values[metric].std(ddof=1):.2f}" if many else ""
                parts.append(f"{values[metric].mean():.2f}{spread}")
        failed = diverged(results)
        return " / ".join(parts) + (f" ({failed} diverged)" if failed else "")


# --- Figures ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Figure:
    """Draws a figure: `draw(report)` gives it and its caption, which ends without a full stop."""

    draw: Callable[[Report], tuple[Any, str]]
    size: float = 9

    def __call__(self, report: Report) -> list[Path]:
        """Writes `PATH.png` and `PATH.pdf`."""
        figure, caption = self.draw(report)
        plotting.titled(figure, f"{caption}.{report.note}", size=self.size)
        return plotting.save(figure, report.path)


#: Up to this many percent the axis ends above the highest curve: up to 100 they would be one line.
LOW = 25


@dataclasses.dataclass(frozen=True)
class Curves:
    """Draws metrics over rounds, in percent, panels side by side.

    Attributes:
      panels: a report -> panel's title -> line's label -> (results, metric).
      caption: a report -> the title, without what a line is and the full stop.
      ylabel: of the first panel.
      width, height: inches a panel.
      title_size: points of a panel's title.
    """

    panels: Callable[[Report], Mapping[str, Mapping[str, tuple[Sequence[Result], str]]]]
    caption: Callable[[Report], str]
    ylabel: str = "test examples (%)"
    width: float = 3.4
    height: float = 3.3
    title_size: float = 9

    def __call__(self, report: Report) -> list[Path]:
        """Writes `PATH.png` and `PATH.pdf`."""
        return Figure(self._draw)(report)

    def _draw(self, report: Report):
        panels = self.panels(report)
        figure, axes = plotting.subplots(
            1,
            len(panels),
            figsize=(self.width * len(panels), self.height),
            squeeze=False,
            sharey=True,
            layout="constrained",
        )
        for panel, (title, lines) in zip(axes[0], panels.items(), strict=True):
            for label, (results, metric) in lines.items():
                plotting.curves(panel, {label: results}, metric)
            panel.set(title=title.replace(", ", ",\n"), xlabel="round")
            panel.title.set_size(self.title_size)
            panel.grid(alpha=0.3)
        highest = max(panel.dataLim.ymax for panel in axes[0])
        top = 100 if highest > LOW else max(1.1 * highest, 1)
        axes[0, 0].set(ylabel=self.ylabel, ylim=(-top / 100, 1.01 * top))  # shared by all panels
        plotting.legend_below(figure)
        return figure, f"{self.caption(report)}; {plotting.band_of(report.plan.seeds)}"


@dataclasses.dataclass(frozen=True)
class Points:
    """Draws metrics over a setting, and writes them down: a panel a row, a line a column.

    Attributes:
      index: headings of a row's, a column's and x's name in the CSV file.
      columns: all columns, whose order gives their colours.
      measure: results -> metric -> a number for each seed.
      styles: a row's name -> metric -> its line's style; the first metric has the label.
      caption: a report -> the title, without the full stop.
      ticks: where x is logarithmic, its ticks.
    """

    index: tuple[str, str, str]
    columns: tuple[str, ...]
    measure: Callable[[Sequence[Result]], Mapping[str, np.ndarray]]
    styles: Callable[[str], Mapping[str, str]]
    caption: Callable[[Report], str]
    xlabel: str
    ylabel: str
    ylim: tuple[float, float] = (-0.02, 1.02)
    ticks: tuple[float, ...] = ()
    width: float = 3.6
    height: float = 3.3

    def __call__(self, report: Report) -> list[Path]:
        """Writes `PATH.png`, `PATH.pdf` and `PATH.csv`."""
        pictures = Figure(self._draw)(report)
        lines = []
        for (name, _, column, x, *_), results, _ in report.entries:
            line: dict = dict(zip(self.index, (name, column, float(x)), strict=True))
            for metric, values in self.measure(results).items():
                line[metric] = values.mean()
                if len(values) > 1:
                    line[f"{metric}: spread"] = values.std(ddof=1)
            if failed := diverged(results):
                line["diverged"] = failed
            lines.append(line)
        frame = pd.DataFrame(lines)
        if not frame[self.index[0]].any():  # one panel without a name
            del frame[self.index[0]]
        path = report.path.with_suffix(".csv")
        frame.to_csv(path, index=False, float_format="%.4g")
        return [*pictures, path]

    def _draw(self, report: Report):
        panels = list(dict.fromkeys(entry.row.row for entry in report.entries))
        figure, axes = plotting.subplots(
            1,
            len(panels),
            figsize=(self.width * len(panels), self.height),
            squeeze=False,
            sharey=True,
            layout="constrained",
        )
        for panel, name in zip(axes[0], panels, strict=True):
            for column in self.columns:
                points = {
                    float(entry.row.x): entry.results
                    for entry in report.entries
                    if (entry.row.row, entry.row.column) == (name, column)
                }
                self._draw_lines(panel, name, column, points)
            panel.set(title=name, xlabel=self.xlabel, ylim=self.ylim)
            panel.grid(alpha=0.3)
            if self.ticks:
                panel.set_xscale("log")
                panel.set_xticks(self.ticks, labels=self.ticks)
                panel.minorticks_off()
        axes[0, 0].set_ylabel(self.ylabel)
        plotting.legend_below(figure)
        return figure, self.caption(report)

    def _draw_lines(self, panel, name: str, column: str, points: Mapping) -> None:
        """One column's lines over x, a line a metric that was measured."""
        measured = {x: self.measure(results) for x, results in points.items()}
        color = f"C{self.columns.index(column)}"
        for number, (metric, style) in enumerate(self.styles(name).items()):
            values = {x: each[metric] for x, each in measured.items() if metric in each}
            if not values:
                continue
            stacked = np.stack(list(values.values()), axis=1)
            label = None if number else column
            (line,) = panel.plot(
                list(values), stacked.mean(0), style, color=color, label=label, ms=4
            )
            if len(stacked) > 1:
                plotting.spread_of(panel, list(values), stacked, line)
            for x, each in values.items():
                if diverged(points[x]):
                    plotting.crosses(panel, x, each.mean(), color)

"""`plot_curves` and `plot_heatmap`: results drawn into matplotlib's axes, for notebooks and papers.

matplotlib is imported when something is drawn. Without `ax` the figure is known to nobody else, as
all figures of ours; `ax.figure.savefig` writes it, and a notebook shows `ax.figure`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedjax_sec.core import ConfigError
from fedjax_sec.core.advice import shown, suggestion
from fedjax_sec.core.registry import headline_in
from fedjax_sec.report import plotting, sweep_figures
from fedjax_sec.report.measures import is_share
from fedjax_sec.runs.experiment import Result

#: Lines of a column of a legend.
LEGEND = 30


def plot_curves(results: Any, metric: str | None = None, *, ax: Any = None) -> Any:
    """Draws a share, such as the test accuracy, in percent over the rounds: one line a label.

    Args:
      results: what `run`, `sweep` or `arena` returns; a list of results, which are the seeds of one
        line; or a mapping of labels to a result or such a list. The cells of a sweep are lines.
      metric: a share that all runs measure (None: the task's headline).
      ax: matplotlib's axes to draw into (None: those of a new figure).

    Returns: the axes, without a legend where there is one line. A line is the mean over its seeds
    with a band of ± one standard deviation (ddof 1).

    Raises: `ConfigError` (a `ValueError`) for a metric that a run lacks or that is no share, and
    for runs of one line with other rounds.

    >>> from fedjax_sec import api
    >>> result = api.run({"rounds": 2})
    >>> ax = plot_curves({"mean": result}, "accuracy")
    >>> ax.get_xlabel(), ax.get_ylabel(), len(ax.lines)
    ('round', 'test accuracy (%)', 1)
    """
    lines = _lines(results)
    first = next(iter(lines.values()))[0]
    metric = headline_in(first.metrics) if metric is None else metric
    for label, some in lines.items():
        for one in some:
            _check_metric(metric, _numbers(one), label)
        if any(not np.array_equal(one.metrics["round"], some[0].metrics["round"]) for one in some):
            raise ConfigError(f"results: the runs of {label!r} are measured at different rounds.")
    if not is_share(metric):
        raise ConfigError(f"metric: {metric!r} is no share that can be drawn in percent.")
    if ax is None:
        columns, words = -(-len(lines) // LEGEND), max(map(len, lines))
        beside = columns * (0.085 * words + 0.7) if len(lines) > 1 else 0
        ax = _axes((6.4 + beside, max(4.4, 0.21 * min(len(lines), LEGEND))))
    plotting.curves(ax, lines, metric)
    ax.set(xlabel="round", ylabel=plotting.measured(metric), ylim=plotting.PERCENT)
    ax.grid(alpha=0.3)
    if len(lines) > 1:
        _legend_beside(ax)
    return ax


def plot_heatmap(
    results: Any,
    metric: str | None = None,
    *,
    rows: str | None = None,
    columns: str | None = None,
    ax: Any = None,
) -> Any:
    """Draws a metric after the last round as a heat map of two axes of a sweep or an arena.

    Args:
      results: what `sweep` or `arena` returns.
      metric: one number an evaluation (None: the task's headline); shares are drawn in percent.
      rows, columns: axes of the sweep (None: attack and defence, else its first ones). A field is
        the mean over the seeds and over all other axes.
      ax: matplotlib's axes to draw into (None: those of a new figure).

    Returns: the axes. Where attacks are the rows, a last one holds each column's worst value.

    Raises: `ConfigError` (a `ValueError`) for an axis or metric that is not there, and for a sweep
    with fewer than two axes of more than one label.

    >>> import tempfile
    >>> from fedjax_sec import api
    >>> grid = {"defense": ["mean", "median"], "client.l2": [0.0, 0.1]}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     done = api.sweep({"experiment": {"rounds": 1}, "grid": grid}, out=folder)
    >>> ax = plot_heatmap(done, rows="client.l2", columns="defense")
    >>> [label.get_text() for label in ax.get_xticklabels()], ax.get_ylabel()
    (['mean', 'median'], 'client.l2')
    """
    cells, runs = _sweep(results)
    axes = sweep_figures.axes_of(cells)
    if len(axes) < 2:
        raise ConfigError(
            f"A heat map needs two axes with more than one label each; this sweep has "
            f"{', '.join(axes) or 'none'}."
        )
    given = [name for name in (rows, columns) if name is not None]
    for name, value in (("rows", rows), ("columns", columns)):
        if value is not None and value not in axes:
            known = f"{suggestion(str(value), axes)} The axes are {', '.join(axes)}."
            raise ConfigError(f"{name}: there is no axis {shown(value)}.{known}")
    if len(set(given)) < len(given):
        raise ConfigError(f"rows and columns must differ, got {rows!r} twice.")
    left = [name for name in sweep_figures.in_order(axes) if name not in given]
    rows = left.pop(0) if rows is None else rows
    columns = left.pop(0) if columns is None else columns
    metric = headline_in(runs[0].metrics) if metric is None else metric
    _check_metric(metric, {name for one in runs for name in _numbers(one)}, "the sweep")
    panel = sweep_figures.panel_of(cells, runs, rows, columns, metric)
    title = plotting.measured(metric) if is_share(metric) else metric
    others = [name for name in axes if name not in (rows, columns)]
    if others:
        title += f", mean over {', '.join(others)}"
    ax = _axes(plotting.heat_size([panel])) if ax is None else ax
    plotting.heat_map(ax.figure, ax, panel._replace(title=title))
    ax.set(xlabel=columns, ylabel=rows)
    return ax


def _axes(size: tuple[float, float]):
    return plotting.subplots(figsize=size, layout="constrained")[1]


def _legend_beside(ax) -> None:
    """A legend to the right of the axes, where it covers no data and no label."""
    labels = ax.get_legend_handles_labels()[1]
    ax.legend(
        loc="upper left",
        bbox_to_anchor=(1.02, 1.0),
        ncols=-(-len(labels) // LEGEND),
        fontsize=9,
        frameon=False,
    )


def _sweep(results: Any) -> tuple[list, list[Result]]:
    """The cells and results of what `sweep` or `arena` returned."""
    arena = getattr(results, "arena", None)
    cells = getattr(results if arena is None else arena, "cells", None)
    if cells is None:
        raise ConfigError(f"results must be what sweep or arena returns, got {shown(results)}.")
    return list(cells), list(results.results)


def _lines(results: Any) -> dict[str, list[Result]]:
    """label -> results, of everything that `plot_curves` takes."""
    if isinstance(results, Result):
        return {headline_in(results.metrics).replace("_", " "): [results]}
    if hasattr(results, "results"):
        lines: dict[str, list[Result]] = {}
        for cell, one in zip(*_sweep(results), strict=True):
            lines.setdefault(cell.title, []).append(one)
        return lines
    if isinstance(results, Mapping):
        given = {str(label): one for label, one in results.items()}
    else:
        given = {"": results}
    lines = {
        label: [one] if isinstance(one, Result) else list(one) if _listed(one) else []
        for label, one in given.items()
    }
    if not lines or any(not some or not isinstance(some[0], Result) for some in lines.values()):
        raise ConfigError(
            f"results must be of run, sweep or arena, a list of results, or a mapping of labels to "
            f"them, got {shown(results)}."
        )
    return lines


def _listed(value: Any) -> bool:
    return isinstance(value, Sequence) and all(isinstance(one, Result) for one in value)


def _numbers(result: Result) -> set[str]:
    """The metrics that are one number an evaluation."""
    return {name for name, values in result.metrics.items() if values.ndim == 1}


def _check_metric(metric: Any, known, where: str) -> None:
    if metric not in known:
        names = sorted(name for name in known if name != "round")
        raise ConfigError(
            f"metric: {shown(metric)} is not measured in {where or 'these runs'}."
            f"{suggestion(str(metric), names)} Known: {', '.join(names)}."
        )

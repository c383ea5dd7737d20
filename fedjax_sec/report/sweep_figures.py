"""Figures of a sweep beside its curves: heat maps of two axes, and metrics over a numeric axis."""

import itertools
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fedjax_sec.report import plotting
from fedjax_sec.report.measures import is_share, lowest_is_worst
from fedjax_sec.runs.experiment import Result
from fedjax_sec.sweeps.grid import Cell, is_number, named

#: Panels of a figure; of more a page of the sweep is the better picture (`fedjax-sec report`).
PANELS = 12
#: The label of a row of each column's worst value.
WORST = "worst attack"


def axes_of(cells: Sequence[Cell]) -> dict[str, list[str]]:
    """axis -> its labels in the order of the cells, of axes with more than one.

    >>> from fedjax_sec.sweeps import make_cells
    >>> axes_of(make_cells({}, {"defense": ["mean", "median"], "rounds": [5]}))
    {'defense': ['mean', 'median']}
    """
    names = list(cells[0].labels)
    axes = {name: list(dict.fromkeys(cell.labels[name] for cell in cells)) for name in names}
    return {name: labels for name, labels in axes.items() if len(labels) > 1}


def in_order(axes: Mapping[str, Sequence[str]]) -> list[str]:
    """The axes in the order in which they become rows, then columns: attack and defence first.

    >>> in_order({"client.l2": [], "defense": [], "attack": []})
    ['attack', 'defense', 'client.l2']
    """
    return sorted(axes, key=lambda name: ("attack", "defense", name).index(name))


def panel_of(
    cells: Sequence[Cell],
    results: Sequence[Result],
    rows: str,
    columns: str,
    metric: str,
    title: str = "",
    alone: bool = False,
) -> plotting.Panel:
    """A heat map's numbers after the last round: the mean over all runs of a field.

    With `alone` a number among the labels has its axis before it. Where attacks are the rows, a
    last one holds each column's worst value under an attack.
    """
    known = {axis: list(dict.fromkeys(c.labels[axis] for c in cells)) for axis in (rows, columns)}
    scale = 100.0 if is_share(metric) else 1.0
    values = np.full((len(known[rows]), len(known[columns])), np.nan)
    notes, attacked = np.full(values.shape, "", object), np.zeros(len(values), bool)
    groups: dict[tuple[int, int], list[Result]] = {}
    for cell, result in zip(cells, results, strict=True):
        place = tuple(known[axis].index(cell.labels[axis]) for axis in (rows, columns))
        groups.setdefault(place, []).append(result)
        attacked[place[0]] |= bool(cell.experiment.attack.stages)
    for place, some in groups.items():
        numbers = [one.metrics[metric][-1] for one in some if metric in one.metrics]
        given = scale * np.array([number for number in numbers if np.isfinite(number)])
        values[place] = given.mean() if given.size else np.nan
        if any(one.summary.get("diverged") for one in some):
            notes[place] = "diverged"
        elif given.size > 1:
            notes[place] = f"± {given.std(ddof=1):.1f}"
        elif not given.size:
            notes[place] = "not measured"
    labels, breaks = [named(rows, one, whole=True) if alone else one for one in known[rows]], ()
    if rows == "attack" and attacked.sum() > 1:
        values, notes = _with_worst(values, notes, attacked, known[rows], metric)
        labels, breaks = [*labels, WORST], (len(labels),)
    across = [named(columns, one, whole=True) if alone else one for one in known[columns]]
    finite = values[np.isfinite(values)]
    limits = (0.0, 100.0) if scale == 100 else (finite.min(initial=0), finite.max(initial=0) or 1.0)
    return plotting.Panel(
        title,
        [textwrap.fill(label, 28, break_long_words=False) for label in labels],
        [textwrap.fill(label, 20, break_long_words=False) for label in across],
        values,
        notes,
        limits,
        "viridis" if lowest_is_worst(metric) else "magma_r",
        breaks,
    )


def _with_worst(values, notes, attacked, labels, metric):
    """The row of each column's worst value among the attacked rows, and whose it is."""
    bad = np.inf if lowest_is_worst(metric) else -np.inf
    under = np.where(np.isnan(values) | ~attacked[:, None], bad, values)
    at = under.argmin(axis=0) if lowest_is_worst(metric) else under.argmax(axis=0)
    ends = under[at, range(values.shape[1])]
    names = np.array([textwrap.shorten(labels[i], 18, placeholder="...") for i in at], object)
    known = np.isfinite(ends)
    return (
        np.vstack([values, np.where(known, ends, np.nan)]),
        np.vstack([notes, np.where(known, names, "")]),
    )


def heat_maps(
    cells: Sequence[Cell], results: Sequence[Result], metric: str, lines: Sequence[str], path: Path
) -> list[Path]:
    """Writes heat maps of two axes, one for each combination of the others' labels.

    Returns: PNG and PDF; nothing where there are fewer than two axes or more than `PANELS` panels.
    """
    axes = axes_of(cells)
    if len(axes) < 2:
        return []
    rows, columns, *others = in_order(axes)
    groups = _split(cells, results, others)
    if len(groups) > PANELS:
        return []
    said = plotting.measured(metric)
    panels = [
        panel_of(*group, rows, columns, metric, ": ".join(filter(None, (title, said))), alone=True)
        for title, group in groups.items()
    ]
    return plotting.heat_maps(panels, lines, path)


def _split(cells, results, axes: Sequence[str]) -> dict[str, tuple[list[Cell], list[Result]]]:
    """The cells and results by their labels on these axes, in words."""
    groups: dict = {}
    for cell, result in zip(cells, results, strict=True):
        title = ", ".join(named(axis, cell.labels[axis], whole=True) for axis in axes)
        group = groups.setdefault(title, ([], []))
        group[0].append(cell)
        group[1].append(result)
    return groups


# --- Over a numeric axis ------------------------------------------------------------------------


def over_axes(
    cells: Sequence[Cell], results: Sequence[Result], metric: str, lines: Sequence[str], out: Path
) -> list[Path]:
    """Writes `METRIC_over_AXIS.png` and `.pdf` for each axis of three or more numbers.

    One line a defence where they are an axis, else one a label of the last of the other axes; a
    panel for each combination of the rest, of which there may be `PANELS`.
    """
    written, axes = [], axes_of(cells)
    for axis, labels in axes.items():
        if len(labels) < 3 or not all(map(is_number, labels)):
            continue
        others = [name for name in axes if name != axis]
        line = "defense" if "defense" in others else others[-1] if others else ""
        groups = _split(cells, results, [name for name in others if name != line])
        if len(groups) <= PANELS:
            name = re.sub(r"[^A-Za-z0-9]+", "_", axis).strip("_")
            path = out / f"{metric}_over_{name}"
            written += _over_axis(groups, axis, line, metric, lines, path)
    return written


def _over_axis(groups, axis: str, line: str, metric: str, lines, path: Path) -> list[Path]:
    columns = min(len(groups), 3)
    width, height = (4.2, 3.3) if len(groups) > 1 else (7.4, 5.0)
    count = -(-len(groups) // columns)
    figure, panels = plotting.subplots(
        count,
        columns,
        figsize=(width * columns, height * count),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for panel in panels.flat[len(groups) :]:
        panel.set_visible(False)
    for panel, (title, (cells, results)) in zip(panels.flat, groups.items(), strict=False):
        for label, (some, theirs) in _split(cells, results, [line] if line else []).items():
            _draw_over(panel, axis, some, theirs, metric, label or plotting.measured(metric))
        panel.set(title=textwrap.fill(title, 48), xlabel=axis, ylim=plotting.PERCENT)
        panel.title.set_size(10)
        panel.grid(alpha=0.3)
    for row in panels:
        row[0].set_ylabel(plotting.measured(metric))
    plotting.legend_below(figure)
    plotting.titled(figure, *lines)
    return plotting.save(figure, path)


def _draw_over(panel, axis, cells, results, metric, label) -> None:
    """One line: the mean over the seeds at each number, and a band of ± one standard deviation."""
    points: dict[float, list[Result]] = {}
    for cell, result in zip(cells, results, strict=True):
        points.setdefault(float(cell.labels[axis]), []).append(result)
    points = dict(sorted(points.items()))
    numbers = {x: [one.metrics[metric][-1] for one in some] for x, some in points.items()}
    place = len(panel.get_legend_handles_labels()[1])
    x = list(numbers)
    means = [100 * float(np.mean(some)) for some in numbers.values()]
    style = plotting.look(place, 1)
    (drawn,) = panel.plot(x, means, label=label, linewidth=1.4, **style)
    counts = {len(some) for some in numbers.values()}
    if counts != {1} and len(counts) == 1:
        plotting.spread_of(panel, x, 100 * np.array(list(numbers.values())).T, drawn)
    for at, mean in itertools.compress(
        zip(x, means, strict=True),
        [any(one.summary.get("diverged") for one in some) for some in points.values()],
    ):
        plotting.crosses(panel, at, mean, drawn.get_color())
    if x[0] > 0 and x[-1] / x[0] > 50:
        panel.set_xscale("log")

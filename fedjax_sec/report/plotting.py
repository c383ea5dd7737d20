"""Figures of runs and sweeps.

They are made without pyplot, so the caller's backend, settings and open figures stay as they are.
"""

import functools
import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedjax_sec.core import files
from fedjax_sec.core.optional import require
from fedjax_sec.core.registry import headline_in

#: A backdoor's success, drawn beside the headline where it is measured.
SUCCESS = "attack_success_rate"
#: Okabe and Ito's colours, which the colour-blind tell apart, without yellow: too light on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
#: A line has a dash and a marker beside its colour, so that nothing is lost in grey.
_STYLES = ("-", "--", "-.", ":")
#: The ends of an axis of shares: markers at 0 and at 100 are whole.
PERCENT = (-2, 102)
_MARKERS = ("o", "s", "^", "D", "P", "v", ">")


def subplots(rows: int = 1, columns: int = 1, *, figsize, layout=None, **options):
    """A figure and its axes, as pyplot's function of this name, but known to nobody else."""
    figure = _figure_class()(figsize=figsize, layout=layout)
    return figure, figure.subplots(rows, columns, **options)


@functools.cache
def _figure_class() -> type:
    """Matplotlib's figure, which a notebook shows as a picture without pyplot's help."""

    base = require("matplotlib.figure", "A figure").Figure

    class Figure(base):
        def _repr_png_(self) -> bytes:
            stream = io.BytesIO()
            self.savefig(stream, format="png", dpi=100, bbox_inches="tight")
            return stream.getvalue()

    return Figure


def save(figure, path: Path) -> list[Path]:
    """Writes a figure as PNG and PDF beside each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for suffix in (".png", ".pdf"):
        written.append(path.with_suffix(suffix))
        # No date in the PDF: the same results give the same file.
        metadata = {"CreationDate": None} if suffix == ".pdf" else None
        with files.replacing(written[-1]) as file:
            figure.savefig(file, format=suffix[1:], dpi=150, bbox_inches="tight", metadata=metadata)
    return written


def trigger_pictures(pictures, title: str, path: Path) -> list[Path]:
    """Clean images, stamped ones, their difference, and each client's part: one row an image."""
    columns = [("clean", pictures.clean), ("stamped", pictures.stamped)]
    columns += [("difference", pictures.stamped - pictures.clean)]
    for ranks, images in pictures.parts.items():
        shown = ", ".join(str(rank) for rank in ranks[:3]) + (", ..." if len(ranks) > 3 else "")
        columns.append((f"malicious client {shown}", images))
    rows = len(pictures.clean)
    figure, panels = subplots(
        rows,
        len(columns),
        figsize=(1.8 * len(columns), 1.9 * rows + 0.5),
        squeeze=False,
        layout="constrained",
    )
    for row, (line, label, target) in enumerate(
        zip(panels, pictures.labels, pictures.targets, strict=True)
    ):
        for axes, (name, images) in zip(line, columns, strict=True):
            image = images[row]
            grey = image.shape[-1] == 1
            if name == "difference":  # signed: a coloured image by the mean of its channels
                axes.imshow(image.mean(-1), cmap="RdBu_r", vmin=-1, vmax=1)
            else:
                axes.imshow(image[..., 0] if grey else image, cmap="gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            if row == 0:
                axes.set_title(name, fontsize=9)
        line[0].set_xlabel(f"class {label}", fontsize=9)
        line[1].set_xlabel(f"read as {target}", fontsize=9)
    figure.suptitle(title, fontsize=10)
    return save(figure, path)


class Strip(NamedTuple):
    """A row of images [n, H, W, C] in [0, 1] with a name, and a note below each."""

    name: str
    images: np.ndarray
    notes: Sequence[str]


def strips(rows: Sequence[Strip], title: str, path: Path) -> list[Path]:
    """Rows of small images one above the other, with notes below them."""
    columns = max(len(row.images) for row in rows)
    figure, panels = subplots(
        len(rows),
        columns,
        figsize=(1.15 * columns + 1.2, 1.3 * len(rows) + 0.5),
        squeeze=False,
        layout="constrained",
    )
    for line, row in zip(panels, rows, strict=True):
        for place, axes in enumerate(line):
            axes.set(xticks=[], yticks=[])
            if place >= len(row.images):
                axes.set_axis_off()
                continue
            image = np.clip(row.images[place], 0, 1)
            grey = image.shape[-1] != 3
            axes.imshow(image[..., 0] if grey else image, cmap="gray", vmin=0, vmax=1)
            if place < len(row.notes):
                axes.set_xlabel(row.notes[place], fontsize=7, labelpad=2)
        name = textwrap.fill(row.name.replace("_", " "), 14)
        line[0].set_ylabel(name, fontsize=8, rotation=0, ha="right", va="center")
    figure.suptitle(textwrap.fill(title, 14 * columns + 20), fontsize=9)
    return save(figure, path)


def headline_curve(result, folder: Path) -> list[Path]:
    """The task's headline (and attack success rate) of one run over its rounds."""
    figure, axes = subplots(figsize=(6, 4), layout="constrained")
    headline = headline_in(result.metrics)
    curves(axes, {_words(headline): [result]}, headline)
    if SUCCESS in result.metrics:
        curves(axes, {"attack success rate": [result]}, SUCCESS)
    if start := result.experiment.threat.start:
        axes.axvline(start, color="0.5", linewidth=1, label=f"the attack begins (round {start})")
    axes.set(xlabel="round", ylabel="test examples (%)", ylim=PERCENT)
    axes.set_title(f"{result.summary['data']['label']}, seed {result.experiment.seed}", size=10)
    axes.grid(alpha=0.3)
    legend_below(figure)
    return save(figure, folder / headline)


def _words(metric: str) -> str:
    return metric.replace("_", " ")


def band_of(seeds: int) -> str:
    """Describes a line of `curves`, for titles.

    >>> band_of(1), band_of(3)
    ('one seed', 'mean over 3 seeds, band: ± one standard deviation')
    """
    return "one seed" if seeds == 1 else f"mean over {seeds} seeds, band: ± one standard deviation"


#: The legend of what `crosses` marks.
DIVERGED = "diverged (loss or parameters not finite)"


def curves(axes, lines: Mapping[str, Sequence], metric: str | None = None) -> None:
    """One line a label: the mean over its results, in percent, and a band as wide as `band_of`.

    Without a `metric` it is the headline of the first result's task. Lines that are drawn later
    into the same axes look different from those that are there.

    Lines with a diverged run are faded, with a cross where the loss is not finite any more.
    """
    integer_rounds(axes)
    metric = metric or headline_in(next(iter(lines.values()))[0].metrics)
    there = sum(label != DIVERGED for label in axes.get_legend_handles_labels()[1])
    for place, (label, results) in enumerate(lines.items(), there):
        rounds = results[0].metrics["round"]
        values = 100 * np.stack([result.metrics[metric] for result in results])
        diverged = [result for result in results if result.summary.get("diverged")]
        (line,) = axes.plot(
            rounds,
            values.mean(0),
            label=label,
            linewidth=1.4,
            alpha=0.45 if diverged else 1.0,
            **look(place, len(rounds)),
        )
        if len(results) > 1:
            spread_of(axes, rounds, values, line)
        if diverged:
            at = min(_not_finite_from(result) for result in diverged)
            crosses(axes, rounds[at], values.mean(0)[at], line.get_color())


def integer_rounds(axes) -> None:
    """Ticks at whole numbers of rounds."""
    axes.xaxis.get_major_locator().set_params(integer=True)


def look(place: int, points: int) -> dict:
    """Colour, dash and marker of the line at a place: 28 lines in a row differ in both of two.

    Markers stand at about eight of the points, other ones than on the line before.

    >>> look(0, 3)["linestyle"], look(1, 3)["linestyle"], look(0, 3)["marker"]
    ('-', '--', 'o')
    """
    step = max(1, points // 8)
    return {
        "color": COLOURS[place % len(COLOURS)],
        "linestyle": _STYLES[place % len(_STYLES)],
        "marker": _MARKERS[place % len(_MARKERS)],
        "markersize": 4.5,
        "markevery": (place % step, step),
    }


def influence(axes, result, title: str) -> None:
    """Net influence of the honest clients and the backdoor's loss of one run over its rounds."""
    metrics, loss = result.metrics, axes.twinx()
    axes.axhline(0, color="0.7", linewidth=0.8)
    (left,) = axes.plot(metrics["round"], metrics["net_influence"], "C0", label="influence")
    (right,) = loss.plot(metrics["round"], metrics["backdoor_loss"], "C1--", label="loss")
    axes.set(title=title, xlabel="round")
    axes.set_ylabel("net influence", color="C0")
    loss.set_ylabel("backdoor loss", color="C1")
    loss.set_ylim(bottom=0)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.18), "ncols": 2}  # no data there
    axes.legend([left, right], ["net influence", "backdoor loss"], fontsize=8, **below)


def scatter(axes, x, y, title: str) -> None:
    """One point an entry of `x` and `y` in percent; the title says how many, and how correlated."""
    axes.scatter(x, y, s=9, alpha=0.4)
    known = np.isfinite(x) & np.isfinite(y)
    varies = min(x[known].std(), y[known].std()) > 0
    r = f"{np.corrcoef(x[known], y[known])[0, 1]:.2f}" if varies else "undefined"
    axes.set(xlim=(-3, 103), ylim=(-3, 103), title=title.format(number=known.sum(), r=r))
    axes.grid(alpha=0.3)


def crosses(axes, x, y, color) -> None:
    """Marks points of diverged runs, with one entry in the legend."""
    axes.plot(x, y, "x", color=color, markersize=8)
    if DIVERGED not in axes.get_legend_handles_labels()[1]:
        axes.plot([], [], "kx", label=DIVERGED)


def spread_of(axes, x, values: np.ndarray, line) -> None:
    """The band of a line: mean ± standard deviation over seeds (ddof 1) of `values` [seeds, x]."""
    mean, spread = values.mean(0), values.std(0, ddof=1)
    axes.fill_between(
        x, mean - spread, mean + spread, alpha=0.15, color=line.get_color(), linewidth=0
    )


def _not_finite_from(result) -> int:
    """The first evaluation whose loss is not finite; the last one where all are."""
    bad = np.flatnonzero(~np.isfinite(result.metrics["loss"]))
    return int(bad[0]) if len(bad) else len(result.metrics["loss"]) - 1


def legend_below(figure) -> None:
    """One legend for all panels below them: each label once, whichever panel has it."""
    known: dict = {}
    for panel in figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            known.setdefault(label, handle)
    if DIVERGED in known:
        known[DIVERGED] = known.pop(DIVERGED)  # after the lines
    widest = max(len(label) for label in known)
    columns = max(1, min(len(known), int(14 * figure.get_figwidth() / (widest + 7))))
    figure.legend(
        known.values(), known.keys(), loc="outside lower center", ncols=columns, fontsize=9
    )


def titled(figure, *lines: str, size: float = 10) -> None:
    """A figure's title: what is needed to read it alone, each line wrapped to the figure."""
    width = int(130 * figure.get_figwidth() / size)
    wrapped = [part for line in lines for part in textwrap.wrap(line.replace("`", ""), width)]
    figure.suptitle("\n".join(wrapped), size=size)


def grid_of_curves(
    groups: Mapping[str, Mapping[str, Sequence]], title: Sequence[str], path: Path, *metrics: str
) -> list[Path]:
    """One panel a group of lines, side by side, with one legend: a sweep at a glance.

    `title` are its lines. The metric is drawn in percent; several ones stand beside each other, a
    row of panels a group.
    """
    columns = min(len(groups), 3) if len(metrics) == 1 else len(metrics)
    rows = -(-len(groups) * len(metrics) // columns)
    # A panel alone is as wide as its title needs.
    width, height = (4.2, 3.3) if len(groups) * len(metrics) > 1 else (7.4, 5.0)
    figure, panels = subplots(
        rows,
        columns,
        figsize=(width * columns, height * rows),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    drawn = [(name, metric) for name in groups for metric in metrics]
    for panel in panels.flat[len(drawn) :]:
        panel.set_visible(False)
    for panel, (name, metric) in zip(panels.flat, drawn, strict=False):
        lines = {k: some for k, some in groups[name].items() if _have(some, metric)}
        if lines:
            curves(panel, lines, metric)
        panel.set(title=textwrap.fill(name, 48), xlabel="round", ylim=PERCENT)
        panel.title.set_size(10)
        panel.grid(alpha=0.3)
        if len(metrics) > 1 or panel in panels[:, 0]:
            panel.set_ylabel(measured(metric))
    legend_below(figure)
    titled(figure, *title)
    return save(figure, path)


def _have(results: Sequence, metric: str) -> bool:
    return all(metric in result.metrics for result in results)


def measured(metric: str) -> str:
    """A share's name on an axis.

    >>> measured("accuracy"), measured("attack_success_rate")
    ('test accuracy (%)', 'attack success rate (%)')
    """
    return f"{'' if metric == SUCCESS else 'test '}{_words(metric)} (%)"


class Panel(NamedTuple):
    """A heat map: `values` [rows, columns], NaN where there is none, `notes` below each number.

    `limits` are the ends of the colours. `breaks` are the rows above which a line is drawn.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: np.ndarray
    notes: np.ndarray
    limits: tuple[float, float]
    colours: str
    breaks: tuple[int, ...] = ()


def heat_maps(panels: Sequence[Panel], title: Sequence[str], path: Path) -> list[Path]:
    """Heat maps below each other, with a number in every field. `title` are the figure's lines.

    The columns are named once, where the panels have the same.
    """
    heights = [len(panel.rows) for panel in panels]
    figure, axes = subplots(
        len(panels),
        1,
        figsize=heat_size(panels),
        squeeze=False,
        layout="constrained",
        height_ratios=heights,
    )
    for number, (panel, axis) in enumerate(zip(panels, axes[:, 0], strict=True)):
        last = number == len(panels) - 1 or panels[number + 1].columns != panel.columns
        heat_map(figure, axis, panel, named=last)
    titled(figure, *title, size=9)
    return save(figure, path)


def heat_size(panels: Sequence[Panel]) -> tuple[float, float]:
    """Inches of heat maps below each other, in which labels and numbers have room."""
    columns = max(len(panel.columns) for panel in panels)
    words = max(max(map(len, label.split("\n"))) for panel in panels for label in panel.rows)
    width = max(0.95 * columns + 0.085 * words + 1.1, 4.5)
    return width, 0.5 * sum(len(panel.rows) for panel in panels) + 0.35 * len(panels) + 1.5


def heat_map(figure, axis, panel: Panel, named: bool = True) -> None:
    """Draws a heat map; its columns are named below it unless another one does so."""
    low, high = panel.limits
    rows, columns = panel.values.shape
    axis.set_facecolor("0.92")
    drawn = axis.imshow(panel.values, cmap=panel.colours, vmin=low, vmax=high, aspect="auto")
    for i in range(rows):
        for j in range(columns):
            _field(axis, drawn, i, j, panel.values[i, j], str(panel.notes[i, j]))
    for row in panel.breaks:
        axis.axhline(row - 0.5, color="white", linewidth=4)
    axis.set_yticks(range(rows), panel.rows, fontsize=8)
    axis.set_xticks(range(columns), panel.columns if named else [""] * columns, fontsize=8)
    if named:
        axis.tick_params(axis="x", rotation=35)
        for label in axis.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    if panel.title:
        axis.set_title(panel.title, fontsize=9)
    if rows > 1:  # of a single row the numbers say it
        figure.colorbar(drawn, ax=axis, pad=0.02, fraction=0.04).ax.tick_params(labelsize=7)


def _field(axis, drawn, i: int, j: int, value: float, note: str) -> None:
    """The number and its note, dark on light colours and light on dark ones."""
    if np.isnan(value):
        axis.text(j, i, note.replace(" ", "\n"), ha="center", va="center", fontsize=7, color="0.4")
        return
    red, green, blue, _ = drawn.cmap(drawn.norm(value))
    ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
    above = 0.12 if note else 0.0
    axis.text(j, i - above, f"{value:.1f}", ha="center", va="center", fontsize=9, color=ink)
    if note:
        axis.text(j, i + 0.25, note, ha="center", va="center", fontsize=6.5, color=ink)


def class_table(holdings, title: str, path: Path) -> list[Path]:
    """How many examples of each class every client holds: a row a class, a column a client.

    `holdings` is `inspection.Holdings`; malicious clients are marked, and the server's own examples
    are a panel of their own.
    """
    clients, classes = holdings.clients.shape
    width = min(max(3.5, 0.12 * clients), 12)
    has_root = holdings.root is not None
    figure, panels = subplots(
        1,
        1 + has_root,
        figsize=(width + has_root, 0.25 * classes + 1.6),
        squeeze=False,
        layout="constrained",
        width_ratios=[width, 0.6][: 1 + has_root],
    )
    panel = panels[0, 0]
    drawn = panel.imshow(holdings.clients.T, aspect="auto", cmap="Blues", vmin=0)
    panel.set(xlabel="client", ylabel="class", yticks=range(classes))
    panel.set_title(title, fontsize=9)
    marked = np.flatnonzero(holdings.malicious)
    if len(marked):
        panel.plot(marked, np.full(len(marked), -0.9), "rv", markersize=4, clip_on=False)
        panel.set_xlabel("client (red: malicious)")
    figure.colorbar(drawn, ax=panel, label="examples")
    if has_root:
        side = panels[0, 1]
        root = side.imshow(holdings.root[:, None], aspect="auto", cmap="Greens", vmin=0)
        side.set(xticks=[], yticks=range(classes))
        side.set_title("server", fontsize=9)
        figure.colorbar(root, ax=side)
    return save(figure, path.with_suffix(""))


def feature_maps(
    images,
    maps: Mapping[str, object],
    path: Path,
    *,
    class_names: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    quantile: float = 1.0,
    said: str = "",
) -> list[Path]:
    """Attributions of several models on the same images: one row an image, one column a model.

    Args:
        images: [B, H, W, C] in [0, 1]; the first column.
        maps: column's title -> `fedjax_sec.evaluation.attribution.FeatureMap` of all images. Signed
            attributions are added up over the channels; red speaks for the label, blue against
            it, on one scale for all models of a row.
        path: file without suffix.
        class_names: names of the labels instead of their numbers.
        labels: the images' true labels.
        quantile: share of a map's pixels that the scale reaches; the others saturate. Below 1 the
            faint maps stay legible beside one that has a few strong pixels, such as a trojan's.
        said: the title.
    """
    images = np.asarray(images)
    name = (lambda label: class_names[label]) if class_names else str
    rows, columns = len(images), 1 + len(maps)
    figure, panels = subplots(
        rows,
        columns,
        figsize=(2.1 * columns + 0.5, 2.4 * rows),
        squeeze=False,
        layout="constrained",
    )
    totals = {title: np.asarray(one.attribution).sum(-1) for title, one in maps.items()}
    for i, row in enumerate(panels):
        for panel in row:
            panel.set(xticks=[], yticks=[])
        row[0].imshow(images[i].squeeze(), cmap="gray", vmin=0, vmax=1)
        row[0].set_title("input" if labels is None else f"input\n{name(int(labels[i]))}", size=9)
        largest = max(np.quantile(np.abs(total[i]), quantile) for total in totals.values()) or 1.0
        for panel, (title, total) in zip(row[1:], totals.items(), strict=True):
            shown = panel.imshow(total[i], cmap="RdBu_r", vmin=-largest, vmax=largest)
            label = name(int(maps[title].predicted[i]))
            share = 100 * float(maps[title].confidence[i])
            panel.set_title(f"{title}\n{label} ({share:.1f}%)", size=9)
        figure.colorbar(
            shown, ax=row[-1], shrink=0.8, extend="neither" if quantile == 1 else "both"
        )
    if said:
        titled(figure, said, size=8)
    return save(figure, path)


def certified_curves(curves: Mapping[str, object], title: str, path: Path) -> list[Path]:
    """Certified rate and certified accuracy against the backdoor's radius, one line a run.

    `curves`: label -> `fedjax_sec.evaluation.certificate.Certified`.
    """
    figure, panels = subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    for panel, name in zip(panels, ("rate", "accuracy"), strict=True):
        for i, (label, curve) in enumerate(curves.items()):
            shape = _STYLES[i % len(_STYLES)]
            panel.plot(curve.radius, 100 * getattr(curve, name), shape, label=label, linewidth=1.4)
        panel.set(xlabel="norm of the backdoor", ylim=PERCENT, xlim=(0, None))
        panel.set_title(f"certified {name}", size=10)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("test examples (%)")
    legend_below(figure)
    titled(figure, title, size=9)
    return save(figure, path)

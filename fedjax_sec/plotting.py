"""Figures of runs and sweeps."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # figures go to files; a display may be missing
from matplotlib import pyplot as plt

_STYLES = ("-", "--", "-.", ":")


def save(figure, path: Path) -> list[Path]:
    """Writes a figure as PNG and PDF beside each other and closes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for suffix in (".png", ".pdf"):
        written.append(path.with_suffix(suffix))
        # No date in the PDF: the same results give the same file.
        metadata = {"CreationDate": None} if suffix == ".pdf" else None
        figure.savefig(written[-1], dpi=150, bbox_inches="tight", metadata=metadata)
    plt.close(figure)
    return written


def accuracy_curve(result, folder: Path) -> list[Path]:
    """Test accuracy (and attack success rate) of one run over its rounds."""
    figure, axes = plt.subplots(figsize=(6, 4))
    metrics = result.metrics
    axes.plot(metrics["round"], 100 * metrics["accuracy"], label="accuracy")
    if "attack_success_rate" in metrics:
        axes.plot(
            metrics["round"], 100 * metrics["attack_success_rate"], "--",
            label="attack success rate",
        )  # fmt: skip
    axes.set(xlabel="round", ylabel="test examples (%)", ylim=(0, 101))
    axes.set_title(result.summary["data"]["label"])
    axes.grid(alpha=0.3)
    axes.legend()
    return save(figure, folder / "accuracy")


def curves(axes, lines: Mapping[str, Sequence], metric: str = "accuracy") -> None:
    """One line a label: the mean over its results, with a band from the lowest to the highest."""
    for i, (label, results) in enumerate(lines.items()):
        rounds = results[0].metrics["round"]
        values = 100 * np.stack([result.metrics[metric] for result in results])
        style = _STYLES[(i // 10) % len(_STYLES)]
        (line,) = axes.plot(rounds, values.mean(0), style, label=label, linewidth=1.4)
        if len(results) > 1:
            axes.fill_between(
                rounds, values.min(0), values.max(0), alpha=0.15, color=line.get_color(),
                linewidth=0,
            )  # fmt: skip


def grid_of_curves(groups: Mapping[str, Mapping[str, Sequence]], title: str, path: Path):
    """One panel a group of lines, side by side, with one legend: a sweep at a glance."""
    columns = min(len(groups), 3)
    rows = -(-len(groups) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(4.2 * columns, 3.3 * rows), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for panel in panels.flat[len(groups) :]:
        panel.set_visible(False)
    for panel, (name, lines) in zip(panels.flat, groups.items(), strict=False):
        curves(panel, lines)
        panel.set(title=name, xlabel="round", ylim=(0, 101))
        panel.grid(alpha=0.3)
    for row in panels:
        row[0].set_ylabel("test accuracy (%)")
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6))
    figure.suptitle(title)
    return save(figure, path)

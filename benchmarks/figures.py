"""Draws the figures of docs/performance.md from the measurements in benchmarks/results/.

python benchmarks/figures.py
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

ROOT = Path(__file__).parents[1]
RESULTS, FIGURES = ROOT / "benchmarks" / "results", ROOT / "docs" / "images"


def rows(name: str) -> pd.DataFrame:
    """The rows of one result file."""
    return pd.DataFrame(json.loads((RESULTS / f"{name}.json").read_text())["rows"])


def save(figure, name: str) -> None:
    """Writes a figure and closes it."""
    figure.savefig(FIGURES / f"{name}.png", dpi=130, bbox_inches="tight")
    plt.close(figure)


def stacks(measured: pd.DataFrame) -> None:
    """Milliseconds of every rule against K and against D."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    fixed = {"K": "D = 80,000", "D": "K = 51"}
    for axis, panel in zip(("K", "D"), axes, strict=True):
        part = measured[measured["over"] == axis]
        for rule, line in part.groupby("rule", sort=False):
            panel.plot(line[axis], line["ours ms"], "o-", label=rule)
        mean = part[part["rule"] == "mean"]
        panel.plot(mean[axis], mean["limit ms"], "k--", label="one pass over the stack")
        panel.set(xscale="log", yscale="log", xlabel=axis, title=f"{fixed[axis]}, float32")
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("milliseconds")
    axes[1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save(figure, "performance_stacks")


def batches(measured: pd.DataFrame) -> None:
    """Milliseconds of a round against the batch size, beside the limit by arithmetic."""
    part = measured[measured["over"] == "batch"]
    models = list(dict.fromkeys(part["model"]))
    figure, axes = plt.subplots(1, len(models), figsize=(9, 3.6))
    for model, panel in zip(models, axes, strict=True):
        line = part[part["model"] == model]
        panel.plot(line["B"], line["ours ms"], "o-", label="ours")
        panel.plot(line["B"], line["limit ms"], "k--", label="limit by arithmetic")
        panel.set(xscale="log", yscale="log", xlabel="batch size B", title=f"{model}, 51 clients")
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("milliseconds a round")
    axes[0].legend(fontsize=8)
    save(figure, "performance_batch")


def seeds(measured: pd.DataFrame) -> None:
    """Seconds for a number of seeds, in one sweep and one after another."""
    part = measured[measured["over"] == "seeds"]
    figure, axis = plt.subplots(figsize=(5.5, 3.6))
    for name, style in (
        ("one after another s", "o-"),
        ("one sweep s", "s-"),
        ("cached, one after another s", "o--"),
        ("cached, one sweep s", "s--"),
    ):
        axis.plot(part["seeds"], part[name], style, label=name.removesuffix(" s"))
    axis.set(xlabel="seeds", ylabel="seconds, compilation included", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save(figure, "performance_seeds")


if __name__ == "__main__":
    for draw, name in ((stacks, "scaling_cpu"), (batches, "batch_cpu"), (seeds, "seeds_cpu")):
        draw(rows(name))

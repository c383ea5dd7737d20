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


def stacks(found: pd.DataFrame) -> None:
    """Milliseconds of every rule against K and against D."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    fixed = {"K": "D = 80,000", "D": "K = 51"}
    for axis, panel in zip(("K", "D"), axes, strict=True):
        part = found[found["over"] == axis]
        for rule, line in part.groupby("rule", sort=False):
            panel.plot(line[axis], line["ours ms"], "o-", label=rule)
        mean = part[part["rule"] == "mean"]
        panel.plot(mean[axis], mean["limit ms"], "k--", label="one pass over the stack")
        panel.set(xscale="log", yscale="log", xlabel=axis, title=f"{fixed[axis]}, float32")
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("milliseconds")
    axes[1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save(figure, "performance_stacks")


def batches(found: pd.DataFrame) -> None:
    """Milliseconds of a round against the batch size."""
    part = found[found["over"] == "batch"]
    figure, axis = plt.subplots(figsize=(6, 4))
    for model, line in part.groupby("model", sort=False):
        (drawn,) = axis.plot(line["B"], line["ours ms"], "o-", label=f"{model}, 51 clients")
        axis.plot(
            line["B"], line["limit ms"], "--", color=drawn.get_color(),
            label=f"{model}: 6 FLOP a weight use",
        )  # fmt: skip
    axis.set(xscale="log", yscale="log", xlabel="batch size B", ylabel="milliseconds a round")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save(figure, "performance_batch")


def seeds(found: pd.DataFrame) -> None:
    """Seconds of a sweep against the number of its seeds."""
    part = found[found["over"] == "seeds"]
    figure, axis = plt.subplots(figsize=(6, 4))
    for column, label in (
        ("one after another s", "one run after another"),
        ("one sweep s", "one sweep"),
    ):
        axis.plot(part["seeds"], part[column], "o-", label=label)
    axis.set(xlabel="seeds", ylabel="seconds, compilation included", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save(figure, "performance_seeds")


if __name__ == "__main__":
    scaling = rows("scaling_cpu")
    stacks(scaling)
    batches(scaling)
    seeds(scaling)

"""Draws the figure of docs/performance.md from the measurements in benchmarks/results/.

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


if __name__ == "__main__":
    stacks(rows("scaling_cpu"))

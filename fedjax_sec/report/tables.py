"""Tables over the cells and seeds of a sweep."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedjax_sec.core.optional import require
from fedjax_sec.core.registry import headline_in, headlines
from fedjax_sec.runs.experiment import Result
from fedjax_sec.sweeps.grid import Cell, named

if TYPE_CHECKING:
    import pandas as pd

#: Columns of `to_frame` beside a run's labels and metrics.
_FACTS = (
    "seed",
    "rounds",
    "best_round",
    "diverged",
    "excluded_updates",
    "malicious_clients",
)
#: The caption of a metric's table.
_LAST, _BEST = (
    "After the last round.",
    "At each run's best evaluation (`best_round` in `runs.csv`).",
)


def _shown() -> dict[str, str]:
    """The metrics of tables, where measured, beside all that begin with `robust_HEADLINE/`."""
    shown = {}
    for name in headlines():
        shown |= {name: _LAST, f"best_{name}": _BEST}
    shown["attack_success_rate"] = _LAST
    return shown | {f"base_class_{name}": _LAST for name in headlines()}


def axes_of(cells: Sequence[Cell]) -> list[str]:
    """The columns of the axes: their names, but `grid.NAME` where a fact has that name."""
    facts = {*_FACTS, *(f"best_{name}" for name in headlines())}
    return [f"grid.{axis}" if axis in facts else axis for axis in cells[0].labels]


def to_frame(cells: Sequence[Cell], results: Sequence[Result]) -> "pd.DataFrame":
    """One row a run: the axes' labels, the seed, the last evaluation's metrics, and other facts.

    Metrics have the names and units that they have in `metrics.jsonl`: shares are in [0, 1].
    `malicious_clients` are numbers separated by blanks, or `redrawn` in every round.
    """
    rows, axes = [], axes_of(cells)
    for cell, result in zip(cells, results, strict=True):
        summary = result.summary
        final, best = dict(summary["final"]), summary["best"]
        row = dict(zip(axes, cell.labels.values(), strict=True)) | {"seed": cell.experiment.seed}
        row["rounds"] = cell.experiment.rounds
        row |= {name: value for name, value in final.items() if name != "round"}
        headline = headline_in(final)
        row |= {f"best_{headline}": best[headline], "best_round": best.get("round")}
        row["diverged"] = summary.get("diverged", False)
        row["excluded_updates"] = summary.get("excluded_updates")
        clients = summary.get("malicious_clients", ())
        row["malicious_clients"] = (
            "redrawn" if clients is None else " ".join(str(number) for number in clients)
        )
        rows.append(row)
    return _data_frame(rows)


def _data_frame(content) -> "pd.DataFrame":
    return require("pandas", "A table").DataFrame(content)


def metrics_of(frame: "pd.DataFrame") -> list[str]:
    """The metrics that have a table."""
    starts = tuple(f"robust_{name}/" for name in headlines())
    robust = [name for name in frame if name.startswith(starts)]
    return [name for name in (*_shown(), *robust) if name in frame and frame[name].notna().any()]


def summarized(frame: "pd.DataFrame", axes: Sequence[str]) -> "pd.DataFrame":
    """One row a cell and metric: mean and standard deviation (ddof 1) over its seeds."""
    rows = []
    for labels, group in _by_cell(frame, axes):
        for metric in metrics_of(frame):
            values = group[metric].dropna()
            row = dict(zip(axes, labels, strict=True)) | {"metric": metric}
            row |= {"mean": values.mean(), "std": values.std(), "seeds": len(values)}
            rows.append(row | {"diverged": int(group["diverged"].sum())})
    return _data_frame(rows)


def _by_cell(frame: "pd.DataFrame", axes: Sequence[str]):
    return frame.groupby(list(axes), sort=False) if axes else [((), frame)]


def mean_and_spread(values: "pd.Series") -> str:
    """`mean ± standard deviation` (over seeds, ddof 1), or the value alone when there is one.

    >>> import pandas as pd
    >>> mean_and_spread(pd.Series([90.0, 92.0]))
    '91.0 ± 1.4'
    """
    values = values.dropna()
    if values.empty:
        return ""
    spread = f" ± {values.std():.1f}" if len(values) > 1 else ""
    return f"{values.mean():.1f}{spread}"


def pivot(frame: "pd.DataFrame", axes: Sequence[str], metric: str) -> "pd.DataFrame":
    """First axis down, the others across -> mean and spread over seeds of a share, in percent.

    A cell says how many of its runs diverged, and of how many it is where others have more.
    """
    most = max(group[metric].notna().sum() for _, group in _by_cell(frame, axes))
    columns: dict = {}
    for labels, group in _by_cell(frame, axes):
        text, notes = mean_and_spread(100 * group[metric].astype(float)), []
        if 0 < (count := group[metric].notna().sum()) < most:
            notes.append("one seed" if count == 1 else f"{count} seeds")
        if failed := group["diverged"].sum():
            notes.append("diverged" if len(group) == 1 else f"{failed} of {len(group)} diverged")
        text += f" ({', '.join(notes)})" if text and notes else ""
        across = [named(axis, label) for axis, label in zip(axes[1:], labels[1:], strict=True)]
        column = " / ".join(across) or metric
        columns.setdefault(column, {})[labels[0] if axes else "run"] = text
    table = _data_frame(columns)
    table.index.name = axes[0] if axes else None
    return table


def over_seeds(frame: "pd.DataFrame", axes: Sequence[str]) -> str:
    """Of how many seeds the numbers are."""
    counts = {len(group) for _, group in _by_cell(frame, axes)}
    if counts == {1}:
        return "one seed"
    low, high = min(counts), max(counts)
    return f"over {high} seeds" if low == high else f"over {low} to {high} seeds"


def data_of(results: Sequence[Result]) -> str:
    """The data sets, and which part of them, of all runs."""
    return " / ".join(dict.fromkeys(result.summary["data"]["label"] for result in results))


def about_backdoor(cells: Sequence[Cell]) -> str:
    """Whether cells without an attack say how often the backdoor succeeds that nobody taught."""
    attacked = [cell for cell in cells if cell.experiment.attack.backdoor is not None]
    clean = [cell for cell in cells if not cell.experiment.attack.stages]
    if not attacked or not clean:
        return ""
    if all(cell.experiment.backdoor is not None for cell in clean):
        return "Without an attack it is the base rate: of the backdoor that nobody taught."
    return (
        "Cells without an attack have no base rate: the attacks' backdoors differ; "
        "evaluation.backdoor names one."
    )


def tables(
    cells: Sequence[Cell], results: Sequence[Result]
) -> dict[str, tuple[str, str, "pd.DataFrame"]]:
    """metric -> (heading, what it is, table) of a sweep."""
    frame, axes = to_frame(cells, results), axes_of(cells)
    seeds, written = over_seeds(frame, axes), {}
    if seeds != "one seed":
        seeds = f"mean ± standard deviation {seeds}"
    for metric in metrics_of(frame):
        said = _shown().get(metric, _LAST)
        if metric == "attack_success_rate":
            said = f"{said} {about_backdoor(cells)}".strip()
        heading = f"{metric} (%), {data_of(results)}, {seeds}"
        written[metric] = heading, said, pivot(frame, axes, metric)
    return written


def warnings_of(cells: Sequence[Cell], results: Sequence[Result]) -> list[str]:
    """Every warning once, with the runs that have it."""
    having: dict[str, list[Cell]] = {}
    for cell, result in zip(cells, results, strict=True):
        for text in result.summary.get("warnings", ()):
            having.setdefault(text, []).append(cell)
    return [f"{_named_runs(some, len(cells))}: {text}" for text, some in having.items()]


def _named_runs(some: Sequence[Cell], total: int, most: int = 6) -> str:
    if len(some) == total:
        return f"all {total} runs" if total > 1 else some[0].title
    seeds: dict[str, list[str]] = {}
    for cell in some:
        seeds.setdefault(cell.title, []).append(str(cell.experiment.seed))
    names = [
        f"{title}, seed{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}"
        for title, numbers in seeds.items()
    ]
    more = f"; and {len(names) - most} more" if len(names) > most else ""
    return "; ".join(names[:most]) + more

"""Two folders side by side: which cells both have, what differs, and whether by more than chance.

Runs of one seed have the same clients, batches and initial parameters in both folders, so they are
pairs: a difference is tested by the differences of its pairs, not by two separate spreads.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjax_sec.core import ConfigError
from fedjax_sec.core.optional import require
from fedjax_sec.report.page import rows
from fedjax_sec.report.page.axes import axes_of, default_pair, text
from fedjax_sec.report.page.facts import versions
from fedjax_sec.report.page.folder import Cell, Folder, Run, comparable

#: Pairs that a t-test needs here, and those below which Wilcoxon's smallest p is above 0.05.
T_TEST, WILCOXON = 3, 6
#: A difference is called larger than the spread where its adjusted p is below this.
LEVEL = 0.05


class Test(NamedTuple):
    """The differences b - a of `pairs` seeds: their mean and standard deviation (ddof 1).

    `t_test` and `wilcoxon` are two-sided p-values of the paired t-test and of the signed-rank test,
    None where there are too few pairs, or the differences do not vary. `said` says why.
    """

    pairs: int
    difference: float
    spread: float | None
    t_test: float | None
    wilcoxon: float | None
    said: str = ""


def paired(a: Sequence[float], b: Sequence[float]) -> Test:
    """Tests numbers of the same seeds, `a` and `b`, in the same order.

    >>> paired([0.5, 0.6], [0.5, 0.7]).said
    'no test is possible with fewer than 3 pairs'
    >>> test = paired([0.50, 0.60, 0.55, 0.58], [0.55, 0.66, 0.59, 0.64])
    >>> test.pairs, round(test.difference, 4), round(test.t_test, 4)
    (4, 0.0525, 0.0016)
    """
    change = np.subtract(b, a, dtype=float)
    number, mean = len(change), float(change.mean())
    spread = float(change.std(ddof=1)) if number > 1 else None
    test = Test(number, mean, spread, None, None)
    if not change.any():
        return test._replace(said="equal to the bit")
    if number < T_TEST:
        return test._replace(said=f"no test is possible with fewer than {T_TEST} pairs")
    if spread is None or math.isclose(spread, 0, abs_tol=1e-12 * abs(mean)):
        return test._replace(said="the same difference in every pair, so there is no spread")
    stats = require("scipy.stats", "A comparison of results")
    p = float(stats.ttest_1samp(change, 0.0).pvalue)
    rank = float(stats.wilcoxon(change).pvalue) if number >= WILCOXON else None
    return test._replace(t_test=p, wilcoxon=rank)


def content(a: Folder, b: Folder) -> dict[str, Any]:
    """All that the page of two folders shows by itself.

    Raises: `ConfigError` where they have no cell in common.
    """
    pairs = matched(a, b)
    cells = [one for one, _ in pairs]
    names = rows.metrics_of([run for pair in pairs for cell in pair for run in cell.runs])
    axes = axes_of(cells)
    down, across = default_pair(axes)
    runs, drawn = [], []
    for place, pair in enumerate(pairs):
        for side, cell in enumerate(pair):
            for run in cell.runs:
                values = [rows.number(value) for value in rows.final(run, names)]
                runs.append({"cell": place, "side": side, "seed": run.seed, "final": values})
                drawn.append(run)
    curves = rows.curves(drawn, names)
    return {
        "axes": rows.described(axes),
        "down": down,
        "across": across,
        "metrics": [rows.metric(name, name in curves["metrics"]) for name in names],
        "cells": [cell.title for cell in cells],
        "runs": runs,
        "curves": curves,
        "tests": tests(pairs, names),
    }


def said(content: dict[str, Any]) -> str:
    """How many cells differ in the headline by more than the spread, in a sentence."""
    tested = [one for one in content["tests"][0] if one is not None]
    larger = sum(one["larger"] for one in tested)
    able = sum(one["adjusted"] is not None for one in tested)
    name = content["metrics"][0]["name"].replace("_", " ")
    return (
        f"{name}: {larger} of {len(content['cells'])} cells differ by more than the spread "
        f"(paired t-test in {able}, p adjusted after Benjamini and Hochberg)."
    )


def matched(a: Folder, b: Folder) -> list[tuple[Cell, Cell]]:
    """The cells of one name in both; of two folders with one cell each, these two.

    Raises: `ConfigError` where there is none.
    """
    others = {cell.name: cell for cell in b.cells}
    pairs = [(cell, others[cell.name]) for cell in a.cells if cell.name in others]
    if not pairs and len(a.cells) == len(b.cells) == 1:
        pairs = [(a.cells[0], b.cells[0])]
    if not pairs:
        raise ConfigError(
            f"Folders {str(a.path)!r} and {str(b.path)!r} have no cell in common: a cell is found "
            f"by its labels. The first of each are {a.cells[0].name!r} and {b.cells[0].name!r}."
        )
    return pairs


def tests(pairs: Sequence[tuple[Cell, Cell]], names: Sequence[str]) -> list[list[dict | None]]:
    """metric -> a test a pair of cells, None where no seed is finished in both.

    `adjusted` is the t-test's p after Benjamini and Hochberg, over the tested cells of the metric.
    """
    by_seed = [
        tuple({run.seed: rows.final(run, names) for run in cell.runs} for cell in pair)
        for pair in pairs
    ]
    return [_of_metric(by_seed, place) for place in range(len(names))]


def _of_metric(by_seed, place: int) -> list[dict | None]:
    made: list[dict | None] = []
    for first, second in by_seed:
        values = [
            (first[seed][place], second[seed][place])
            for seed in sorted(first.keys() & second.keys())
            if np.isfinite([first[seed][place], second[seed][place]]).all()
        ]
        made.append(_described(values) if values else None)
    tested = [one for one in made if one is not None and one["t_test"] is not None]
    if tested:
        stats = require("scipy.stats", "A comparison of results")
        adjusted = stats.false_discovery_control([one["t_test"] for one in tested])
        for one, p in zip(tested, adjusted, strict=True):
            one["adjusted"] = float(p)
            one["larger"] = bool(p < LEVEL)
    return made


def _described(values: Sequence[tuple[float, float]]) -> dict:
    a, b = zip(*values, strict=True)
    test = paired(a, b)
    means = {"a": rows.number(float(np.mean(a))), "b": rows.number(float(np.mean(b)))}
    numbers = {key: value for key, value in test._asdict().items() if key != "said"}
    kept = {key: None if one is None else float(f"{one:.4g}") for key, one in numbers.items()}
    same = "no spread" in test.said
    return means | kept | {"said": test.said, "adjusted": None, "larger": same}


# --- What differs -------------------------------------------------------------------------------


def facts(a: Folder, b: Folder) -> dict[str, Any]:
    """What the template says: configurations, versions, and cells of one folder alone."""
    pairs = matched(a, b)
    names = ({cell.name for cell, _ in pairs}, {cell.name for _, cell in pairs})
    return {
        "only": [
            (str(folder.path), [cell.title for cell in folder.cells if cell.name not in known])
            for folder, known in zip((a, b), names, strict=True)
        ],
        "configurations": configurations(pairs),
        "versions": _versions(a.runs, b.runs),
        "unfinished": [
            (str(folder.path), sum(not run.finished for run in folder.runs), len(folder.runs))
            for folder in (a, b)
        ],
        "seeds": _seeds(pairs),
    }


def configurations(pairs: Sequence[tuple[Cell, Cell]]) -> list[tuple[str, str, str, int]]:
    """(key, value in a, value in b, in how many cells) of every difference, the widest first."""
    counted: Counter = Counter()
    for pair in pairs:
        first, second = (comparable(cell.config) for cell in pair)
        for key in {**first, **second}:
            values = [text(one[key]) if key in one else "\N{EN DASH}" for one in (first, second)]
            if values[0] != values[1]:
                counted[(key, *values)] += 1
    return [(*key, count) for key, count in sorted(counted.items(), key=lambda one: (-one[1], one))]


def _versions(a: Sequence[Run], b: Sequence[Run]) -> list[tuple[str, str, str]]:
    """(name, in a, in b) of versions, devices and machines that are not the same."""
    first, second = versions(a), versions(b)
    pairs = [
        (name, *(", ".join(sorted(one.get(name, ()))) for one in (first, second)))
        for name in {**first, **second}
    ]
    return [pair for pair in pairs if pair[1] != pair[2]]


def _seeds(pairs: Sequence[tuple[Cell, Cell]]) -> str:
    """How many seeds are finished in both, over the cells."""
    counts = {
        len({run.seed for run in a.runs if run.finished} & {r.seed for r in b.runs if r.finished})
        for a, b in pairs
    }
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"

"""The rows that a page holds: a number for every run and metric, thinned curves, what was kept.

Everything is plain values for JSON, with four significant digits, so that a page stays small.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from fedjax_sec.core.registry import headlines
from fedjax_sec.report.measures import is_share, lowest_is_worst
from fedjax_sec.report.page.axes import Axis, axes_of, default_pair, text
from fedjax_sec.report.page.folder import Cell, Folder, Run, comparable

#: Points of a curve, and characters of all curves and of all pictures of what was kept.
POINTS, CURVES, KEPT = 100, 2_200_000, 900_000
#: Clients of one kind, honest or malicious, in a picture of what was kept.
CLIENTS = 100
#: The metric that is no metric of rounds: what a run took.
SECONDS = "seconds"
#: The order of metrics in the menu; others follow.
_ORDER = ("attack_success_rate", "base_class_", "robust_", "loss", "kept_", "detection/")


def content(folder: Folder) -> dict[str, Any]:
    """All that the page of one folder shows by itself."""
    runs = folder.runs
    axes = with_seeds(axes_of(folder.cells), folder.cells)
    names = metrics_of(runs)
    drawn = curves(runs, names)
    down, across = default_pair([axis for axis in axes if axis.name != "seed"])
    return {
        "axes": described(axes),
        "down": down,
        "across": across,
        "metrics": [metric(name, name in drawn["metrics"]) for name in names],
        "cells": [cell.title for cell in folder.cells],
        "runs": [
            {
                "cell": place,
                "seed": run.seed,
                "state": "damaged" if run.problem else run.status.state,
                "diverged": run.status.diverged,
                "attacked": run.attacked,
                "final": [number(value) for value in final(run, names)],
            }
            for place, cell in enumerate(folder.cells)
            for run in cell.runs
        ],
        "curves": drawn,
        "kept": kept(folder.cells),
        "configs": configurations(folder.cells),
        "refused": folder.refused,
    }


def with_seeds(axes: Sequence[Axis], cells: Sequence[Cell]) -> list[Axis]:
    """The axes with a label for every run in place of every cell, and the seeds as the last one."""
    counts = [len(cell.runs) for cell in cells]
    spread = [
        axis._replace(
            of=tuple(one for one, n in zip(axis.of, counts, strict=True) for _ in range(n))
        )
        for axis in axes
    ]
    seeds = [run.seed for cell in cells for run in cell.runs]
    known = tuple(str(seed) for seed in sorted(set(seeds)))
    if len(known) > 1:
        spread.append(Axis("seed", known, tuple(map(str, seeds))))
    return spread


def described(axes: Sequence[Axis]) -> list[dict]:
    """The axes with the place of each run's label, -1 where it has none."""
    return [
        {
            "name": axis.name,
            "labels": list(axis.labels),
            "numeric": axis.numeric,
            "at": [-1 if one is None else axis.labels.index(one) for one in axis.of],
        }
        for axis in axes
    ]


def metrics_of(runs: Iterable[Run]) -> list[str]:
    """The metrics that are one number an evaluation, the tasks' headlines first."""
    names = {
        name: None
        for run in runs
        for name, values in run.metrics.items()
        if values.ndim == 1 and name != "round" and np.isfinite(values).any()
    }
    judged = [name for name in headlines() if name in names]

    def place(name):
        for order, start in enumerate(_ORDER):
            if name.startswith(start):
                return order
        return len(_ORDER)

    others = sorted((name for name in names if name not in judged), key=lambda n: (place(n), n))
    best = [f"best_{name}" for name in judged]
    return [*judged, *best, *others, SECONDS] if names else [SECONDS]


def metric(name: str, drawn: bool) -> dict:
    """A metric: in percent where it is a share, and whether its worst value is the lowest one.

    >>> metric("attack_success_rate", True)["worst"], metric("accuracy", True)["worst"]
    ('highest', 'lowest')
    """
    return {
        "name": name,
        "share": is_share(name),
        "worst": "lowest" if lowest_is_worst(name) else "highest",
        "drawn": drawn,
    }


def final(run: Run, names: Sequence[str]) -> list[float]:
    """A finished run's numbers, after its last round; NaN where it has none."""
    if not run.finished:
        return [float("nan")] * len(names)
    best, values = run.summary.get("best", {}), []
    for name in names:
        if name == SECONDS:
            value = run.summary.get("wall_seconds", np.nan) / run.summary.get("replicas", 1)
        elif name in run.metrics:
            value = run.metrics[name][-1]
        else:
            value = best.get(name.removeprefix("best_"), np.nan)
        values.append(float("nan") if value is None else float(value))
    return values


def number(value: float) -> float | None:
    """Four significant digits; None, which is JSON, for what is not finite.

    >>> number(0.123456), number(float("nan"))
    (0.1235, None)
    """
    return float(f"{value:.4g}") if np.isfinite(value) else None


def thinned(length: int, points: int) -> np.ndarray:
    """Places of at most `points` of so many entries: evenly spread, the first and the last too.

    >>> thinned(3, 5).tolist(), thinned(10, 4).tolist()
    ([0, 1, 2], [0, 3, 6, 9])
    """
    return np.unique(np.linspace(0, length - 1, min(length, points)).round().astype(int))


def curves(runs: Sequence[Run], names: Sequence[str]) -> dict[str, Any]:
    """metric -> a curve a run, None where it has none; `rounds` are shared by many runs.

    Metrics that do not fit are left out, the last ones first; none of the first four is.
    """
    lengths = sum(min(len(run.metrics.get("round", ())), POINTS) for run in runs)
    most = max(4, int(CURVES / 7 / max(lengths, 1)))  # a number and its comma are seven characters
    held = [name for name in names if any(name in run.metrics for run in runs)][:most]
    points = POINTS
    if len(held) * lengths * 7 > CURVES:
        points = max(20, int(POINTS * CURVES / (len(held) * lengths * 7)))
    known: dict[tuple, int] = {}
    of, values = [], {name: [] for name in held}
    for run in runs:
        rounds = run.metrics.get("round", np.zeros(0))
        at = thinned(len(rounds), points) if len(rounds) else np.zeros(0, int)
        of.append(known.setdefault(tuple(rounds[at].astype(int).tolist()), len(known)))
        for name in held:
            given = run.metrics.get(name)
            line = None if given is None else [number(float(value)) for value in given[at]]
            values[name].append(line)
    return {"rounds": [list(one) for one in known], "of": of, "metrics": values, "points": points}


def kept(cells: Sequence[Cell]) -> dict[str, Any]:
    """What the rule kept of every client: for each run its rounds, and a text for each client.

    A text has a character a round: a digit d says that a share of d / 9 was kept, `-` that the
    client was not there, or was not honest (malicious) then. Where the runs are many, rounds are
    left out, and then all seeds of a cell but the first.
    """
    runs = [run for cell in cells for run in cell.runs]
    firsts = {id(next(run for run in cell.runs if _has(run))) for cell in cells if _any(cell)}
    shown = [run for run in runs if _has(run)]
    clients = sum(min(_clients(run), 2 * CLIENTS) for run in shown)
    if clients and KEPT / clients < 25:
        shown = [run for run in shown if id(run) in firsts]
        clients = sum(min(_clients(run), 2 * CLIENTS) for run in shown)
    points = int(np.clip(KEPT / max(clients, 1), 8, POINTS))
    chosen = {id(run) for run in shown}
    return {
        "points": points,
        "all": len(shown) == sum(map(_has, runs)),
        "runs": [_kept(run, points) if id(run) in chosen else None for run in runs],
    }


def _has(run: Run) -> bool:
    return "kept" in run.metrics


def _any(cell: Cell) -> bool:
    return any(map(_has, cell.runs))


def _clients(run: Run) -> int:
    return int(run.config.get("data", {}).get("num_clients") or run.metrics["kept"].shape[1])


def _kept(run: Run, points: int) -> dict[str, Any]:
    """One run's texts, `honest` and `malicious` apart; `known` is whether it says who is who."""
    shares, rounds = run.metrics["kept"], run.metrics["round"]
    measured = np.flatnonzero(~np.isnan(shares).all(axis=1))
    at = measured[thinned(len(measured), points)] if len(measured) else measured
    total = _clients(run)
    grid = np.full((len(at), total), np.nan)
    bad = np.zeros(grid.shape, bool)
    known = run.attacked and _malicious(run) is not None
    for row, place in enumerate(at):
        numbers = np.arange(shares.shape[1])
        if "clients" in run.metrics:
            numbers = run.metrics["clients"][place].astype(int)
        grid[row, numbers] = shares[place]
        if known and "malicious" in run.metrics:
            bad[row, numbers] = run.metrics["malicious"][place] > 0
    if known and "malicious" not in run.metrics:
        bad[:, [number for number in _malicious(run) or () if number < total]] = True
    made: dict[str, Any] = {"rounds": rounds[at].astype(int).tolist(), "known": known}
    for name, mask in (("honest", ~bad), ("malicious", bad)):
        there = np.flatnonzero((mask & ~np.isnan(grid)).any(axis=0))
        made[name] = {
            "clients": there[:CLIENTS].tolist(),
            "of": len(there),
            "shares": [_text(np.where(mask[:, i], grid[:, i], np.nan)) for i in there[:CLIENTS]],
        }
    return made


def _malicious(run: Run) -> Sequence[int] | None:
    """The malicious clients' numbers; where each round draws them, the rows say who they are."""
    if "malicious" in run.metrics:
        return ()
    return run.summary.get("malicious_clients")


def _text(shares: np.ndarray) -> str:
    there = ~np.isnan(shares)
    digits = np.where(there, ord("0") + np.round(9 * np.where(there, shares, 0)), ord("-"))
    return digits.astype(np.uint8).tobytes().decode()


def configurations(cells: Sequence[Cell]) -> dict[str, Any]:
    """`common`: keys that all cells have alike; `cells`: each one's others, as text."""
    leaves = [{key: text(one) for key, one in comparable(c.config).items()} for c in cells]
    first = leaves[0]
    common = {
        key: value
        for key, value in first.items()
        if all(key in one and one[key] == value for one in leaves)
    }
    rest = [{k: value for k, value in one.items() if k not in common} for one in leaves]
    return {"common": common, "cells": rest}

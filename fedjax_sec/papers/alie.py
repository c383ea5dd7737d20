"""The tables and figures of *A Little Is Enough* (Baruch et al. 2019).

An item is a table or a figure. Its cells are experiments on top of `configs/alie/DATASET.yaml`;
cells that items share (no attack, no defence) are run once.
"""

import csv
import dataclasses
import importlib.resources
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from fedjax_sec.papers._runs import (
    Shared,
    computed_from,
    demand,
    diverged,
    finish,
    foundation,
    over,
    said_of,
    settled,
)
from fedjax_sec.report import plotting
from fedjax_sec.runs.config import Experiment
from fedjax_sec.runs.experiment import Result, best_evaluation

ITEMS = ("table1", "table2", "table3", "figure2", "figure3", "figure4")
DATASETS = ("mnist", "cifar10")
SCALES = ("smoke", "small", "paper")

# "The circumvention analysis and experiments are similar for all variants ..., so we will consider
# only the second variant" (Section 2.3): the n - 2m values nearest the median.
DEFENSES = {
    "No Defense": {"name": "mean", "weighted": False},
    "Trimmed Mean": {"name": "trimmed_mean", "variant": "nearest_n_minus_2f"},
    "Krum": {"name": "krum"},
    "Bulyan": {"name": "bulyan"},
}
AUTHOR_DEFENSES = {
    "No Defense": {"name": "mean", "weighted": False},
    "Trimmed Mean": {
        "name": "trimmed_mean",
        "variant": "nearest_n_minus_f",
        "convention": "author",
    },
    "Krum": {"name": "krum", "convention": "author"},
    "Bulyan": {
        "name": "bulyan",
        "convention": "author",
        "selection": {"name": "krum", "convention": "author"},
    },
}
CONVENTIONS = {"paper": DEFENSES, "author": AUTHOR_DEFENSES}

# What the scales change of configs/alie/DATASET.yaml, which is the paper's scale. `smoke` only
# shows that every part works; `small` is for a CPU, on as much of the data as is at hand.
SCALE_CHANGES: Mapping[tuple[str, str], Mapping] = {
    ("smoke", "mnist"): {"rounds": 10, "evaluation.every": 5, "data.max_train": 5100},
    ("smoke", "cifar10"): {
        "rounds": 4,
        "evaluation.every": 2,
        "client.batch_size": 8,
        "data.max_train": 2040,
        "data.max_test": 200,
    },
    ("small", "mnist"): {"rounds": 150},
    ("small", "cifar10"): {"rounds": 300, "evaluation.every": 20, "client.batch_size": 20},
}

# The author code's `--epochs` counts rounds of one batch a worker, not passes over the data.
AUTHOR_ROUNDS = {"mnist": 150, "cifar10": 400}
FIGURE4_SHARES = (0.05, 0.10, 0.15, 0.20, 0.24)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to regenerate and how.

    `overrides` win over the file, the scale and the row; `note` is what captions say of them, which
    `regenerate` fills in.
    """

    dataset: str = "mnist"
    scale: str = "paper"
    seeds: int = 3
    convention: str = "paper"
    overrides: tuple[str, ...] = ()
    note: str = ""


def published(item: str, dataset: str) -> dict[tuple[str, str], float]:
    """(row, metric) -> the paper's number, in percent.

    >>> published("table1", "mnist")["1.5", "accuracy"]
    77.8
    """
    text = importlib.resources.files("fedjax_sec.papers").joinpath("alie.csv").read_text()
    return {
        (line["row"], line["metric"]): float(line["value"])
        for line in csv.DictReader(text.splitlines())
        if line["item"] == item and line["dataset"] == dataset
    }


def changes(item: str, convention: str = "paper") -> dict[str, dict]:
    """Row or line of an item -> what it changes in the base experiment."""
    defenses = CONVENTIONS[convention]
    clean = {"No Attack": {"attack": None, "defense": defenses["No Defense"]}}
    if item == "table1":
        rows = {"0": clean["No Attack"]}
        for z in ("0.5", "1", "1.5"):
            rows[z] = {
                "attack": {"name": "alie", "z": float(z)},
                "threat.num_malicious": "all",
                "defense": defenses["No Defense"],
            }
        return rows
    if item in ("figure2", "figure3"):
        attack = {"name": "alie", "z": 1.5 if item == "figure2" else 1.0}
        share = {} if item == "figure2" else {"threat.num_malicious": 0.20}
        return clean | {
            name: {"attack": attack, "defense": rule, **share} for name, rule in defenses.items()
        }
    if item == "figure4":
        return clean | {
            f"{name} {share:.0%}": {
                "attack": {"name": "alie", "z": 1.0},
                "threat.num_malicious": share,
                "defense": rule,
            }
            for name, rule in defenses.items()
            for share in FIGURE4_SHARES
        }
    backdoor = {"name": "sample" if item == "table2" else "pattern"}
    if item == "table2" and convention == "author":
        backdoor["modulus"] = 5
    attack = {"name": "alie_backdoor", "backdoor": backdoor, "z": 0.2, "alpha": 0.2}
    attack["convention"] = convention
    return clean | {name: {"attack": attack, "defense": rule} for name, rule in defenses.items()}


def make_cells(plan: Plan, items: Sequence[str], base: Mapping) -> dict:
    """(item, row) -> that row's cells, one a seed; rows with equal experiments share theirs."""
    base = foundation(base, SCALE_CHANGES.get((plan.scale, plan.dataset), {}), plan.overrides)
    shared, found = Shared(), {}
    for item in items:
        for row, change in changes(item, plan.convention).items():
            found[item, row] = []
            where = f"{item}, {row}"
            for seed in range(plan.seeds):
                with computed_from(plan.overrides, where):
                    own = _settle(base, change, item, seed)
                experiment = settled(base, own, seed, plan.overrides, where)
                if item in ("table2", "table3") and row != "No Attack":
                    demand(experiment.backdoor is not None, where, "an attack with a backdoor")
                label = f"{item} {row}" if change["attack"] else "No Attack"
                found[item, row].append(shared.cell({"run": label}, experiment))
    return found


def _settle(base: Mapping, row: Mapping, item: str, seed: int) -> dict:
    """The row with its share of malicious clients as a number, and each seed's backdoor sample."""
    row = dict(row)
    malicious = row.get("threat.num_malicious", base["threat"]["num_malicious"])
    share = 1.0 if malicious == "all" else malicious
    if isinstance(share, float):
        row["threat.num_malicious"] = int(share * base["data"]["num_clients"])
    if item == "table2" and row["attack"]:
        # "we chose each time one of the first 3 images from each training set"
        backdoor = row["attack"]["backdoor"] | {"index": seed % 3}
        row["attack"] = row["attack"] | {"backdoor": backdoor}
    return row


def regenerate(
    plan: Plan, items: Sequence[str], base: Mapping, out: Path, run: Callable | None = None
) -> list[Path]:
    """Runs what is missing in `out` and writes the items; returns the files written.

    `run(cells, folder)` runs cells (default: `sweep.run_cells`).
    """
    found = finish(make_cells(plan, items, base), out, run)
    written = []
    for item in items:
        rows = {row: results for (name, row), results in found.items() if name == item}
        writer = _write_table if item.startswith("table") else _write_figure
        note = said_of(plan.overrides, changes(item, plan.convention).values())
        written += writer(dataclasses.replace(plan, note=note), item, rows, out)
    return written


def _write_table(plan: Plan, item: str, rows: Mapping[str, list[Result]], out: Path) -> list[Path]:
    paper = published(item, plan.dataset)
    metrics = ["accuracy"] + (["backdoor"] if item != "table1" else [])
    lines = []
    for row, results in rows.items():
        line = {"z" if item == "table1" else "defense": row}
        for metric in metrics:
            if metric == "backdoor" and row == "No Attack":
                continue
            values = np.array([_value(result, metric, item) for result in results])
            number = paper.get((row, metric))
            line[f"{metric}: paper"] = number
            line[f"{metric}: ours"] = values.mean()
            if len(values) > 1:
                line[f"{metric}: spread"] = values.std(ddof=1)
            line[f"{metric}: difference"] = None if number is None else values.mean() - number
        rounds = AUTHOR_ROUNDS[plan.dataset]
        if results[0].experiment.rounds > rounds:
            early = np.array([_value(result, "accuracy", item, rounds) for result in results])
            line[f"accuracy: ours, best of {rounds} rounds"] = early.mean()
        if failed := diverged(results):
            line["diverged"] = failed
        lines.append(line)
    frame = pd.DataFrame(lines)
    path = out / f"{item}.csv"
    frame.to_csv(path, index=False, float_format="%.2f")
    label = next(iter(rows.values()))[0].summary["data"]["label"]
    head = (
        f"# A Little Is Enough, {item.replace('table', 'Table ')}: {label}\n\n"
        f"Percent, {over(plan.seeds)}{' (spread)' * (plan.seeds > 1)}; difference to the paper; "
        f"scale `{plan.scale}` ({next(iter(rows.values()))[0].experiment.rounds} rounds), "
        f"convention `{plan.convention}`. {_CAPTIONS[item]}{plan.note}\n\n"
    )
    markdown = path.with_suffix(".md")
    shown = frame.astype(object).where(frame.notna(), None)  # an empty field, not `nan`
    markdown.write_text(head + shown.to_markdown(index=False, floatfmt=".1f", missingval="") + "\n")
    return [markdown, path]


_CAPTIONS = {
    "table1": "Maximal test accuracy when all workers shift their updates by z standard deviations "
    "(m = n, no defence).",
    "table2": "Maximal test accuracy with a backdoor sample; `backdoor` is the share of "
    "evaluations, over all rounds, in which the model gave the sample the attacker's label (the "
    "paper: more than 95%, no number per row).",
    "table3": "Maximal test accuracy with a backdoor pattern; `backdoor` is the share of stamped "
    "test images classified as the attacker wants by the model of maximal accuracy.",
}


def _value(result: Result, metric: str, item: str, rounds: int | None = None) -> float:
    """Percent: the maximal accuracy, or the backdoor's success, of one run.

    Algorithm 1 returns the parameters that maximised test accuracy; the pattern is measured there.
    """
    metrics = result.metrics
    within = metrics["round"] <= (rounds or np.inf)
    best = best_evaluation(metrics, among=within)
    if metric == "accuracy":
        return 100 * metrics["accuracy"][best]
    success = metrics["attack_success_rate"]
    return 100 * (success[1:].mean() if item == "table2" else success[best])


def _write_figure(plan: Plan, item: str, rows: Mapping[str, list[Result]], out: Path) -> list[Path]:
    figure, axes = plotting.subplots(figsize=(6, 4.2), layout="constrained")
    label = next(iter(rows.values()))[0].summary["data"]["label"]
    if item == "figure4":
        _plot_shares(axes, rows)
        axes.set(xlabel="malicious workers (%)", ylabel="maximal test accuracy (%)")
    else:
        plotting.curves(axes, rows)
        axes.set(xlabel="round", ylabel="test accuracy (%)")
    setting = _setting(item, list(rows.values())[-1][0].experiment)
    formulas = ", author code's formulas" if plan.convention == "author" else ""
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.legend()
    title = f"{label}: {setting} ({plan.scale} scale{formulas}), {plotting.band_of(plan.seeds)}"
    plotting.titled(figure, f"{title}.{plan.note}")
    return plotting.save(figure, out / item)


def _setting(item: str, attacked: Experiment) -> str:
    """The attacked rows' share of malicious workers, where it is one, and ALIE's z."""
    share = attacked.threat.num_malicious / attacked.data.num_clients
    parts = [f"m = {share:.0%}"] if item != "figure4" else []
    parts += [f"z = {stage.z:g}" for stage in attacked.attack.stages if hasattr(stage, "z")]
    return ", ".join(parts)


def _plot_shares(axes, rows: Mapping[str, list[Result]]) -> None:
    shares = [0.0, *(100 * share for share in FIGURE4_SHARES)]
    for name in DEFENSES:
        points = [rows["No Attack"], *(rows[f"{name} {share:.0%}"] for share in FIGURE4_SHARES)]
        values = np.array([[_value(r, "accuracy", "figure4") for r in point] for point in points])
        (line,) = axes.plot(shares, values.mean(1), "o-", label=name)
        if values.shape[1] > 1:
            plotting.spread_of(axes, shares, values.T, line)
        for share, point, value in zip(shares, points, values.mean(1), strict=True):
            if diverged(point):
                plotting.crosses(axes, share, value, line.get_color())

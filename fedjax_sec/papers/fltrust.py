"""Table III of *FLTrust* (Cao, Fang, Liu, Gong 2021), and what changes its numbers.

An item is the table or a curve over one setting; its cells are experiments on top of
`configs/fltrust/DATASET.yaml`. Testing error rates and attack success rates are shares in [0, 1],
as in the paper, of the global model after the last round.
"""

import csv
import dataclasses
import fnmatch
import importlib.resources
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from fedjax_sec import core
from fedjax_sec.attacks.update.scaling import CORNER
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
from fedjax_sec.runs import config as config_lib
from fedjax_sec.runs.config import Experiment
from fedjax_sec.runs.experiment import Result, best_evaluation

SCALES = ("smoke", "small", "paper")
DATASETS = (
    "mnist-0.1",
    "mnist-0.5",
    "fashion_mnist",
    "cifar10",
    "har",
    "har_windows",
    "ch_mnist",
)

DEFENSES = ("FedAvg", "Krum", "Trim-mean", "Median", "FLTrust")
#: FLTrust with steps as long as the author code's. Its losses are summed, there and in clients, and
#: divided by the clients' batch; the server's batch is the whole root data set, so FLTrust's steps
#: are (root / batch) times as long as those of a mean, while FedAvg's are the same. The text does
#: not say which it means, so the tables have both.
LONG_STEPS = "FLTrust, author's step"
COLUMNS = (*DEFENSES, LONG_STEPS)


def corner(side: int, target: int) -> dict:
    """The attack's default trigger in the lower right corner of `side` x `side` pixels (a choice).

    >>> corner(28, 0) == CORNER
    True
    """
    pixels = [[i + side - 28, j + side - 28] for i, j in CORNER["pixels"]]
    return CORNER | {"pixels": pixels, "target": target}


#: The second pooling of Table II's network drops a row and a column, and with them all pixels of
#: rows and columns 26 and 27: three of the trigger's four. On its data sets the table has this row
#: too: the same trigger two pixels farther up and left, where the network sees it (a choice).
IN_SIGHT = "Scaling attack, trigger in sight"

#: The trigger of the Scaling attack where it is not the attack's default (Section VI-A). For
#: CIFAR-10 the text refers to Bagdasaryan et al., whose published code has no pattern of pixels.
TRIGGERS = {
    "cifar10": corner(32, target=2),
    "ch_mnist": corner(64, target=0),
    "har": {"name": "feature_trigger", "every": 20, "value": 0.0, "target": 1},
    "har_windows": {"name": "feature_trigger", "every": 20, "value": 0.0, "target": 1},
}

# What the scales change of configs/fltrust/DATASET.yaml, the paper's scale, for a kind of data sets
# and for one. `smoke` only shows that every part works. `small` is for a CPU; HAR is small enough
# to be run in full.
SCALE_CHANGES: Mapping[tuple[str, str], Mapping] = {
    ("smoke", "har"): {"rounds": 4, "evaluation.every": 2},
    ("smoke", "image"): {
        "rounds": 2,
        "evaluation.every": 1,
        "data.max_train": 2000,
        "data.max_test": 200,
        "data.num_clients": 20,
        "threat.num_malicious": 4,
        "client.batch_size": 8,
    },
    ("smoke", "resnet"): {
        "rounds": 2,
        "evaluation.every": 1,
        "data.max_train": 2000,
        "data.max_test": 20,
        "data.num_clients": 20,
        "threat.num_malicious": 4,
        "client.batch_size": 4,
        "server.root.size": 20,
    },
    ("small", "image"): {
        "rounds": 400,
        "evaluation.every": 20,
        "data.max_test": 2000,
        "data.num_clients": 20,
        "threat.num_malicious": 4,
    },
    # A fifth of the paper's rounds at ten times its rate, which on MNIST is a small one. After a
    # tenth of the rounds FLTrust, whose steps are as long as the server's own, has not yet learned.
    ("small", "mnist-0.1"): {"client.optimizer.learning_rate": 0.096},
    ("small", "mnist-0.5"): {"client.optimizer.learning_rate": 0.096},
    ("small", "resnet"): {
        "rounds": 200,
        "evaluation.every": 20,
        "data.max_test": 500,
        "data.num_clients": 20,
        "threat.num_malicious": 4,
        "client.batch_size": 16,
    },
}

#: V of the paper's adaptive attack, where a scale cannot afford its ten: most of a round's time.
SWEEPS = {("smoke", "image"): 2, ("small", "image"): 2, ("smoke", "resnet"): 2}

CURVES = {
    "malicious": "share of malicious clients",
    "root_size": "size of the root data set",
    "bias": "bias probability of the root data set",
    "q": "q of the partition",
}
TABLES = {"table3": "Table III", "adaptive": "adaptive attacks"}
ITEMS = (*TABLES, "norms", *CURVES)
#: What normalises inside ResNet20: where batch norm's running statistics are, or group norm.
NORMS = {
    "aggregated": {"name": "resnet", "depth": 20, "norm": "batch", "statistics": "aggregated"},
    "local": {"name": "resnet", "depth": 20, "norm": "batch", "statistics": "local"},
    "group": {"name": "resnet", "depth": 20, "norm": "group"},
}
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4)
SIZES = (10, 50, 100, 200, 500)
BIASES = (0.2, 0.4, 0.6, 0.8, 1.0)
QS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to regenerate and how.

    `only` picks cells: each of its patterns is `ATTACK / DEFENSE`, `*` stands for any; none is all.
    `overrides` win over the file, the scale and the row; `note` is what captions say of them, which
    `regenerate` fills in.
    """

    dataset: str = "har_windows"
    scale: str = "paper"
    seeds: int = 3
    overrides: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    note: str = ""

    @property
    def kind(self) -> str:
        """`har`, `image` or `resnet`: what the scales tell apart."""
        if self.dataset in ("cifar10", "ch_mnist"):
            return "resnet"
        return "har" if self.dataset.startswith("har") else "image"


def published(dataset: str) -> dict[tuple[str, str, str], float]:
    """(row, column, metric) -> the paper's number, where the text at hand gives it.

    Table III is cut off there; what its prose says is included.

    >>> published("mnist-0.5")["Krum attack", "Krum", "error"]
    0.91
    """
    text = importlib.resources.files("fedjax_sec.papers").joinpath("fltrust.csv").read_text()
    return {
        (line["row"], line["column"], line["metric"]): float(line["value"])
        for line in csv.DictReader(text.splitlines())
        if line["dataset"] == dataset
    }


def defense(column: str, base: Mapping, bound: int | None = None) -> dict:
    """What a column changes: the rule, whose f (Krum) and k (Trim-mean) are `bound`.

    The default is the malicious clients' number. "We set f = k = m", without an attack too: the
    rules are the same in every row (Section VI-A).
    """
    bound = base["threat"]["num_malicious"] if bound is None else bound
    rules = {
        "FedAvg": {"name": "mean"},
        "Krum": {"name": "krum", "num_byzantine": bound},
        "Trim-mean": {"name": "trimmed_mean", "variant": "extremes", "num_byzantine": bound},
        "Median": {"name": "median"},
        "FLTrust": {"name": "fltrust"},
        LONG_STEPS: {"name": "fltrust"},
    }
    return {"defense": rules[column]}


def stretched(experiment: Experiment) -> Experiment:
    """The experiment with the server's own rate, wherever it is from, times root / batch.

    FLTrust's aggregate is as long as the server's own update, so both can be stretched here.

    Raises: `ConfigError` for a rate that is no number.
    """
    if experiment.trainer is None:  # no rule here trains on the server
        return experiment
    spec = experiment.to_dict()
    step = spec["server"]["optimizer"]
    if not isinstance(step["learning_rate"], int | float):
        raise core.ConfigError(
            f"server.optimizer.learning_rate: the column {LONG_STEPS!r} multiplies it, so it "
            f"must be a number, got {step['learning_rate']!r}."
        )
    step["learning_rate"] *= experiment.trainer.batch_size / experiment.client.batch_size
    return config_lib.from_mapping(spec)


def attacks(dataset: str) -> dict[str, dict]:
    """The rows of Table III: what each changes in an experiment."""
    trigger = TRIGGERS.get(dataset, CORNER)
    scaling = {"name": "scaling", "backdoor": trigger}
    return {
        # With the success of the trigger that nobody taught, to compare the Scaling attack with.
        "No attack": {
            "attack": None,
            "threat.num_malicious": 0,
            "evaluation.backdoor": trigger,
        },
        "LF attack": {"attack": "label_flip"},
        "Krum attack": {"attack": "krum_attack"},
        "Trim attack": {"attack": "trim_attack"},
        "Scaling attack": {"attack": scaling},
        **(
            {IN_SIGHT: {"attack": scaling | {"backdoor": corner(26, target=0)}}}
            if trigger is CORNER
            else {}
        ),
        "Adaptive attack": {"attack": "fltrust_adaptive"},
    }


def rows(item: str, plan: Plan, base: Mapping) -> dict[tuple[str, str, str], dict]:
    """(row, column, x) -> what that cell changes; x is empty in the table."""
    known = attacks(plan.dataset)
    if (sweeps := SWEEPS.get((plan.scale, plan.kind))) is not None:
        known["Adaptive attack"] = {"attack": {"name": "fltrust_adaptive", "rounds": sweeps}}
    clients = base["data"]["num_clients"]
    if item in TABLES:
        if item == "adaptive":  # what ascending through the rule itself gains
            known = {name: known[name] for name in ("No attack", "Adaptive attack")}
            known["Gradient adaptive attack"] = {"attack": "gradient_adaptive"}
        return {
            (row, column, ""): change | defense(column, base)
            for row, change in known.items()
            for column in COLUMNS
        }
    if item == "norms":
        if plan.kind != "resnet":
            return {}  # nothing else has batch norm
        return {
            (row, column, norm): known[row] | defense(column, base) | {"model": model}
            for row in ("No attack", "Trim attack")
            for column in ("FedAvg", "FLTrust")
            for norm, model in NORMS.items()
        }
    scaling = IN_SIGHT if IN_SIGHT in known else "Scaling attack"
    some = {name: known[name] for name in ("Trim attack", scaling, "Adaptive attack")}
    if item == "malicious":
        numbers = {share: round(share * clients) for share in SHARES}
        return {
            (row, column, str(share)): (change if share else known["No attack"])
            | defense(column, base, bad)
            | {"threat.num_malicious": bad}
            for row, change in some.items()
            for column in DEFENSES
            for share, bad in numbers.items()
        }
    if item == "q":
        if plan.kind == "har":
            return {}  # the users are the clients
        return {
            (row, column, str(q)): change
            | defense(column, base)
            | {"data.partition": {"name": "label_groups", "q": q}}
            for row, change in some.items()
            for column in DEFENSES
            for q in QS
        }
    values = {
        "root_size": {str(size): {"server.root": {"size": size}} for size in SIZES},
        "bias": {
            str(bias): {"server.root": {"size": 100, "sampling": "biased", "bias": bias}}
            for bias in BIASES
        },
    }[item]
    return {
        (row, "FLTrust", x): change | defense("FLTrust", base) | setting
        for row, change in ({"No attack": known["No attack"]} | some).items()
        for x, setting in values.items()
    }


def picked(plan: Plan, named: Mapping[tuple[str, str, str, str], dict]) -> dict:
    """What `plan.only` leaves of named cells; a pattern that fits none is a `ConfigError`."""
    if not plan.only:
        return dict(named)
    names = {key: f"{key[1]} / {key[2]}" for key in named}
    known = list(dict.fromkeys(names.values()))
    for pattern in plan.only:
        if not fnmatch.filter(known, pattern):
            raise core.ConfigError(
                f"only: {pattern!r} is no cell. Give ATTACK / DEFENSE, with * for any; here are "
                f"{', '.join(known)}.{core.suggestion(pattern, known)}"
            )
    fits = {name for pattern in plan.only for name in fnmatch.filter(known, pattern)}
    return {key: change for key, change in named.items() if names[key] in fits}


def _rows(plan: Plan, items: Sequence[str], base: Mapping) -> tuple[dict, dict]:
    """What rows build on, and (item, row, column, x) -> what that cell changes."""
    scale: dict = {}
    for owner in (plan.kind, plan.dataset):
        scale |= SCALE_CHANGES.get((plan.scale, owner), {})
    base = foundation(base, scale, plan.overrides)
    with computed_from(plan.overrides, ", ".join(items)):
        named = {
            (item, *key): change for item in items for key, change in rows(item, plan, base).items()
        }
    return base, picked(plan, named)


def make_cells(plan: Plan, items: Sequence[str], base: Mapping) -> dict:
    """(item, row, column, x) -> that cell's experiments, one a seed; equal ones are shared.

    Raises `ConfigError` where a pattern of `plan.only` fits no cell.
    """
    base, named = _rows(plan, items, base)
    shared, found = Shared(), {}
    for (item, row, column, x), change in named.items():
        name = " ".join(filter(None, (item if x else "", row, column, x)))
        found[item, row, column, x] = []
        for seed in range(plan.seeds):
            experiment = settled(base, change, seed, plan.overrides, f"{item}, {row} / {column}")
            if column == LONG_STEPS:
                experiment = stretched(experiment)
            if item == "norms":
                given = experiment.evaluation.diagnostics
                demand(given, f"{item}, {row} / {column}", "evaluation.diagnostics")
            found[item, row, column, x].append(shared.cell({"run": name}, experiment))
    return found


def regenerate(
    plan: Plan, items: Sequence[str], base: Mapping, out: Path, run: Callable | None = None
) -> list[Path]:
    """Runs what is missing in `out` and writes the items; returns the files written.

    `run(cells, folder)` runs cells (default: `sweep.run_cells`).
    """
    done = finish(make_cells(plan, items, base), out, run)
    _, named = _rows(plan, items, base)
    written = []
    for item in items:
        changes = [change for (owner, *_), change in named.items() if owner == item]
        noted = dataclasses.replace(plan, note=said_of(plan.overrides, changes))
        results = {tuple(key): found for (owner, *key), found in done.items() if owner == item}
        if results:
            write = dict.fromkeys(TABLES, _write_table) | {"norms": _write_norms}
            written += write.get(item, _write_curves)(noted, item, results, out)
    return written


def measured(results: Sequence[Result], which: int = -1) -> dict[str, np.ndarray]:
    """Error, and success where there is a backdoor, of each seed after the last round.

    `which=None` takes the evaluation with the smallest error instead.
    """
    found: dict[str, list] = {}
    for result in results:
        error = 1 - result.metrics["accuracy"]
        at = best_evaluation(result.metrics) if which is None else which
        found.setdefault("error", []).append(error[at])
        names = [stage.registered_name for stage in result.experiment.attack.stages]
        if "attack_success_rate" in result.metrics and names in ([], ["scaling"]):
            found.setdefault("success", []).append(result.metrics["attack_success_rate"][at])
    return {name: np.array(values) for name, values in found.items()}


def _describe(plan: Plan, result: Result, item: str) -> str:
    experiment = result.experiment
    root = f"root data set of {experiment.server.root.size}, " if item != "root_size" else ""
    sweeps = SWEEPS.get((plan.scale, plan.kind))
    adaptive = f"adaptive attack with V = {sweeps} sweeps, " if sweeps and item != "norms" else ""
    return (
        f"{result.summary['data']['label']}, `{experiment.model.registered_name}`, "
        f"{experiment.data.num_clients} clients, "
        f"{experiment.rounds} rounds of one batch of {experiment.client.batch_size}, {root}"
        f"{adaptive}scale `{plan.scale}`, {over(plan.seeds)}"
    )


def _cell(results: Sequence[Result]) -> str:
    """`0.03 ± 0.01`, and for a backdoor `error / success`; says how many seeds diverged."""
    values = measured(results)
    parts = []
    for name in ("error", "success"):
        if name in values:
            spread = f" ± {values[name].std(ddof=1):.2f}" if len(values[name]) > 1 else ""
            parts.append(f"{values[name].mean():.2f}{spread}")
    failed = diverged(results)
    return " / ".join(parts) + (f" ({failed} diverged)" if failed else "")


def _write_table(plan, item, results: Mapping, out: Path) -> list[Path]:
    paper = published(plan.dataset)
    shown: dict[str, dict] = {}
    lines = []
    for (row, column, _), found in results.items():
        last, best = measured(found), measured(found, None)
        theirs = [paper.get((row, column, name)) for name in ("error", "success")]
        text = " / ".join(f"{value:.2f}" for value in theirs if value is not None)
        shown.setdefault(row, {"attack": row})
        shown[row] |= {f"{column}: paper": text, f"{column}: ours": _cell(found)}
        line = {"attack": row, "defense": column}
        for name, values in last.items():
            line |= {f"{name}: mean": values.mean(), f"{name}: best": best[name].mean()}
            line[f"{name}: paper"] = paper.get((row, column, name))
            if len(values) > 1:
                line[f"{name}: spread"] = values.std(ddof=1)
        if failed := diverged(found):
            line["diverged"] = failed
        lines.append(line)
    path = out / f"{item}.csv"
    pd.DataFrame(lines).to_csv(path, index=False, float_format="%.4f")
    one = list(results.values())[-1][0]
    described = _describe(plan, one, item)
    head = (
        f"# FLTrust, {TABLES[item]}\n\n{described}. "
        f"Testing error rate after the last round / success rate of the Scaling attack's trigger"
        f"{', ± standard deviation' * (plan.seeds > 1)}. Empty: not in the text at hand. "
        f"`{LONG_STEPS}` multiplies the server's rate.{plan.note}\n\n"
    )
    order = ["attack", *(f"{one}: {whose}" for one in COLUMNS for whose in ("paper", "ours"))]
    frame = pd.DataFrame(shown.values(), columns=order).replace("", None)
    frame = frame.dropna(axis=1, how="all").fillna("")
    markdown = path.with_suffix(".md")
    markdown.write_text(head + frame.to_markdown(index=False, disable_numparse=True) + "\n")
    return [markdown, path]


def _write_norms(plan, item, results: Mapping, out: Path) -> list[Path]:
    lines = []
    for (row, column, norm), found in results.items():
        line = {"attack": row, "defense": column, "norm": norm}
        error = measured(found)["error"]
        line["error"] = error.mean()
        if len(error) > 1:
            line["error: spread"] = error.std(ddof=1)
        if column == "FLTrust":
            for whose in ("honest", "malicious"):
                scores = np.array([result.metrics[f"kept_{whose}"] for result in found])
                line[f"trust, {whose}: first"] = scores[:, 0].mean()
                line[f"trust, {whose}: mean"] = scores.mean()
        if failed := diverged(found):
            line["diverged"] = failed
        lines.append(line)
    frame = pd.DataFrame(lines)
    path = out / f"{item}.csv"
    frame.to_csv(path, index=False, float_format="%.4f")
    one = list(results.values())[-1][0]
    described = _describe(plan, one, item)
    head = (
        f"# FLTrust, what normalises in ResNet20\n\n{described}. Testing error rate after "
        f"the last round; trust scores in the first round and on average over evaluated rounds."
        f"{plan.note}\n\n"
    )
    shown = frame.astype(object).where(frame.notna(), None)
    markdown = path.with_suffix(".md")
    markdown.write_text(head + shown.to_markdown(index=False, floatfmt=".2f", missingval="") + "\n")
    return [markdown, path]


def _write_curves(plan, item, results: Mapping, out: Path) -> list[Path]:
    panels = list(dict.fromkeys(row for row, _, _ in results))
    figure, axes = plotting.subplots(
        1,
        len(panels),
        figsize=(3.6 * len(panels), 3.3),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    lines = []
    for panel, row in zip(axes[0], panels, strict=True):
        for column in dict.fromkeys(c for r, c, _ in results if r == row):
            found = {float(x): f for (r, c, x), f in results.items() if (r, c) == (row, column)}
            points = {x: measured(several) for x, several in found.items()}
            for x, values in points.items():
                line = {"attack": row, "defense": column, "x": x}
                for metric, each in values.items():
                    line[metric] = each.mean()
                    if len(each) > 1:
                        line[f"{metric}: spread"] = each.std(ddof=1)
                if failed := diverged(found[x]):
                    line["diverged"] = failed
                lines.append(line)
            metrics = ("error", "success") if row.startswith("Scaling") else ("error",)
            for metric, style in zip(metrics, ("-o", "--^"), strict=False):
                known = {x: values[metric] for x, values in points.items() if metric in values}
                if not known:  # no backdoor any more
                    continue
                label = column if metric == "error" else None
                values = np.stack(list(known.values()), axis=1)
                color = f"C{DEFENSES.index(column)}"
                (drawn,) = panel.plot(
                    list(known), values.mean(0), style, color=color, label=label, ms=4
                )
                if plan.seeds > 1:
                    plotting.spread_of(panel, list(known), values, drawn)
                for x in known:
                    if diverged(found[x]):
                        plotting.crosses(panel, x, known[x].mean(), color)
        panel.set(title=row, xlabel=CURVES[item], ylim=(-0.02, 1.02))
        panel.grid(alpha=0.3)
    if item == "root_size":
        for panel in axes[0]:
            panel.set_xscale("log")
            panel.set_xticks(SIZES, labels=SIZES)
            panel.minorticks_off()
    axes[0, 0].set_ylabel("testing error rate (dashed: attack success)")
    plotting.legend_below(figure)
    one = list(results.values())[-1][0]
    described = _describe(plan, one, item)
    band = ", band: ± one standard deviation" if plan.seeds > 1 else ""
    plotting.titled(figure, f"{described}{band}. After the last round.{plan.note}", size=9)
    path = out / f"{item}.csv"
    pd.DataFrame(lines).to_csv(path, index=False, float_format="%.4g")
    return [*plotting.save(figure, out / item), path]

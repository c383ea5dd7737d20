"""The tables and figures of *Defending against Backdoors in Federated Learning with Robust
Learning Rate* (Ozdayi, Kantarcioglu and Gel 2021).

An item is a table or a figure; its rows are experiments on top of a file of `configs/rlr/`, and
rows that items share are run once. Without clipping M and sigma are 0, as in the paper's tables.
"""

import csv
import dataclasses
import importlib.resources
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
import pandas as pd

from fedjax_sec.evaluation import attribution
from fedjax_sec.papers._runs import (
    Shared,
    computed_from,
    demand,
    diverged,
    finish,
    folder_of,
    foundation,
    over,
    percent,
    said_of,
    settled,
)
from fedjax_sec.report import plotting
from fedjax_sec.runs import loading
from fedjax_sec.runs.config import Experiment
from fedjax_sec.runs.experiment import Result
from fedjax_sec.runs.source import load_source

SCALES = ("smoke", "small", "paper")
NON_IID = ("mnist_by_writer", "femnist_digits")

#: Clipping threshold M and noise sigma of Table 1 where there are any.
CLIPPING = {"iid": (4.0, 1e-3), "noniid": (0.5, 1e-3)}
#: Learning rate of the server under sign aggregation: the text gives none, so this is a choice.
SIGN_LEARNING_RATE = 1e-3
#: FoolsGold with many users compares output layers: whole histories would be N D floats.
FEATURES = {"iid": None, "noniid": 1290}
SETTINGS = {"iid": "fashion_mnist", "noniid": None, "cifar10": "cifar10"}

# What the scales change of the files in configs/rlr/, which are the paper's scale. `smoke` only
# shows that every part works. `small` is for a CPU; on CIFAR10 its network is narrower, and without
# dropout; a tenth of the images in batches of a tenth keep the number of local steps.
SCALE_CHANGES: Mapping[tuple[str, str], Mapping] = {
    ("smoke", "iid"): {
        "rounds": 2,
        "evaluation.every": 1,
        "data.max_train": 400,
        "data.max_test": 200,
        "client.batch_size": 20,
        "client.epochs": 1,
    },
    ("smoke", "noniid"): {
        "rounds": 2,
        "evaluation.every": 1,
        "data.max_test": 200,
        "client.epochs": 1,
        "server.clients_per_round": 9,
    },
    ("smoke", "cifar10"): {
        "rounds": 2,
        "evaluation.every": 1,
        "data.max_train": 400,
        "data.max_test": 200,
        "client.batch_size": 10,
        "client.epochs": 1,
    },
    ("small", "iid"): {
        "rounds": 120,
        "evaluation.every": 10,
        "data.max_train": 500,
        "data.max_test": 2000,
        "client.batch_size": 25,
    },
    ("small", "noniid"): {
        "rounds": 60,
        "evaluation.every": 10,
        "data.max_train": 12000,
        "data.max_test": 2000,
        "data.num_clients": 100,
        "threat.num_malicious": 10,
        "client.epochs": 1,
        "client.batch_size": 16,
    },
    ("small", "cifar10"): {
        "rounds": 200,
        "evaluation.every": 10,
        "data.max_train": 5000,
        "data.max_test": 1000,
        "client.batch_size": 25,
        "model": {
            "name": "rlr_cifar10",
            "channels": [16, 32, 64],
            "hidden": [64, 64],
            "dropout": 0.0,
        },
    },
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to regenerate and how. `non_iid` is the data set of the bottom half of Table 1.

    `overrides` win over the file, the scale and the row; `note` is what captions say of them, which
    `regenerate` fills in.
    """

    scale: str = "paper"
    seeds: int = 1
    non_iid: str = "mnist_by_writer"
    overrides: tuple[str, ...] = ()
    note: str = ""

    def config(self, setting: str) -> str:
        """The file of `configs/rlr/`, without suffix, for `iid`, `noniid` or `cifar10`."""
        return SETTINGS[setting] or self.non_iid


@dataclasses.dataclass(frozen=True)
class Item:
    """A table or figure: its setting, its title, and what is made of its rows' runs."""

    setting: str
    title: str
    rows: Callable[[str, int], dict[str, dict]]
    write: Callable


def published(item: str) -> dict[tuple[str, str], float]:
    """(row, metric) -> the paper's number, in percent.

    >>> published("table1-iid")["FedAvg with RLR", "backdoor"]
    0.0
    """
    text = importlib.resources.files("fedjax_sec.papers").joinpath("rlr.csv").read_text()
    return {
        (line["row"], line["metric"]): float(line["value"])
        for line in csv.DictReader(text.splitlines())
        if line["item"] == item
    }


def stages(aggregator: str, setting: str, *, rlr=False, clipped=False) -> dict:
    """What one of Table 1's rows changes in an experiment: defence, server and projection.

    The order is Equation 2 with the learning rate of Equation 5: clip, aggregate, add noise,
    reverse. Every agent projects its own update (Section 4), the corrupt ones too.
    `rlr` is False, True (the file's threshold) or a threshold of any kind.
    """
    rules = {
        "FedAvg": {"name": "mean"},
        "FoolsGold": {"name": "foolsgold", "num_features": FEATURES[setting]},
        "Comed": {"name": "median", "middle": "lower"},  # as the author code's torch.median
        "Sign": {"name": "sign"},
    }
    defense = [rules[aggregator]]
    found = {}
    if clipped:
        norm, sigma = CLIPPING[setting]
        defense = [
            {"name": "clip_norm", "max_norm": norm},
            *defense,
            {"name": "gaussian_noise", "std": sigma, "max_norm": norm},
        ]
        found["client.max_norm"] = norm
    if rlr:
        theta = {"iid": 4, "noniid": 8}[setting] if rlr is True else rlr
        defense.append({"name": "rlr", "threshold": theta})
    if aggregator == "Sign":
        found["server.optimizer"] = {"name": "sgd", "learning_rate": SIGN_LEARNING_RATE}
    return found | {"defense": defense}


INFLUENCE_ROWS = ("FedAvg", "FedAvg with RLR")
_CLEAN = {"attack": None, "threat.num_malicious": 0}


def _table1(setting, rounds):
    rows = {"FedAvg-No Attack": stages("FedAvg", setting) | _CLEAN}
    for name in ("FedAvg", "FoolsGold", "Comed", "Sign"):
        rows[name] = stages(name, setting)
        rows[f"{name}, clipping and noise"] = stages(name, setting, clipped=True)
    rows["FedAvg with RLR"] = stages("FedAvg", setting, rlr=True)
    rows["FedAvg with RLR, clipping and noise"] = stages("FedAvg", setting, rlr=True, clipped=True)
    # Measuring changes no run, so Figure 4 is drawn from the table's own.
    for name in INFLUENCE_ROWS:
        rows[name] |= {"evaluation.influence": {"max_images": 500}}
    return rows


def _combined(setting, rounds):
    return {
        f"{name} with RLR{', clipping and noise' * clipped}": stages(
            name, setting, rlr=True, clipped=clipped
        )
        for name in ("Comed", "Sign")
        for clipped in (False, True)
    }


def _curves(setting, rounds):
    rows = _table1(setting, rounds)
    return {
        name: rows[name]
        for name in (
            "FedAvg",
            "FedAvg with RLR",
            "FedAvg, clipping and noise",
            "FedAvg with RLR, clipping and noise",
        )
    }


def _three(setting, rounds):
    rows = _table1(setting, rounds)
    return {name: rows[name] for name in ("FedAvg-No Attack", "FedAvg", "FedAvg with RLR")}


def _influence(setting, rounds):
    rows = _table1(setting, rounds)
    return {name: rows[name] for name in INFLUENCE_ROWS}


def _removal(setting, rounds):
    table = _table1(setting, rounds)
    theta = {"schedule": "steps", "values": {0: 0, rounds // 2: 4}}
    return {
        "FedAvg": table["FedAvg"],
        f"RLR from round {rounds // 2}": stages("FedAvg", setting, rlr=theta),
        "FedAvg with RLR": table["FedAvg with RLR"],
    }


def _patterns(setting, rounds):
    found = {}
    for pattern in ("square", "copyright", "apple"):
        both = {"name": "trojan", "base": 5, "target": 7, "pattern": pattern}
        change = {"attack": both, "evaluation.backdoor": both}
        found[f"{pattern}: FedAvg"] = stages("FedAvg", setting) | change
        found[f"{pattern}: FedAvg with RLR"] = stages("FedAvg", setting, rlr=True) | change
    return found


def _semantic(setting, rounds):
    flip = {"name": "label_flip", "base": 5, "target": 7}
    measured = {"evaluation.backdoor": flip}
    boosted = {"attack": [flip, {"name": "boost", "factor": 10.0}]} | measured
    return {
        "FedAvg, not boosted": stages("FedAvg", setting) | {"attack": flip} | measured,
        "FedAvg": stages("FedAvg", setting) | boosted,
        "FedAvg, clipping and noise": stages("FedAvg", setting, clipped=True) | boosted,
        "FedAvg with RLR": stages("FedAvg", setting, rlr=True) | boosted,
        "FedAvg with RLR, clipping and noise": stages("FedAvg", setting, rlr=True, clipped=True)
        | boosted,
    }


def _cifar10(split):
    def rows(setting, rounds):
        trojan = {"name": "trojan", "base": 5, "target": 7, "fraction": 0.5}
        trojan |= {"split": 4, "parts": "author"} if split else {}
        mean = {"attack": trojan, "defense": {"name": "mean"}}
        rlr = {"attack": trojan, "defense": ["mean", {"name": "rlr", "threshold": 8}]}
        return {"FedAvg-No Attack": mean | _CLEAN, "FedAvg": mean, "FedAvg with RLR": rlr}

    return rows


def _rows(plan: Plan, name: str, bases: Mapping[str, Mapping]) -> tuple[dict, dict[str, dict]]:
    """What an item's rows build on, and what each changes."""
    item = ITEMS[name]
    scale = SCALE_CHANGES.get((plan.scale, item.setting), {})
    base = foundation(bases[item.setting], scale, plan.overrides)
    with computed_from(plan.overrides, name):
        return base, item.rows(item.setting, base["rounds"])


def make_cells(plan: Plan, items: Sequence[str], bases: Mapping[str, Mapping]) -> dict:
    """(item, row) -> that row's cells, one a seed; rows with equal experiments share theirs.

    `bases` maps a setting to the experiment of its file.
    """
    shared, found = Shared(), {}
    for name in items:
        base, rows = _rows(plan, name, bases)
        for row, change in rows.items():
            found[name, row] = []
            for seed in range(plan.seeds):
                where = f"{name}, {row}"
                experiment = settled(base, change, seed, plan.overrides, where)
                _check(name, experiment, where)
                axes = {"setting": ITEMS[name].setting, "run": f"{name} {row}"}
                found[name, row].append(shared.cell(axes, experiment))
    return found


def _check(name: str, experiment: Experiment, where: str) -> None:
    write, backdoor = ITEMS[name].write, experiment.backdoor
    demand(backdoor is not None, where, "a backdoor (evaluation.backdoor)")
    if write is _write_influence:
        demand(experiment.evaluation.influence is not None, where, "evaluation.influence")
    if write is _write_features:
        demand(backdoor.base is not None, where, "a backdoor with a base class")
        demand(experiment.checkpoint.keep_params, where, "checkpoint.keep_params")


def regenerate(
    plan: Plan,
    items: Sequence[str],
    bases: Mapping[str, Mapping],
    out: Path,
    run: Callable | None = None,
) -> list[Path]:
    """Runs what is missing in `out` and writes the items; returns the files written.

    `run(cells, folder)` runs cells (default: `sweep.run_cells`).
    """
    by_row = make_cells(plan, items, bases)
    done = finish(by_row, out, run)
    written = []
    for name in items:
        rows = {row: cells for (item, row), cells in by_row.items() if item == name}
        results = {row: done[name, row] for row in rows}
        folders = {row: folder_of(found[0], out) for row, found in rows.items()}
        note = said_of(plan.overrides, _rows(plan, name, bases)[1].values())
        noted = dataclasses.replace(plan, note=note)
        written += ITEMS[name].write(noted, name, results, folders, out)
    return written


_METRICS = {
    "backdoor": "attack_success_rate",
    "validation": "accuracy",
    "base": "base_class_accuracy",
}


def _describe(plan: Plan, experiment: Experiment, label: str) -> str:
    data, client = experiment.data, experiment.client
    return (
        f"{label}, {data.num_clients} agents ({experiment.clients_per_round} a round, "
        f"{experiment.threat.num_malicious} corrupt), {experiment.rounds} rounds, "
        f"{client.epochs} local epochs of batch {client.batch_size}, scale `{plan.scale}`"
    )


def _write_table(plan, name, rows: Mapping[str, list[Result]], folders, out: Path) -> list[Path]:
    paper = published(name)
    lines = []
    for row, results in rows.items():
        line = {"aggregation": row}
        for title, metric in _METRICS.items():
            values = percent(results, metric)
            number = paper.get((row, title))
            if paper:
                line[f"{title}: paper"] = number
            line[f"{title}: ours"] = values.mean()
            if plan.seeds > 1:
                line[f"{title}: spread"] = values.std(ddof=1)
        if failed := diverged(results):
            line["diverged"] = failed
        lines.append(line)
    frame = pd.DataFrame(lines)
    path = out / f"{name}.csv"
    frame.to_csv(path, index=False, float_format="%.2f")
    attacked = list(rows.values())[-1][0]
    head = (
        f"# Robust learning rate, {ITEMS[name].title}\n\n"
        f"{_describe(plan, attacked.experiment, attacked.summary['data']['label'])}. Percent after "
        f"the last round, {over(plan.seeds)}.{plan.note}\n\n"
    )
    markdown = path.with_suffix(".md")
    shown = frame.astype(object).where(frame.notna(), None)
    markdown.write_text(head + shown.to_markdown(index=False, floatfmt=".1f", missingval="") + "\n")
    return [markdown, path]


def _write_curves(plan, name, rows: Mapping[str, list[Result]], folders, out: Path) -> list[Path]:
    figure, panels = plotting.subplots(
        1, len(rows), figsize=(3.4 * len(rows), 3.3), sharey=True, layout="constrained"
    )
    for panel, (row, results) in zip(panels, rows.items(), strict=True):
        for title, metric in _METRICS.items():
            plotting.curves(panel, {title: results}, metric)
        panel.set(title=row.replace(", ", ",\n"), xlabel="round", ylim=(-1, 101))
        panel.title.set_size(9)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("test examples (%)")
    plotting.legend_below(figure)
    return _titled(plan, name, rows, figure, out, plotting.band_of(plan.seeds))


def _titled(plan, name, rows, figure, out, seeds: str) -> list[Path]:
    one = list(rows.values())[-1][0]
    described = _describe(plan, one.experiment, one.summary["data"]["label"])
    plotting.titled(figure, f"{described}; {seeds}.{plan.note}", size=9)
    return plotting.save(figure, out / name)


def _write_influence(
    plan, name, rows: Mapping[str, list[Result]], folders, out: Path
) -> list[Path]:
    figure, panels = plotting.subplots(
        1, len(rows), figsize=(4.4 * len(rows), 3.3), layout="constrained"
    )
    for panel, (row, results) in zip(panels, rows.items(), strict=True):
        metrics = results[0].metrics
        loss = panel.twinx()
        panel.axhline(0, color="0.7", linewidth=0.8)
        (left,) = panel.plot(metrics["round"], metrics["net_influence"], "C0", label="influence")
        (right,) = loss.plot(metrics["round"], metrics["backdoor_loss"], "C1--", label="loss")
        panel.set(title=row, xlabel="round")
        panel.set_ylabel("net influence", color="C0")
        loss.set_ylabel("backdoor loss", color="C1")
        loss.set_ylim(bottom=0)
        panel.legend([left, right], ["net influence", "backdoor loss"], fontsize=8)
    return _titled(plan, name, rows, figure, out, "seed 0")


def _write_features(
    plan, name, rows: Mapping[str, list[Result]], folders, out: Path, *, num_images: int = 3
) -> list[Path]:
    """Gradient SHAP of stamped test images that RLR reads as base class and FedAvg as target.

    Where there are none, images that RLR reads as base class, else the first.
    """
    experiment = rows["FedAvg"][0].experiment
    source, backdoor = load_source(experiment), experiment.backdoor
    logits = loading.logits_of(experiment)
    params = {row: loading.final_params(folder) for row, folder in folders.items()}
    of_base = np.flatnonzero(source.y_test == backdoor.base)[:500]
    clean = source.x_test[of_base] / np.float32(source.scale)
    x, _, _ = backdoor.probes(jax.numpy.asarray(clean), source.y_test[of_base], None)
    read = {row: np.argmax(logits(tree, x), axis=-1) for row, tree in params.items()}
    held = read["FedAvg with RLR"] == backdoor.base
    both = held & (read["FedAvg"] == backdoor.target)
    order = np.argsort(~both * 2 + ~held, kind="stable")[:num_images]
    baselines = jax.numpy.asarray(source.x_train[:64] / np.float32(source.scale))
    maps = {
        title: attribution.explain(
            lambda images, tree=params[row]: logits(tree, images),
            x[order],
            baselines,
            jax.random.key(0),
        )
        for title, row in (
            ("no attack", "FedAvg-No Attack"),
            ("attack", "FedAvg"),
            ("attack, RLR", "FedAvg with RLR"),
        )
    }
    label = rows["FedAvg"][0].summary["data"]["label"]
    said = f"{_describe(plan, experiment, label)}. Gradient SHAP, seed 0.{plan.note}"
    return plotting.feature_maps(
        np.asarray(x[order]), maps, out / name, labels=source.y_test[of_base][order], said=said
    )


ITEMS: dict[str, Item] = {
    "table1-iid": Item("iid", "Table 1, top", _table1, _write_table),
    "table1-noniid": Item("noniid", "Table 1, bottom", _table1, _write_table),
    "table2-trojan": Item("cifar10", "Table 2, top", _cifar10(False), _write_table),
    "table2-distributed": Item("cifar10", "Table 2, bottom", _cifar10(True), _write_table),
    "figure2": Item("iid", "Figure 2", _curves, _write_curves),
    "figure3": Item("noniid", "Figure 3", _curves, _write_curves),
    "figure4-iid": Item("iid", "Figure 4, a and b", _influence, _write_influence),
    "figure4-noniid": Item("noniid", "Figure 4, c and d", _influence, _write_influence),
    "figure5-iid": Item("iid", "Figure 5, a", _three, _write_features),
    "figure5-noniid": Item("noniid", "Figure 5, b", _three, _write_features),
    "combined": Item("iid", "comed and sign with RLR", _combined, _write_table),
    "removal": Item("iid", "removing a backdoor during training", _removal, _write_curves),
    "patterns": Item("iid", "other trojan patterns", _patterns, _write_table),
    "semantic": Item("iid", "boosted label flips", _semantic, _write_table),
}

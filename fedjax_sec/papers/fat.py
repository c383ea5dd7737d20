"""The tables and figures of *FAT: Federated Adversarial Training* (Zizzo, Rawat, Sinn, Buesser
2020).

An item is a table or a figure; its rows are experiments on top of a file of `configs/fat/`. Table 1
has a row a data set, Table 3 and its curves (Figures 3 and 4) are of one data set.
"""

import csv
import dataclasses
import importlib.resources
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import filelock
import numpy as np
import pandas as pd

from fedjax_sec.core import files
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
from fedjax_sec.report.audit import Audit, audit
from fedjax_sec.runs import config as config_lib
from fedjax_sec.runs.experiment import Result, best_evaluation

SCALES = ("smoke", "small", "paper")
DATASETS = ("mnist", "fashion_mnist", "cifar10")
USERS = ("mnist_by_writer", "femnist")

#: After how many of its rounds the distillation attack "has stabilised" (caption of Table 3).
STABLE = {"mnist": 15, "fashion_mnist": 100}
#: Jump of K/N: round, and share afterwards (Section 2.1); 0.1 before it.
JUMPS = {"FAT-0.5": (200, 0.5), "FAT-0.8": (200, 0.8)}

# What the scales change of the files in configs/fat/, which are the paper's scale. `smoke` only
# shows that every part works. `small` is for a CPU: a narrower network, fewer and longer PGD steps
# in training. In the idealised setting an eighth of the batch, and ten times Adam's rate for as
# many rounds, since the mean of such noisy steps is a short one. With users a fifth of the rounds
# at five times the rate, and fewer users.
_NARROW = {"name": "madry_cnn", "channels": [8, 16], "hidden": 64}
_ALONE = {"client.optimizer.learning_rate": 0.003}
# (scale, idealised or users, or a row) -> changes
SCALE_CHANGES: Mapping[tuple[str, str], Mapping] = {
    ("smoke", "idealised"): {
        "rounds": 2,
        "evaluation.every": 1,
        "data.max_train": 700,
        "data.max_test": 60,
        "data.num_clients": 11,
        "client.batch_size": 8,
        "client.pgd_steps": 2,
        "evaluation.evasion_images": 30,
        "model": _NARROW,
    },
    ("smoke", "users"): {
        "rounds": 3,
        "evaluation.every": 1,
        "data.max_train": 3000,
        "data.num_clients": 20,
        "client.pgd_steps": 2,
        "evaluation.evasion_images": 30,
        "data.max_test": 60,
        "model": _NARROW,
    },
    ("small", "idealised"): {
        "rounds": 600,
        "evaluation.every": 40,
        "data.max_test": 2000,
        "client.batch_size": 8,
        "client.pgd_steps": 10,
        "client.optimizer.learning_rate": 0.01,
        "evaluation.evasion_images": 500,
        "model": _NARROW,
    },
    # Here nothing is averaged: one step follows another, or one client's is taken whole.
    ("small", "centralised"): _ALONE,
    ("small", "Krum"): _ALONE,
    ("small", "Krum, distillation"): _ALONE
    | {
        "attack": {"optimizer": {"name": "adam", "learning_rate": 0.002}},
    },
    ("small", "users"): {
        "rounds": 500,
        "evaluation.every": 50,
        "data.max_train": 12000,
        "data.num_clients": 100,
        "data.max_test": 2000,
        "client.pgd_steps": 10,
        "client.optimizer.learning_rate": 0.02,
        "evaluation.evasion_images": 100,
        "model": _NARROW,
    },
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to regenerate and how. `users` is the data set of Table 2.

    `overrides` win over the file, the scale and the row; `note` is what captions say of them, which
    `regenerate` fills in.
    """

    scale: str = "paper"
    seeds: int = 1
    datasets: tuple[str, ...] = ("mnist", "fashion_mnist")
    users: str = "mnist_by_writer"
    overrides: tuple[str, ...] = ()
    note: str = ""


def published(item: str, dataset: str) -> dict[tuple[str, str], float]:
    """(column, metric) -> the paper's number, in percent; of Table 2 for `femnist` only.

    >>> published("table3", "mnist")["Krum, distillation", "scaled"]
    0.29
    """
    text = importlib.resources.files("fedjax_sec.papers").joinpath("fat.csv").read_text()
    return {
        (line["column"], line["metric"]): float(line["value"])
        for line in csv.DictReader(text.splitlines())
        if (line["item"], line["row"]) == (item, dataset)
    }


def bounds(clients: int) -> dict[str, int]:
    """The most malicious clients that each defence is made for (Section 4.1: 24 and 12 of 51).

    >>> bounds(51)
    {'Trimmed Mean': 24, 'Bulyan': 12, 'Krum': 24}
    """
    return {
        "Trimmed Mean": (clients - 3) // 2,
        "Bulyan": (clients - 3) // 4,
        "Krum": (clients - 3) // 2,
    }


def _table1(base: Mapping) -> dict[str, dict]:
    clients, batch = base["data"]["num_clients"], base["client"]["batch_size"]
    # One client that holds everything takes one step for every client's: as many images a round.
    alone = {"data.num_clients": 1, "client.steps": clients, "client.batch_size": batch}
    return {"centralised": alone, "federated": {}}


def _table3(base: Mapping) -> dict[str, dict]:
    f = bounds(base["data"]["num_clients"])
    rules = {
        "Trimmed Mean": {"name": "trimmed_mean", "num_byzantine": f["Trimmed Mean"]},
        "Bulyan": {"name": "bulyan", "num_byzantine": f["Bulyan"]},
        "Krum": {"name": "krum", "num_byzantine": f["Krum"]},
    }
    # mu + k sigma with k = -1.5 and -1 (Section 3.1); ALIE's z is -k.
    attacks = {
        "Trimmed Mean": {"name": "alie", "z": 1.5},
        "Bulyan": {"name": "alie", "z": 1.0},
        # Alike, as the other attacks' clients are and those of the setup that is replicated.
        "Krum": {
            "name": "distillation",
            "batch_size": base["client"]["batch_size"],
            "alike": True,
        }
        | (base.get("attack") or {}),
    }
    # It "substitutes the robust PGD trained model" (Section 3.2): there has to be one. After how
    # many rounds the text does not say; two fifths are a choice.
    begins = {"Krum": max(base["rounds"] * 2 // 5, 1)}
    rows = {"None": {}}
    for name, rule in rules.items():
        title = "distillation" if name == "Krum" else "convergence attack"
        rows[name] = {"defense": rule}
        rows[f"{name}, {title}"] = {
            "defense": rule,
            "attack": attacks[name],
            "threat.num_malicious": f[name],
            "threat.start": begins.get(name, 0),
        }
    pgd = _pgd(base)
    rows["Krum, distillation"]["evaluation.evasions"] = [pgd, pgd | {"logit_scale": 0.01}]
    return rows


def _pgd(base: Mapping) -> dict:
    """The attack that robustness is measured by."""
    given = base["evaluation"].get("evasions")
    first = given[0] if isinstance(given, list) and given else given
    return first if isinstance(first, dict) else {"name": first}


def _plain(base: Mapping) -> dict:
    """The same local training without adversarial examples."""
    keep = ("steps", "epochs", "batch_size", "optimizer", "keep_optimizer_state")
    return {"name": "sgd"} | {key: base["client"][key] for key in keep if key in base["client"]}


def _jump(round_, share):
    return {"client.fraction": {"schedule": "steps", "values": {0: 0.1, round_: share}}}


def _at(base: Mapping, round_: int) -> int:
    """A round of the paper's 2,500, at the same share of this experiment's rounds."""
    return max(round(round_ * base["rounds"] / 2500), 1)


def _table2(base: Mapping) -> dict[str, dict]:
    rows: dict[str, dict] = {"FedAvg": {"client": _plain(base)}}
    for name, (round_, share) in JUMPS.items():
        rows[name] = _jump(_at(base, round_), share)
    # "centralised FE-MNIST with Adam as the optimiser", with the ratio of 0.1 for initial epochs.
    rows["Cent-AT"] = _jump(_at(base, 200), 0.8) | {
        "data.num_clients": 1,
        "data.partition": "iid",
        "server.clients_per_round": 1,
        "client.epochs": None,
        "client.steps": 30,
        "client.keep_optimizer_state": True,
        "client.optimizer": {"name": "adam", "learning_rate": 0.001},
    }
    return rows


def _figure1(base: Mapping) -> dict[str, dict]:
    return {
        "0.5 from the start": {"client.fraction": 0.5},
        "1.0 from the start": {"client.fraction": 1.0},
        f"0.1, 0.5 from round {_at(base, 200)}": _jump(_at(base, 200), 0.5),
        f"0.1, 0.8 from round {_at(base, 200)}": _jump(_at(base, 200), 0.8),
        f"0.1, 0.8 from round {_at(base, 400)}": _jump(_at(base, 400), 0.8),
    }


def _figure2(base: Mapping) -> dict[str, dict]:
    return {"FAT-0.8": _table2(base)["FAT-0.8"]}


_ROWS = {
    "table1": _table1,
    "table2": _table2,
    "table3": _table3,
    "curves": _table3,
    "figure1": _figure1,
    "figure2": _figure2,
}
ITEMS = tuple(_ROWS)  # `curves` are Figure 3 for MNIST and Figure 4 for Fashion-MNIST
OF_USERS = ("table2", "figure1", "figure2")


def _base(plan: Plan, file: Mapping, *names: str) -> dict:
    """The experiment of a file at the plan's scale; fewer PGD steps in training go as far together
    as the file's. `names` are looked up in `SCALE_CHANGES`."""
    found = file
    for name in names:
        found = config_lib.apply_overrides(found, SCALE_CHANGES.get((plan.scale, name), {}))
    way = file["client"]["step_size"] * file["client"]["pgd_steps"]
    change = {"client.step_size": way / found["client"]["pgd_steps"]}
    return foundation(found, change, plan.overrides)


def _rows(plan: Plan, item: str, bases: Mapping) -> dict[tuple[str, str], tuple[dict, dict]]:
    """(data set, row) -> what the row builds on, and what it changes."""
    kind, found = "users" if item in OF_USERS else "idealised", {}
    with computed_from(plan.overrides, item):
        for dataset in (plan.users,) if kind == "users" else plan.datasets:
            if item in ("table3", "curves") and dataset == "cifar10":
                continue  # "due to computational constraints [...] on MNIST and Fashion-MNIST"
            for row in _ROWS[item](_base(plan, bases[dataset], kind)):
                base = _base(plan, bases[dataset], kind, row)
                found[dataset, row] = base, _ROWS[item](base)[row]
    return found


def make_cells(plan: Plan, items: Sequence[str], bases: Mapping[str, Mapping]) -> dict:
    """(item, data set, row) -> its cells, one a seed; equal experiments share theirs.

    `bases` maps a data set to the experiment of its file.
    """
    shared, found = Shared(), {}
    for item in items:
        for (dataset, row), (base, change) in _rows(plan, item, bases).items():
            found[item, dataset, row] = []
            for seed in range(plan.seeds):
                where = f"{item}, {row}"
                experiment = settled(base, change, seed, plan.overrides, where)
                names = [one.registered_name for one in experiment.evaluation.evasions]
                demand(names[:1] == ["pgd"], where, "pgd as the first of evaluation.evasions")
                if row == "Krum, distillation":
                    demand(names == ["pgd", "pgd"], where, "both of the row's evaluation.evasions")
                if item in OF_USERS:
                    demand(experiment.data.local_test is not None, where, "data.local_test")
                axes = {"data": dataset, "run": f"{item} {row}"}
                found[item, dataset, row].append(shared.cell(axes, experiment))
    return found


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
    by_key = make_cells(plan, items, bases)
    done = finish(by_key, out, run)
    writers = {
        "table1": _write_table1,
        "table2": _write_table2,
        "table3": _write_table3,
        "curves": _write_curves,
        "figure1": _write_curves,
        "figure2": _write_scatter,
    }
    written = []
    noted = {}
    for item in items:
        changes = [change for _, change in _rows(plan, item, bases).values()]
        noted[item] = dataclasses.replace(plan, note=said_of(plan.overrides, changes))
        for dataset in dict.fromkeys(data for owner, data, _ in done if owner == item):
            rows = {
                row: r for (owner, data, row), r in done.items() if (owner, data) == (item, dataset)
            }
            folders = {row: folder_of(by_key[item, dataset, row][0], out) for row in rows}
            written += writers[item](noted[item], item, dataset, rows, folders, out)
    if "table1" in items:
        written += _join_table1(noted["table1"], out)
    return written


ROBUST = "robust_accuracy/pgd"


def best_robust(result: Result) -> int:
    """The evaluation "when the maximum adversarial accuracy was achieved" (caption of Table 3)."""
    return best_evaluation(result.metrics, ROBUST)


def _stable_from(dataset: str, result: Result) -> int:
    """The round from which the distillation attack "has stabilised" (caption of Table 3)."""
    e = result.experiment
    return min(e.threat.start + STABLE.get(dataset, 0), e.rounds)


def _describe(plan: Plan, result: Result) -> str:
    e = result.experiment
    work = f"{e.client.steps} steps" if e.client.steps else f"{e.client.epochs} epochs"
    pgd = e.evaluation.evasions[0]
    images = f"{e.evaluation.evasion_images or 'all'} test images"
    if e.data.local_test:
        images = "the users' own test examples"
    return (
        f"{result.summary['data']['label']}, {e.data.num_clients} clients "
        f"({e.clients_per_round} a round), {e.rounds} rounds, {work} of batch "
        f"{e.client.batch_size} with PGD of {e.client.pgd_steps} steps of "
        f"{e.client.step_size:g}, evaluated with PGD of radius {pgd.eps:g}, {pgd.steps} steps of "
        f"{pgd.step_size:g}, on {images}, scale `{plan.scale}`"
    )


def _numbers(name: str, paper: float | None, values: np.ndarray | None) -> dict:
    """A quantity's columns: the paper's, our mean, and the spread where there are several seeds."""
    if values is None:
        return {f"{name}: paper": paper, f"{name}: ours": None}
    found = {f"{name}: paper": paper, f"{name}: ours": values.mean()}
    return found | ({f"{name}: spread": values.std(ddof=1)} if len(values) > 1 else {})


def _write(frame: pd.DataFrame, head: str, path: Path) -> list[Path]:
    frame.to_csv(path.with_suffix(".csv"), index=False, float_format="%.2f")
    shown = frame.astype(object).where(frame.notna(), None)
    text = shown.to_markdown(index=False, floatfmt=".1f", missingval="")
    path.with_suffix(".md").write_text(f"{head}\n\n{text}\n")
    return [path.with_suffix(".md"), path.with_suffix(".csv")]


def _write_table1(plan, item, dataset, rows, folders, out) -> list[Path]:
    paper = published(item, dataset)
    line: dict = {"data": dataset}
    for column, results in rows.items():
        for title, metric in (("robust", ROBUST), ("accuracy", "accuracy")):
            values = percent(results, metric, best_robust)
            line |= _numbers(f"{column}, {title}", paper.get((column, title)), values)
        if failed := diverged(results):
            line[f"{column}: diverged"] = failed
    described = _describe(plan, rows["federated"][0])
    head = f"# FAT, Table 1\n\n{described}. Percent, {over(plan.seeds)}, {_AT_BEST}.{plan.note}"
    return _write(pd.DataFrame([line]), head, out / f"table1-{dataset}")


_AT_BEST = "at the evaluation with the highest robust accuracy"


def _join_table1(plan, out: Path) -> list[Path]:
    parts = [pd.read_csv(out / f"table1-{dataset}.csv") for dataset in plan.datasets]
    head = (
        f"# FAT, Table 1\n\nPercent, {over(plan.seeds)}, {_AT_BEST}. Settings and parts of data "
        f"sets: the files of each data set.{plan.note}"
    )
    return _write(pd.concat(parts), head, out / "table1")


def _write_table2(plan, item, dataset, rows, folders, out) -> list[Path]:
    paper = published(item, dataset)
    lines = []
    for row, results in rows.items():
        line = {"method": row}
        for title, metric in (("robust", f"local_{ROBUST}"), ("accuracy", "local_accuracy")):
            columns = _numbers(title, paper.get((row, title)), percent(results, metric))
            line |= columns if paper else {k: v for k, v in columns.items() if "paper" not in k}
        if failed := diverged(results):
            line["diverged"] = failed
        lines.append(line)
    head = (
        f"# FAT, Table 2\n\n{_describe(plan, rows['FAT-0.8'][0])}. Percent after the last round, "
        f"on the users' own test examples, weighted by their numbers; {over(plan.seeds)}."
        f"{plan.note}"
    )
    return _write(pd.DataFrame(lines), head, out / f"table2-{dataset}")


def _write_table3(plan, item, dataset, rows, folders, out) -> list[Path]:
    paper = published(item, dataset)
    lines, said = [], []
    for row, results in rows.items():
        distilled = row == "Krum, distillation"
        at = -1 if distilled else best_robust
        values = {
            "robust": percent(results, ROBUST, at),
            "accuracy": percent(results, "accuracy", at),
            "scaled": None,
            "transfer": None,
        }
        if distilled:
            since = _stable_from(dataset, results[0])
            stable = [r.metrics["round"] >= since for r in results]
            values["scaled"] = np.array(
                [
                    100 * r.metrics["robust_accuracy/pgd_2"][late].mean()
                    for r, late in zip(results, stable, strict=True)
                ]
            )
        if row in ("None", "Krum", "Krum, distillation"):
            # Transfer is from the model trained without a defence; that one is its own surrogate.
            other = folders["None"] if folders[row] != folders["None"] else None
            experiment = results[0].experiment
            pgd = experiment.evaluation.evasions[0]
            found = _audited(
                folders[row],
                surrogate=other,
                eps=pgd.eps,
                step_size=pgd.step_size,
                steps=pgd.steps,
                images=experiment.evaluation.evasion_images,
            )
            said.append(f"## Audit: {row}\n\n{found.to_markdown()}")
            if other is not None:
                values["transfer"] = np.array([100 * found.shares["transfer"]])
        line = {"defence, attack": row}
        for title, value in values.items():
            line |= _numbers(title, paper.get((row, title)), value)
        if failed := diverged(results):
            line["diverged"] = failed
        lines.append(line)
    attacked = rows["Krum, distillation"][0]
    head = (
        f"# FAT, Table 3\n\n{_describe(plan, rows['None'][0])}. Percent, {over(plan.seeds)}, "
        f"{_AT_BEST}. The distillation attack begins in round "
        f"{attacked.experiment.threat.start}; its row is after the last round (robust is what it "
        f"*appears* to be), scaled logits on average from round "
        f"{_stable_from(dataset, attacked)} on. Transfer, of seed 0: PGD on the final model "
        f"without a defence.{plan.note}"
    )
    written = _write(pd.DataFrame(lines), head, out / f"table3-{dataset}")
    path = out / f"table3-{dataset}-audit.md"
    title = f"# FAT, Table 3: is the robustness believable?\n\nOf seed 0.{plan.note}\n"
    path.write_text("\n".join([title, *said]))
    return [*written, path]


def _audited(run: Path, surrogate: Path | None, **arguments) -> Audit:
    """The audit of a run; one made before with the same arguments is kept beside its metrics.

    Processes that share the output folder make it once: the others wait.
    """
    against = "" if surrogate is None else f"-{surrogate.parent.name}-{surrogate.name}"
    asked = "-".join(f"{name}{value:g}" for name, value in arguments.items())
    path = run / f"audit-{asked}{against}.json"
    with filelock.FileLock(run / "audit.lock"):
        if not path.exists():
            found = audit(run, surrogate=surrogate, **arguments)
            files.write_atomically(path, found.to_json())
    return Audit.from_json(path.read_text())


def _write_curves(plan, item, dataset, rows, folders, out) -> list[Path]:
    of_users = item == "figure1"
    metrics = {"accuracy": "accuracy", "robust accuracy": ROBUST}
    if of_users:
        metrics = {title: f"local_{metric}" for title, metric in metrics.items()}
    figure, panels = plotting.subplots(1, 2, figsize=(9.5, 4.8), sharey=True, layout="constrained")
    for panel, (title, metric) in zip(panels, metrics.items(), strict=True):
        plotting.curves(panel, rows, metric)
        panel.set(title=title, xlabel="round", ylim=(-1, 101))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("users' own test examples (%)" if of_users else "test examples (%)")
    plotting.legend_below(figure)
    described = _describe(plan, next(iter(rows.values()))[0])
    plotting.titled(figure, f"{described}; {plotting.band_of(plan.seeds)}.{plan.note}", size=9)
    return plotting.save(figure, out / f"{item}-{dataset}")


def _write_scatter(plan, item, dataset, rows, folders, out) -> list[Path]:
    ((row, results),) = rows.items()
    metrics = results[0].metrics
    accuracy, robust = (100 * metrics[f"per_client_{name}"][-1] for name in ("accuracy", ROBUST))
    figure, axes = plotting.subplots(figsize=(5, 4.4), layout="constrained")
    axes.scatter(accuracy, robust, s=9, alpha=0.4)
    known = np.isfinite(accuracy) & np.isfinite(robust)
    varies = min(accuracy[known].std(), robust[known].std()) > 0
    r = f"{np.corrcoef(accuracy[known], robust[known])[0, 1]:.2f}" if varies else "undefined"
    axes.set(
        xlabel="accuracy (%)",
        ylabel="robust accuracy (%)",
        xlim=(-3, 103),
        ylim=(-3, 103),
        title=f"{row}: {known.sum()} users, correlation {r}",
    )
    axes.grid(alpha=0.3)
    described = f"{_describe(plan, results[0])}. One point a user, seed 0, after the last round."
    plotting.titled(figure, described + plan.note, size=7)
    return plotting.save(figure, out / f"{item}-{dataset}")

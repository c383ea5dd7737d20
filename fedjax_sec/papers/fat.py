"""*FAT: Federated Adversarial Training* (Zizzo, Rawat, Sinn and Buesser 2020): Tables 1 to 3,
Figures 1 to 4, and an audit that says which robustness is believable.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from fedjax_sec.report import audit, plotting
from fedjax_sec.report import paper_writers as writers
from fedjax_sec.report.paper import Case, Item, Option, Paper, Part, Plan, Report, Row
from fedjax_sec.runs.config import Experiment
from fedjax_sec.runs.experiment import Result, best_evaluation

DATASETS = ("mnist", "fashion_mnist", "cifar10")
#: After how many of its rounds the distillation attack "has stabilised" (caption of Table 3).
STABLE = {"mnist": 15, "fashion_mnist": 100}
#: Jump of K/N: round, and share afterwards (Section 2.1); 0.1 before it.
JUMPS = {"FAT-0.5": (200, 0.5), "FAT-0.8": (200, 0.8)}
ROBUST = "robust_accuracy/pgd"
_DISTILLED = "Krum, distillation"
_AT_BEST = "at the evaluation with the highest robust accuracy"


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


def longer_steps(file: Mapping, base: Mapping) -> dict:
    """Fewer PGD steps in training go as far together as the file's."""
    way = file["client"]["step_size"] * file["client"]["pgd_steps"]
    return {"client.step_size": way / base["client"]["pgd_steps"]}


def _table1(case: Case) -> list[Row]:
    clients, batch = case.base["data"]["num_clients"], case.base["client"]["batch_size"]
    # One client that holds everything takes one step for every client's: as many images a round.
    alone = {"data.num_clients": 1, "client.steps": clients, "client.batch_size": batch}
    return [Row("", alone, "centralised"), Row("", {}, "federated")]


def _table3(case: Case) -> list[Row]:
    base = case.base
    f = bounds(base["data"]["num_clients"])
    # mu + k sigma with k = -1.5 and -1 (Section 3.1); ALIE's z is -k.
    attacks = {
        "Trimmed Mean": {"name": "alie", "z": 1.5},
        "Bulyan": {"name": "alie", "z": 1.0},
        # Alike, as the other attacks' clients are and those of the setup that is replicated.
        "Krum": {"name": "distillation", "batch_size": base["client"]["batch_size"], "alike": True}
        | (base.get("attack") or {}),
    }
    names = {"Trimmed Mean": "trimmed_mean", "Bulyan": "bulyan", "Krum": "krum"}
    pgd = _pgd(base)
    rows = [Row("None", {})]
    for name, registered in names.items():
        rule = {"defense": {"name": registered, "num_byzantine": f[name]}}
        attacked = {
            "attack": attacks[name],
            "threat.num_malicious": f[name],
            # Distillation "substitutes the robust PGD trained model" (Section 3.2): there has to be
            # one. After how many rounds the text does not say; two fifths are a choice.
            "threat.start": max(base["rounds"] * 2 // 5, 1) if name == "Krum" else 0,
        }
        title = f"{name}, convergence attack"
        if name == "Krum":
            title = _DISTILLED
            attacked["evaluation.evasions"] = [pgd, pgd | {"logit_scale": 0.01}]
        rows += [Row(name, rule), Row(title, rule | attacked)]
    return rows


def _pgd(base: Mapping) -> dict:
    """The attack that robustness is measured by."""
    given = base["evaluation"].get("evasions")
    first = given[0] if isinstance(given, list) and given else given
    return first if isinstance(first, dict) else {"name": first}


def _jump(base: Mapping, round_: int, share: float) -> dict:
    """K/N from a round of the paper's 2,500 on, at the same share of this experiment's rounds."""
    values = {0: 0.1, _at(base, round_): share}
    return {"client.fraction": {"schedule": "steps", "values": values}}


def _at(base: Mapping, round_: int) -> int:
    return max(round(round_ * base["rounds"] / 2500), 1)


def _table2(case: Case) -> list[Row]:
    base = case.base
    # The same local training without adversarial examples.
    keep = ("steps", "epochs", "batch_size", "optimizer", "keep_optimizer_state")
    plain = {"name": "sgd"} | {key: base["client"][key] for key in keep if key in base["client"]}
    # "centralised FE-MNIST with Adam as the optimiser", with the ratio of 0.1 for initial epochs.
    together = {
        "data.num_clients": 1,
        "data.partition": "iid",
        "server.clients_per_round": 1,
        "client.epochs": None,
        "client.steps": 30,
        "client.keep_optimizer_state": True,
        "client.optimizer": {"name": "adam", "learning_rate": 0.001},
    }
    return [
        Row("FedAvg", {"client": plain}),
        *(Row(name, _jump(base, *jump)) for name, jump in JUMPS.items()),
        Row("Cent-AT", _jump(base, 200, 0.8) | together),
    ]


def _figure1(case: Case) -> list[Row]:
    changes = {f"{one} from the start": {"client.fraction": one} for one in (0.5, 1.0)}
    for round_, share in ((200, 0.5), (200, 0.8), (400, 0.8)):
        name = f"0.1, {share} from round {_at(case.base, round_)}"
        changes[name] = _jump(case.base, round_, share)  # of few rounds two may be one
    return [Row(name, change) for name, change in changes.items()]


def _figure2(case: Case) -> list[Row]:
    return [row for row in _table2(case) if row.row == "FAT-0.8"]


def best_robust(result: Result) -> int:
    """The evaluation "when the maximum adversarial accuracy was achieved" (caption of Table 3)."""
    return best_evaluation(result.metrics, ROBUST)


def _stable_from(dataset: str, experiment: Experiment) -> int:
    """The round from which the distillation attack "has stabilised" (caption of Table 3)."""
    return min(experiment.threat.start + STABLE.get(dataset, 0), experiment.rounds)


def _describe(report: Report, result: Result | None = None) -> str:
    result = result or report.first
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
        f"{pgd.step_size:g}, on {images}, scale `{report.plan.scale}`"
    )


def _write_table1(report: Report) -> list[Path]:
    """One line: its rows are columns, as in the paper, where data sets are rows."""
    line: dict = {"data": report.part.file}
    for entry in report.entries:
        column = entry.row.column
        for title, metric in (("robust", ROBUST), ("accuracy", "accuracy")):
            values = writers.percent(entry.results, metric, best_robust)
            known = report.published.get(("", column, title))
            line |= writers.numbers(f"{column}, {title}", values, known)
        if failed := writers.diverged(entry.results):
            line[f"{column}: diverged"] = failed
    described = _describe(report, report.last)
    text = f"{described}. Percent, {report.over}, {_AT_BEST}.{report.note}"
    frame = pd.DataFrame([line])
    return writers.write_table(frame, f"# {report.heading}\n\n{text}", report.path)


def _join_table1(reports) -> list[Path]:
    """The data sets' lines below each other."""
    one = reports[0]
    parts = [pd.read_csv(report.path.with_suffix(".csv")) for report in reports]
    text = (
        f"Percent, {one.over}, {_AT_BEST}. Settings and parts of data sets: the files of each data "
        f"set.{one.note}"
    )
    head, path = f"# {one.heading}\n\n{text}", one.path.with_name(one.name)
    return writers.write_table(pd.concat(parts), head, path)


def _audit(report: Report, entry) -> audit.Audit | None:
    """The audit of a row of Table 3; transfer is from the model trained without a defence."""
    if entry.row.row not in ("None", "Krum", _DISTILLED):
        return None
    surrogate = report["None"].folder if "None" in report else None
    experiment = entry.results[0].experiment
    pgd = experiment.evaluation.evasions[0]
    return audit.kept(
        entry.folder,
        surrogate=None if surrogate == entry.folder else surrogate,
        eps=pgd.eps,
        step_size=pgd.step_size,
        steps=pgd.steps,
        images=experiment.evaluation.evasion_images,
    )


def _measure_table3(report: Report, entry) -> dict:
    distilled, results = entry.row.row == _DISTILLED, entry.results
    at = -1 if distilled else best_robust
    values = {
        "robust": writers.percent(results, ROBUST, at),
        "accuracy": writers.percent(results, "accuracy", at),
        "scaled": None,
        "transfer": None,
    }
    if distilled:
        since = _stable_from(report.part.file, results[0].experiment)
        runs = [one.metrics for one in results]
        means = [one["robust_accuracy/pgd_2"][one["round"] >= since].mean() for one in runs]
        values["scaled"] = 100 * np.array(means)
    audited = _audit(report, entry)
    if audited is not None and "transfer" in audited.shares:
        values["transfer"] = np.array([100 * audited.shares["transfer"]])
    return values


def _says_table3(report: Report) -> str:
    said = f"{_describe(report)}. Percent, {report.over}, {_AT_BEST}."
    if _DISTILLED in report:
        attacked = report[_DISTILLED].results[0].experiment
        said += (
            f" The distillation attack begins in round {attacked.threat.start}; its row is after "
            f"the last round (robust is what it *appears* to be), scaled logits on average from "
            f"round {_stable_from(report.part.file, attacked)} on."
        )
    return f"{said} Transfer, of seed 0: PGD on the final model without a defence."


def _write_table3(report: Report) -> list[Path]:
    written = writers.Table(("defence, attack",), _measure_table3, _says_table3)(report)
    path = report.path.with_name(f"{report.path.name}-audit.md")
    title = f"# {report.heading}: is the robustness believable?\n\nOf seed 0.{report.note}\n"
    audits = {entry.row.row: _audit(report, entry) for entry in report.entries}
    said = [f"## Audit: {row}\n\n{one.to_markdown()}" for row, one in audits.items() if one]
    path.write_text("\n".join([title, *said]))
    return [*written, path]


def _says_table2(report: Report) -> str:
    jumped = report["FAT-0.8"].results[0] if "FAT-0.8" in report else report.last
    return (
        f"{_describe(report, jumped)}. Percent after the last round, on the users' own test "
        f"examples, weighted by their numbers; {report.over}."
    )


def _curves(ylabel: str, prefix: str = "") -> writers.Curves:
    metrics = {"accuracy": f"{prefix}accuracy", "robust accuracy": f"{prefix}{ROBUST}"}

    def panels(report: Report) -> dict:
        return {
            title: {entry.row.row: (entry.results, metric) for entry in report.entries}
            for title, metric in metrics.items()
        }

    return writers.Curves(panels, _describe, ylabel, width=4.75, height=4.8, title_size=12)


def _draw_users(report: Report):
    metrics = report.first.metrics
    accuracy, robust = (100 * metrics[f"per_client_{name}"][-1] for name in ("accuracy", ROBUST))
    figure, axes = plotting.subplots(figsize=(5, 4.4), layout="constrained")
    title = f"{report.entries[0].row.row}: {{number}} users, correlation {{r}}"
    plotting.scatter(axes, accuracy, robust, title)
    axes.set(xlabel="accuracy (%)", ylabel="robust accuracy (%)")
    return figure, f"{_describe(report)}. One point a user, seed 0, after the last round"


def _needs(row: Row, experiment: Experiment):
    names = [one.registered_name for one in experiment.evaluation.evasions]
    yield names[:1] == ["pgd"], "pgd as the first of evaluation.evasions"
    holds = row.row != _DISTILLED or names == ["pgd", "pgd"]
    yield holds, "both of the row's evaluation.evasions"


def _needs_users(row: Row, experiment: Experiment):
    yield from _needs(row, experiment)
    yield experiment.data.local_test is not None, "data.local_test"


def _idealised(*datasets: str):
    def parts(plan: Plan) -> list[Part]:
        names = [name for name in plan["dataset"] if name in datasets]
        return [
            Part(name, ("idealised",), axes={"data": name}, suffix=f"-{name}") for name in names
        ]

    return parts


def _users(plan: Plan) -> list[Part]:
    return [_part(plan["users"], "users")]


def _part(dataset: str, scale: str) -> Part:
    return Part(dataset, (scale,), axes={"data": dataset}, suffix=f"-{dataset}")


TABLE2 = writers.Table(
    ("method",),
    lambda report, entry: {
        "robust": writers.percent(entry.results, f"local_{ROBUST}"),
        "accuracy": writers.percent(entry.results, "local_accuracy"),
    },
    _says_table2,
)
CURVES = _curves("test examples (%)")
CURVES_OF_USERS = _curves("users' own test examples (%)", "local_")
# "due to computational constraints [...] on MNIST and Fashion-MNIST"
_TWO = _idealised("mnist", "fashion_mnist")
PAPER = Paper(
    __name__,
    "FAT",
    {
        "table1": Item(
            "Table 1", _table1, _write_table1, _idealised(*DATASETS), _needs, join=_join_table1
        ),
        "table2": Item("Table 2", _table2, TABLE2, _users, _needs_users),
        "table3": Item("Table 3", _table3, _write_table3, _TWO, _needs),
        # Figure 3 for MNIST and Figure 4 for Fashion-MNIST.
        "curves": Item("Figures 3 and 4", _table3, CURVES, _TWO, _needs),
        "figure1": Item("Figure 1", _figure1, CURVES_OF_USERS, _users, _needs_users),
        "figure2": Item("Figure 2", _figure2, writers.Figure(_draw_users, 7), _users, _needs_users),
    },
    options=(
        Option(
            "dataset",
            DATASETS,
            "Of Tables 1 and 3; may be repeated.",
            ("mnist", "fashion_mnist"),
            many=True,
        ),
        Option("users", ("mnist_by_writer", "femnist"), "Data set of Table 2.", "mnist_by_writer"),
    ),
    derive=longer_steps,
)

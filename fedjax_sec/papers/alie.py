"""*A Little Is Enough* (Baruch, Baruch and Goldberg 2019): Tables 1 to 3, Figures 2 to 4."""

from collections.abc import Mapping, Sequence

import numpy as np

from fedjax_sec.report import paper_writers as writers
from fedjax_sec.report import plotting
from fedjax_sec.report.paper import Case, Item, Option, Paper, Part, Row
from fedjax_sec.runs.config import Experiment
from fedjax_sec.runs.experiment import Result, best_evaluation

# "The circumvention analysis and experiments are similar for all variants ..., so we will consider
# only the second variant" (Section 2.3): the n - 2m values nearest the median.
_KRUM = {"name": "krum", "convention": "author"}
DEFENSES = {
    "paper": {
        "No Defense": {"name": "mean", "weighted": False},
        "Trimmed Mean": {"name": "trimmed_mean", "variant": "nearest_n_minus_2f"},
        "Krum": {"name": "krum"},
        "Bulyan": {"name": "bulyan"},
    },
    "author": {
        "No Defense": {"name": "mean", "weighted": False},
        "Trimmed Mean": {
            "name": "trimmed_mean",
            "variant": "nearest_n_minus_f",
            "convention": "author",
        },
        "Krum": _KRUM,
        "Bulyan": {"name": "bulyan", "convention": "author", "selection": _KRUM},
    },
}
#: The author code's `--epochs` counts rounds of one batch a worker, not passes over the data.
AUTHOR_ROUNDS = {"mnist": 150, "cifar10": 400}
FIGURE4_SHARES = (0.05, 0.10, 0.15, 0.20, 0.24)


def clean(case: Case) -> dict:
    """The changes of a row without an attack."""
    return {"attack": None, "defense": DEFENSES[case.plan["convention"]]["No Defense"]}


def malicious(case: Case, share: float) -> dict:
    """A share of malicious workers as their number."""
    return {"threat.num_malicious": int(share * case.base["data"]["num_clients"])}


def _table1(case: Case) -> list[Row]:
    rows, mean = [Row("0", clean(case), name="No Attack")], clean(case)["defense"]
    for z in ("0.5", "1", "1.5"):
        attack = {"attack": {"name": "alie", "z": float(z)}, "defense": mean}
        rows.append(Row(z, attack | malicious(case, 1.0)))
    return rows


def _backdoors(item: str):
    """The rows of Table 2 (a sample) or 3 (a pattern)."""

    def rows(case: Case) -> list[Row]:
        convention = case.plan["convention"]
        attack = {"name": "alie_backdoor", "z": 0.2, "alpha": 0.2, "convention": convention}
        modulus = {"modulus": 5} if convention == "author" else {}

        def changes(rule):
            if item == "table3":
                return {"attack": attack | {"backdoor": {"name": "pattern"}}, "defense": rule}
            # "we chose each time one of the first 3 images from each training set"
            return lambda seed: {
                "attack": attack | {"backdoor": {"name": "sample", "index": seed % 3} | modulus},
                "defense": rule,
            }

        attacked = [Row(name, changes(rule)) for name, rule in DEFENSES[convention].items()]
        return [Row("No Attack", clean(case), name="No Attack"), *attacked]

    return rows


def _curves(z: float, share: float | None):
    """The rows of Figures 2 and 3."""

    def rows(case: Case) -> list[Row]:
        change = {"attack": {"name": "alie", "z": z}}
        change |= {} if share is None else malicious(case, share)
        rules = DEFENSES[case.plan["convention"]].items()
        attacked = [Row(name, change | {"defense": rule}) for name, rule in rules]
        return [Row("No Attack", clean(case), name="No Attack"), *attacked]

    return rows


def _figure4(case: Case) -> list[Row]:
    rows = []
    for column, rule in DEFENSES[case.plan["convention"]].items():
        rows.append(Row("", clean(case), column, "0", "No Attack"))
        for share in FIGURE4_SHARES:
            change = {"attack": {"name": "alie", "z": 1.0}, "defense": rule}
            change |= malicious(case, share)
            name = f"figure4 {column} {share:.0%}"
            rows.append(Row("", change, column, f"{100 * share:g}", name))
    return rows


def _needs_backdoor(row: Row, experiment: Experiment):
    holds = row.row == "No Attack" or experiment.backdoor is not None
    yield holds, "an attack with a backdoor"


def best_accuracy(results: Sequence[Result], rounds: float = np.inf) -> np.ndarray:
    """Percent: each run's maximal accuracy within so many rounds.

    Algorithm 1 returns the parameters that maximised test accuracy.
    """
    bests = [
        (
            one.metrics["accuracy"],
            best_evaluation(one.metrics, "accuracy", among=one.metrics["round"] <= rounds),
        )
        for one in results
    ]
    return 100 * np.array([values[best] for values, best in bests])


def success(results: Sequence[Result], item: str) -> np.ndarray:
    """Percent: over all rounds where it is a sample's, else at the maximal accuracy."""
    runs = [
        (one.metrics["attack_success_rate"], best_evaluation(one.metrics, "accuracy"))
        for one in results
    ]
    each = [values[1:].mean() if item == "table2" else values[best] for values, best in runs]
    return 100 * np.array(each)


def _measure(report, entry) -> dict:
    values = {"accuracy": best_accuracy(entry.results)}
    rounds = AUTHOR_ROUNDS[report.part.file]
    if report.first.experiment.rounds > rounds:
        early = best_accuracy(entry.results, rounds)
        values[f"accuracy: ours, best of {rounds} rounds"] = early.mean()
    if report.name != "table1" and entry.row.row != "No Attack":
        values["backdoor"] = success(entry.results, report.name)
    return values


def _table(index: str, says: str) -> writers.Table:
    def caption(report) -> str:
        plan = report.plan
        return (
            f"Percent, {report.over}{' (spread)' * (plan.seeds > 1)}; difference to the "
            f"paper; scale `{plan.scale}` ({report.first.experiment.rounds} rounds), convention "
            f"`{plan['convention']}`. {says}"
        )

    return writers.Table((index,), _measure, caption, difference=True)


def setting(item: str, attacked: Experiment) -> str:
    """The attacked rows' share of malicious workers, where it is one, and ALIE's z."""
    share = attacked.threat.num_malicious / attacked.data.num_clients
    parts = [f"m = {share:.0%}"] if item != "figure4" else []
    parts += [f"z = {stage.z:g}" for stage in attacked.attack.stages if hasattr(stage, "z")]
    return ", ".join(parts)


def _caption(report) -> str:
    plan, last = report.plan, report.last
    formulas = ", author code's formulas" if plan["convention"] == "author" else ""
    said = f"{setting(report.name, last.experiment)} ({plan.scale} scale{formulas})"
    return f"{last.summary['data']['label']}: {said}"


def _lines(report) -> Mapping:
    return {"": {entry.row.row: (entry.results, "accuracy") for entry in report.entries}}


_CURVES = writers.Curves(_lines, _caption, "test accuracy (%)", width=6, height=4.4)
_SHARES = writers.Points(
    ("", "defense", "malicious (%)"),
    tuple(DEFENSES["paper"]),
    lambda results: {"accuracy": best_accuracy(results)},
    lambda name: {"accuracy": "o-"},
    lambda report: f"{_caption(report)}, {plotting.band_of(report.plan.seeds)}",
    "malicious workers (%)",
    "maximal test accuracy (%)",
    ylim=(0, 100),
    width=6,
    height=4.4,
)


def _only(*datasets: str):
    """The data set asked for, where the paper has the item for it."""
    return lambda plan: [Part(one, (one,)) for one in [plan["dataset"]] if one in datasets]


_BOTH = _only("mnist", "cifar10")
PAPER = Paper(
    __name__,
    "A Little Is Enough",
    {
        "table1": Item(
            "Table 1",
            _table1,
            _table(
                "z",
                "Maximal test accuracy when all workers shift their updates by z standard "
                "deviations (m = n, no defence).",
            ),
            _BOTH,
        ),
        "table2": Item(
            "Table 2",
            _backdoors("table2"),
            _table(
                "defense",
                "Maximal test accuracy with a backdoor sample; `backdoor` is the share of "
                "evaluations, over all rounds, in which the model gave the sample the attacker's "
                "label (the paper: more than 95%, no number per row).",
            ),
            _BOTH,
            needs=_needs_backdoor,
        ),
        "table3": Item(
            "Table 3",
            _backdoors("table3"),
            _table(
                "defense",
                "Maximal test accuracy with a backdoor pattern; `backdoor` is the share of stamped "
                "test images classified as the attacker wants by the model of maximal accuracy.",
            ),
            _BOTH,
            needs=_needs_backdoor,
        ),
        "figure2": Item("Figure 2", _curves(1.5, None), _CURVES, _only("mnist")),
        "figure3": Item("Figure 3", _curves(1.0, 0.20), _CURVES, _only("cifar10")),
        "figure4": Item("Figure 4", _figure4, _SHARES, _only("cifar10")),
    },
    options=(
        Option("dataset", ("mnist", "cifar10"), "Data set.", "mnist"),
        Option(
            "convention", tuple(DEFENSES), "The paper's formulas or the author code's.", "paper"
        ),
    ),
    seeds=3,
    labelled=True,
)

"""*FedSecurity* (Han et al., KDD 2024): Experiments 1 to 7 and 10, Figures 3 to 12 and 15.

The text gives no accuracies, only orderings, so each experiment is drawn as its figures, and a
table says of each ordering whether it holds. FoolsGold and RFA are there twice: as their papers
have them, and as FedML computes them, which the published figures probably show.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from fedjax_sec.core import files
from fedjax_sec.report import paper_writers as writers
from fedjax_sec.report.paper import Case, Item, Option, Paper, Part, Report, Row
from fedjax_sec.runs.experiment import Result

BENIGN, ATTACKED = "benign", "no defense"
KRUM, FOOLSGOLD, RFA = "m-Krum", "FoolsGold", "RFA"
AS_FEDML = ", as FedML"
#: The mode of the Byzantine attack, or the label flips of Section 5, by the attack's name.
ATTACKS = {
    "random": {"name": "byzantine", "mode": "random"},
    "zero": {"name": "byzantine", "mode": "zero"},
    "flipping": {"name": "byzantine", "mode": "flip"},
    "label flipping": {"name": "label_flip", "pairs": [[3, 9], [2, 1]]},
}
#: Exp 5's m of m-Krum and Exp 7's, where the text and the author's configurations differ.
SELECTED = {"text": {"exp5": 5, "exp7": 5}, "config": {"exp5": 50, "exp7": 1}}
#: Evaluations whose mean is a run's accuracy: single ones are noisy on unequal clients (a choice).
TAIL = 5


# --- Rows ---------------------------------------------------------------------------------------


def krum(num_byzantine: int, num_selected: int) -> dict:
    """FedML's m-Krum; it asks for f of the attack's number of clients, without an attack too."""
    return {
        "name": "multi_krum",
        "num_byzantine": num_byzantine,
        "num_selected": num_selected,
        "weighted": True,
    }


def defenses(num_byzantine: int = 1, num_selected: int = 5) -> dict[str, dict]:
    """The defences of Section 5, FoolsGold and RFA twice."""
    return {
        KRUM: krum(num_byzantine, num_selected),
        FOOLSGOLD: {"name": "foolsgold"},
        RFA: {"name": "geometric_median"},
        FOOLSGOLD + AS_FEDML: {"name": "foolsgold", "convention": "fedsecurity"},
        RFA + AS_FEDML: {"name": "geometric_median", "convention": "fedsecurity"},
    }


_CLEAN = {"attack": None, "threat.num_malicious": 0, "threat.redraw": False, "defense": "mean"}


def _attacked(attack: str, defense: Mapping | str = "mean") -> dict:
    return {"attack": ATTACKS[attack], "defense": defense}


def _exp1(case: Case) -> list[Row]:
    rows = [Row(BENIGN, _CLEAN, name=BENIGN)]
    return rows + [Row(name, _attacked(name), name=f"{name}, {ATTACKED}") for name in ATTACKS]


def _exp2(case: Case) -> list[Row]:
    rules = defenses().items()
    rows = [Row(name, _CLEAN | {"defense": rule}) for name, rule in rules]
    return [Row(BENIGN, _CLEAN, name=BENIGN), *rows]


def _against(attack: str, rules: Mapping, column: str = "", **changes) -> list[Row]:
    """Without attack and defence, with the attack alone, and each rule against it."""
    name = f"{attack}, {ATTACKED}" if not changes else ""
    return [
        Row(BENIGN, _CLEAN | changes, column, name="" if changes else BENIGN),
        Row(ATTACKED, _attacked(attack) | changes, column, name=name),
        *(Row(one, _attacked(attack, rule) | changes, column) for one, rule in rules.items()),
    ]


def _exp3(case: Case) -> list[Row]:
    return [
        row
        for attack in ("label flipping", "random")
        for row in _against(attack, defenses(), attack)
    ]


def _exp4(case: Case) -> list[Row]:
    return _against("random", defenses(), **{"data.partition": "iid"})


def _exp5(case: Case) -> list[Row]:
    changes = {"data.num_clients": 100, "threat.num_malicious": 10}
    selected = SELECTED[case.plan["statement"]]["exp5"]
    rows = _against("random", defenses(10, selected), **changes)
    return [row._replace(changes=row.changes | _bad(row, 10)) for row in rows]


def _bad(row: Row, number: int) -> dict:
    return {"threat.num_malicious": 0 if row.row == BENIGN else number}


def _exp6(case: Case) -> list[Row]:
    """The text has 10 clients; FedML's are all users, 10 of them in each round, where users are."""
    users = USERS["paper" if case.plan.scale == "paper" else "small"]
    changes = {}
    if case.plan["statement"] == "config" and case.part.file in users:
        changes = {"data.num_clients": users[case.part.file], "server.clients_per_round": 10}
        changes |= {"threat.num_malicious": 0, "threat.per_round": None}
    rows = []
    for row in _against("random", defenses()):
        change = row.changes | {k: v for k, v in changes.items() if k.startswith(("data", "serv"))}
        if changes and row.row != BENIGN:
            change |= {"threat.num_malicious": 1, "threat.per_round": 1}  # of those present
        if case.part.file == "shakespeare" and case.plan["statement"] == "config":
            change |= {"model.bidirectional": False, "data.padded": True}
        rows.append(row._replace(changes=change, name=f"{case.part.file} {row.row}"))
    return rows


#: Users of the data sets whose users FedML makes clients; smaller scales take 200 of the writers.
#: All 715 roles have an example only where the beginnings of their texts are padded.
USERS = {
    "paper": {"femnist": 3400, "shakespeare": 715},
    "small": {"femnist": 200, "shakespeare": 715},
}


def _exp7(case: Case) -> list[Row]:
    selected = SELECTED[case.plan["statement"]]["exp7"]
    rows = [Row(BENIGN, _CLEAN, name=BENIGN)]
    for number in (1, 2, 3):
        change = _attacked("random", krum(number, selected)) | {"threat.num_malicious": number}
        rows.append(Row(f"{number} malicious", change))
    return rows


def _exp10(case: Case) -> list[Row]:
    """Figure 15, simulated; `fedjax-sec flower` runs the same experiment with real clients."""
    return [
        Row(BENIGN, _CLEAN),
        Row(ATTACKED, _attacked("random")),
        Row(KRUM, _attacked("random", krum(7, 35))),
    ]


# --- Orderings ----------------------------------------------------------------------------------


class Claim(NamedTuple):
    """An ordering that the text states: `kind` of the rows named by label.

    `above`: the first has the higher accuracy; `nearer`: the first is nearer to the second than to
    the third; `alike`: the first two differ by no more than the spread.
    """

    text: str
    kind: str
    rows: tuple[str, ...]

    def margin(self, accuracy: Mapping[str, np.ndarray]) -> np.ndarray:
        """By how much it holds, for each seed, whose runs are paired."""
        first, second, *third = (accuracy[row] for row in self.rows)
        if self.kind == "nearer":
            return np.abs(first - third[0]) - np.abs(first - second)
        return first - second

    def verdict(self, margin: np.ndarray) -> str:
        """`holds`, `does not hold` or `within the spread`, a standard deviation over seeds.

        >>> Claim("", "above", ("a", "b")).verdict(np.array([2.0, 3.0, 2.5]))
        'holds'
        """
        mean = margin.mean()
        if not np.isfinite(mean):
            return "undecided: not measured"
        if len(margin) == 1:
            if self.kind == "alike":
                return "undecided: one seed"
            return f"{'holds' if mean > 0 else 'does not hold'} (one seed)"
        within = abs(mean) <= margin.std(ddof=1)
        if self.kind == "alike":
            return "holds" if within else "does not hold"
        if within:
            return "within the spread"
        return "holds" if mean > 0 else "does not hold"


def _claims_exp1() -> list[Claim]:
    mild, harsh = ("label flipping", "flipping"), ("random", "zero")
    claims = [
        Claim(f"{bad} degrades accuracy more than {good}", "above", (good, bad))
        for bad in harsh
        for good in mild
    ]
    claims += [
        Claim(f"{good} has a mild impact", "nearer", (good, BENIGN, "random")) for good in mild
    ]
    return [*claims, Claim("random has the strongest impact", "above", ("zero", "random"))]


def _claims_exp2() -> list[Claim]:
    rules = (KRUM, FOOLSGOLD, RFA, FOOLSGOLD + AS_FEDML, RFA + AS_FEDML)
    claims = [Claim(f"{rule} costs accuracy", "above", (BENIGN, rule)) for rule in rules]
    return claims + [
        Claim(f"{rfa} costs most: more than {rule}", "above", (rule, rfa))
        for rfa, rules in ((RFA, (KRUM, FOOLSGOLD)), (RFA + AS_FEDML, (KRUM, FOOLSGOLD + AS_FEDML)))
        for rule in rules
    ]


def _claims_exp3() -> list[Claim]:
    def of(attack, *rows):
        return tuple(f"{row} / {attack}" for row in rows)

    flips = "label flipping"
    return [
        *(
            Claim(f"{gold} improves accuracy under {flips}", "above", of(flips, gold, ATTACKED))
            for gold in (FOOLSGOLD, FOOLSGOLD + AS_FEDML)
        ),
        *(
            Claim(f"{rfa} harms accuracy under {flips}", "above", of(flips, ATTACKED, rfa))
            for rfa in (RFA, RFA + AS_FEDML)
        ),
        Claim(f"{KRUM} neutralises random", "nearer", of("random", KRUM, BENIGN, ATTACKED)),
    ]


def _claims_most_effective() -> list[Claim]:
    others = (FOOLSGOLD, RFA, FOOLSGOLD + AS_FEDML, RFA + AS_FEDML)
    claims = [Claim(f"{KRUM} is better than {one}", "above", (KRUM, one)) for one in others]
    close = Claim(f"{KRUM} is close to no attack", "nearer", (KRUM, BENIGN, ATTACKED))
    return [close, *claims]


def _claims_exp6(dataset: str) -> list[Claim]:
    fails = {"shakespeare": (KRUM,), "femnist": (FOOLSGOLD, FOOLSGOLD + AS_FEDML)}
    failing = fails.get(dataset, ())
    claims = []
    for rule in defenses():
        if rule in failing:
            claims.append(Claim(f"{rule} fails", "nearer", (rule, ATTACKED, BENIGN)))
        else:
            claims.append(Claim(f"{rule} mitigates the attack", "above", (rule, ATTACKED)))
    return claims


def _claims_exp7() -> list[Claim]:
    pairs = (("1 malicious", "2 malicious"), ("1 malicious", "3 malicious"))
    return [Claim(f"{a} and {b} are alike", "alike", (a, b)) for a, b in pairs]


def _claims_exp10() -> list[Claim]:
    return [Claim(f"{KRUM} mitigates random", "nearer", (KRUM, BENIGN, ATTACKED))]


CLAIMS = {
    "exp1": lambda part: _claims_exp1(),
    "exp2": lambda part: _claims_exp2(),
    "exp3": lambda part: _claims_exp3(),
    "exp4": lambda part: _claims_most_effective(),
    "exp5": lambda part: _claims_most_effective(),
    "exp6": lambda part: _claims_exp6(part.file),
    "exp7": lambda part: _claims_exp7(),
    "exp10": lambda part: _claims_exp10(),
}


def accuracy_of(results: Sequence[Result]) -> np.ndarray:
    """Percent: each seed's mean accuracy over the last evaluations, at most half of them."""
    values = [100 * np.asarray(one.metrics["accuracy"][1:]) for one in results]
    return np.array([one[-_tail(len(one)) :].mean() for one in values])


def _tail(evaluations: int) -> int:
    return min(TAIL, max(evaluations // 2, 1))


# --- Writers ------------------------------------------------------------------------------------


def _describe(report: Report) -> str:
    experiment, plan = report.last.experiment, report.plan
    data = report.last.summary["data"]
    held = data["train"] - data["unused_train"]
    holding = f", {held} training examples with the clients" if data["unused_train"] else ""
    return (
        f"{data['label']}{holding}, `{experiment.model.registered_name}`, "
        f"{experiment.clients_per_round} of {experiment.data.num_clients} clients a round, "
        f"{experiment.rounds} rounds, scale `{plan.scale}`, statement `{plan['statement']}`"
    )


def _averaged(report: Report) -> str:
    number = _tail(len(report.last.metrics["accuracy"]) - 1)
    return f"mean of the last {number} evaluations" if number > 1 else "the last evaluation"


def _panels(report: Report) -> dict:
    panels: dict[str, dict] = {}
    for entry in report.entries:
        panels.setdefault(entry.row.column, {})[entry.row.row] = (entry.results, "accuracy")
    return panels


_FIGURE = writers.Curves(
    _panels, lambda report: _describe(report).replace("`", ""), "test accuracy (%)", 6.2, 4.4
)
_TABLE = writers.Table(
    ("run", "attack"),
    lambda report, entry: {"accuracy": accuracy_of(entry.results)},
    lambda report: (
        f"{_describe(report)}, {report.over}. Percent, {_averaged(report)}. The paper prints no "
        f"number."
    ),
)
_PLAIN_TABLE = writers.Table(("run",), _TABLE.measure, _TABLE.caption)


def write_orderings(report: Report) -> list:
    """Writes `PATH_orderings.md` and `.csv`: each ordering of the text, and whether it holds."""
    results = {entry.row.label: entry.results for entry in report.entries}
    lines = []
    for claim in CLAIMS[report.name](report.part):
        if set(claim.rows) <= set(results):
            margin = claim.margin({row: accuracy_of(results[row]) for row in claim.rows})
            line = {"ordering": claim.text, "margin": margin.mean()}
            if len(margin) > 1:
                line["spread"] = margin.std(ddof=1)
            line["here"] = claim.verdict(margin)
            failed = {row: writers.diverged(results[row]) for row in claim.rows}
            if failed := [f"{row}: {said}" for row, said in failed.items() if said]:
                line["diverged"] = "; ".join(failed)
            lines.append(line)
    path = report.path.with_name(f"{report.path.name}_orderings")
    if not lines:  # of earlier rows, which are no longer in the table
        files.remove_files(path.with_suffix(suffix) for suffix in (".md", ".csv"))
        return []
    if report.plan.seeds > 1:
        limit = (
            "runs of a seed being paired; within one standard deviation over seeds it is within "
            "the spread"
        )
    else:
        limit = "which one seed does not tell from chance"
    about = f"{_describe(report)}, {report.over}. `margin` is by how many percentage points an"
    head = (
        f"# {report.heading}: the text's orderings\n\n{about} ordering holds, {limit}.{report.note}"
    )
    return writers.write_table(pd.DataFrame(lines), head, path)


def _write(report: Report) -> list:
    with_column = any(entry.row.column for entry in report.entries)
    table = _TABLE if with_column else _PLAIN_TABLE
    return [*_FIGURE(report), *table(report), *write_orderings(report)]


def _item(title: str, rows, files: Sequence[str] = ("cifar10",), titles: Mapping = {}) -> Item:
    """`titles` maps files to their names in the paper, where it shows each apart."""

    def parts(plan):
        several = len(files) > 1
        return [
            Part(
                file,
                (file,),
                axes={"data": file} if several else {},
                suffix=f"_{file}" if several else "",
                title=titles.get(file, ""),
            )
            for file in files
            if plan["dataset"] in ("all", file)
        ]

    return Item(title, rows, _write, parts)


_FIGURES6 = {
    "cifar100": "Exp 6, Figure 9",
    "shakespeare": "Exp 6, Figure 10",
    "femnist": "Exp 6, Figure 11",
}

PAPER = Paper(
    __name__,
    "FedSecurity",
    {
        "exp1": _item("Exp 1, Figure 3", _exp1),
        "exp2": _item("Exp 2, Figure 4", _exp2),
        "exp3": _item("Exp 3, Figures 5 and 6", _exp3),
        "exp4": _item("Exp 4, Figure 7", _exp4),
        "exp5": _item("Exp 5, Figure 8", _exp5),
        "exp6": _item("Exp 6, Figures 9 to 11", _exp6, tuple(_FIGURES6), _FIGURES6),
        "exp7": _item("Exp 7, Figure 12", _exp7),
        "exp10": _item("Exp 10, Figure 15", _exp10, ("mnist",)),
    },
    options=(
        Option(
            "dataset",
            ("all", "cifar10", "cifar100", "shakespeare", "femnist", "mnist"),
            "Data set.",
            "all",
        ),
        Option(
            "statement",
            tuple(SELECTED),
            "What the text says, or the author's configurations, where they differ (Exps 5 to 7).",
            "text",
        ),
    ),
    seeds=3,
    labelled=True,
)

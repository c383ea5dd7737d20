"""*FLTrust* (Cao, Fang, Liu and Gong 2021): Table III, and what changes its numbers.

Testing error rates and attack success rates are shares in [0, 1], as in the paper, of the global
model after the last round.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from fedjax_sec import core
from fedjax_sec.attacks.update.scaling import CORNER
from fedjax_sec.report import paper_writers as writers
from fedjax_sec.report.paper import Case, Item, Option, Paper, Part, Plan, Row
from fedjax_sec.runs import config as config_lib
from fedjax_sec.runs.config import Experiment
from fedjax_sec.runs.experiment import Result, best_evaluation

_RESNET, _HAR = ("cifar10", "ch_mnist"), ("har", "har_windows")
DATASETS = ("mnist-0.1", "mnist-0.5", "fashion_mnist", "cifar10", *_HAR, "ch_mnist")
DEFENSES = ("FedAvg", "Krum", "Trim-mean", "Median", "FLTrust")
#: FLTrust with steps as long as the author code's. Its losses are summed, there and in clients, and
#: divided by the clients' batch; the server's batch is the whole root data set, so FLTrust's steps
#: are (root / batch) times as long as those of a mean, while FedAvg's are the same. The text does
#: not say which it means, so the tables have both.
LONG_STEPS = "FLTrust, author's step"
#: The second pooling of Table II's network drops a row and a column, and with them all pixels of
#: rows and columns 26 and 27: three of the trigger's four. On its data sets the table has this row
#: too: the same trigger two pixels farther up and left, where the network sees it (a choice).
IN_SIGHT = "Scaling attack, trigger in sight"
#: V of the paper's adaptive attack, where a scale cannot afford its ten: most of a round's time.
SWEEPS = {("smoke", "image"): 2, ("small", "image"): 2, ("smoke", "resnet"): 2}
#: The normalisation inside ResNet20: where batch norm's running statistics are, or group norm.
NORMS = {
    "aggregated": {"name": "resnet", "depth": 20, "norm": "batch", "statistics": "aggregated"},
    "local": {"name": "resnet", "depth": 20, "norm": "batch", "statistics": "local"},
    "group": {"name": "resnet", "depth": 20, "norm": "group"},
}
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4)
SIZES = (10, 50, 100, 200, 500)
BIASES = (0.2, 0.4, 0.6, 0.8, 1.0)
QS = (0.1, 0.3, 0.5, 0.7, 0.9)


def corner(side: int, target: int) -> dict:
    """The attack's default trigger in the lower right corner of `side` x `side` pixels (a choice).

    >>> corner(28, 0) == CORNER
    True
    """
    pixels = [[i + side - 28, j + side - 28] for i, j in CORNER["pixels"]]
    return CORNER | {"pixels": pixels, "target": target}


_FEATURES = {"name": "feature_trigger", "every": 20, "value": 0.0, "target": 1}
#: The trigger of the Scaling attack where it is not the attack's default (Section VI-A). For
#: CIFAR-10 the text refers to Bagdasaryan et al., whose published code has no pattern of pixels.
TRIGGERS = {
    "cifar10": corner(32, target=2),
    "ch_mnist": corner(64, target=0),
    **dict.fromkeys(_HAR, _FEATURES),
}


def kind(dataset: str) -> str:
    """`har`, `image` or `resnet`: what the scales tell apart."""
    return "resnet" if dataset in _RESNET else "har" if dataset in _HAR else "image"


def defense(column: str, base: Mapping, bound: int | None = None) -> dict:
    """A column's changes: the rule, whose f (Krum) and k (Trim-mean) are `bound`.

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
    """The experiment with the server's rate, wherever it is from, times root / batch.

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


def attacks(plan: Plan) -> dict[str, dict]:
    """The rows of Table III: what each changes in an experiment."""
    dataset = plan["dataset"]
    trigger = TRIGGERS.get(dataset, CORNER)
    scaling = {"name": "scaling", "backdoor": trigger}
    in_sight = scaling | {"backdoor": corner(26, target=0)}
    sweeps = SWEEPS.get((plan.scale, kind(dataset)))
    adaptive = {"name": "fltrust_adaptive"} | ({} if sweeps is None else {"rounds": sweeps})
    return {
        # With the success of the trigger that nobody taught, to compare the Scaling attack with.
        "No attack": {"attack": None, "threat.num_malicious": 0, "evaluation.backdoor": trigger},
        "LF attack": {"attack": "label_flip"},
        "Krum attack": {"attack": "krum_attack"},
        "Trim attack": {"attack": "trim_attack"},
        "Scaling attack": {"attack": scaling},
        **({IN_SIGHT: {"attack": in_sight}} if trigger is CORNER else {}),
        "Adaptive attack": {"attack": adaptive},
    }


def _cell(row: str, change: Mapping, column: str, rule: Mapping) -> Row:
    """A cell of a table: those of several tables have one name."""
    finish = stretched if column == LONG_STEPS else None
    return Row(row, change | rule, column, name=f"{row} {column}", finish=finish)


def _table(case: Case, known: Mapping[str, dict]) -> list[Row]:
    return [
        _cell(row, change, column, defense(column, case.base))
        for row, change in known.items()
        for column in (*DEFENSES, LONG_STEPS)
    ]


def _table3(case: Case) -> list[Row]:
    return _table(case, attacks(case.plan))


def _adaptive(case: Case) -> list[Row]:
    """The rows that show the gain of an ascent through the rule itself."""
    known = {name: attacks(case.plan)[name] for name in ("No attack", "Adaptive attack")}
    return _table(case, known | {"Gradient adaptive attack": {"attack": "gradient_adaptive"}})


def _norms(case: Case) -> list[Row]:
    return [
        Row(row, attacks(case.plan)[row] | defense(column, case.base) | {"model": model}, column, x)
        for row in ("No attack", "Trim attack")
        for column in ("FedAvg", "FLTrust")
        for x, model in NORMS.items()
    ]


def _some(case: Case) -> dict[str, dict]:
    """The attacks of the curves."""
    known = attacks(case.plan)
    scaling = IN_SIGHT if IN_SIGHT in known else "Scaling attack"
    return {name: known[name] for name in ("Trim attack", scaling, "Adaptive attack")}


def _malicious(case: Case) -> list[Row]:
    numbers = {share: round(share * case.base["data"]["num_clients"]) for share in SHARES}
    clean = attacks(case.plan)["No attack"]
    return [
        Row(
            row,
            (change if share else clean)
            | defense(column, case.base, bad)
            | {"threat.num_malicious": bad},
            column,
            str(share),
        )
        for row, change in _some(case).items()
        for column in DEFENSES
        for share, bad in numbers.items()
    ]


def _q(case: Case) -> list[Row]:
    return [
        Row(
            row,
            change
            | defense(column, case.base)
            | {"data.partition": {"name": "label_groups", "q": q}},
            column,
            str(q),
        )
        for row, change in _some(case).items()
        for column in DEFENSES
        for q in QS
    ]


def _root(values: Mapping[float, Mapping]):
    """FLTrust's rows over what the root data set is."""

    def rows(case: Case) -> list[Row]:
        known = {"No attack": attacks(case.plan)["No attack"]} | _some(case)
        rule = defense("FLTrust", case.base)
        return [
            Row(row, change | rule | {"server.root": root}, "FLTrust", str(x))
            for row, change in known.items()
            for x, root in values.items()
        ]

    return rows


def measured(results: Sequence[Result], which: int | None = -1) -> dict[str, np.ndarray]:
    """Error, and success where there is a backdoor, of each seed after the last round.

    `which=None` takes the evaluation with the smallest error instead.
    """
    values: dict[str, list] = {}
    for result in results:
        at = best_evaluation(result.metrics, "accuracy") if which is None else which
        values.setdefault("error", []).append(1 - result.metrics["accuracy"][at])
        names = [stage.registered_name for stage in result.experiment.attack.stages]
        if "attack_success_rate" in result.metrics and names in ([], ["scaling"]):
            values.setdefault("success", []).append(result.metrics["attack_success_rate"][at])
    return {name: np.array(each) for name, each in values.items()}


def _describe(report) -> str:
    plan, experiment = report.plan, report.last.experiment
    root = f"root data set of {experiment.server.root.size}, "
    sweeps = SWEEPS.get((plan.scale, kind(plan["dataset"])))
    adaptive = f"adaptive attack with V = {sweeps} sweeps, "
    return (
        f"{report.last.summary['data']['label']}, `{experiment.model.registered_name}`, "
        f"{experiment.data.num_clients} clients, {experiment.rounds} rounds of one batch of "
        f"{experiment.client.batch_size}, {root * (report.name != 'root_size')}"
        f"{adaptive * bool(sweeps and report.name != 'norms')}scale `{plan.scale}`, {report.over}"
    )


def _says(report) -> str:
    return (
        f"{_describe(report)}. Testing error rate after the last round / success rate of the "
        f"Scaling attack's trigger{', ± standard deviation' * (report.plan.seeds > 1)}. Empty: not "
        f"in the text at hand. `{LONG_STEPS}` multiplies the server's rate."
    )


def _says_of_norms(report) -> str:
    return (
        f"{_describe(report)}. Testing error rate after the last round; trust scores in the first "
        f"round and on average over evaluated rounds."
    )


def _measure_norms(report, entry) -> dict[str, float]:
    error = measured(entry.results)["error"]
    values = {"error": error.mean()} | (
        {"error: spread": error.std(ddof=1)} if len(error) > 1 else {}
    )
    if entry.row.column == "FLTrust":
        for whose in ("honest", "malicious"):
            scores = np.array([result.metrics[f"kept_{whose}"] for result in entry.results])
            values[f"trust, {whose}: first"] = scores[:, 0].mean()
            values[f"trust, {whose}: mean"] = scores.mean()
    return values


def _needs_diagnostics(row: Row, experiment: Experiment):
    yield experiment.evaluation.diagnostics, "evaluation.diagnostics"


GRID = writers.Grid(
    ("attack", "defense"), (*DEFENSES, LONG_STEPS), measured, ("error", "success"), _says
)
NORMS_TABLE = writers.Table(
    ("attack", "defense", "norm"), _measure_norms, _says_of_norms, digits=4, shown=2
)
CURVES = writers.Points(
    ("attack", "defense", "x"),
    DEFENSES,
    measured,
    lambda row: {"error": "-o"} | ({"success": "--^"} if row.startswith("Scaling") else {}),
    lambda report: (
        f"{_describe(report)}{', band: ± one standard deviation' * (report.plan.seeds > 1)}. "
        f"After the last round"
    ),
    "",
    "testing error rate (dashed: attack success)",
)


def _curve(title: str, rows, kinds=("har", "image", "resnet"), ticks=()) -> Item:
    write = dataclasses.replace(CURVES, xlabel=title, ticks=ticks)
    return Item(title, rows, write, _parts(*kinds))


def _parts(*kinds: str):
    """The data set asked for, where the item is there for its kind."""

    def parts(plan: Plan) -> list[Part]:
        name = plan["dataset"]
        return [Part(name, (kind(name), name))] if kind(name) in kinds else []

    return parts


_ALL = _parts("har", "image", "resnet")
_SIZES = {size: {"size": size} for size in SIZES}
_BIASES = {bias: {"size": 100, "sampling": "biased", "bias": bias} for bias in BIASES}
PAPER = Paper(
    __name__,
    "FLTrust",
    {
        "table3": Item("Table III", _table3, GRID, _ALL),
        "adaptive": Item("adaptive attacks", _adaptive, GRID, _ALL, published="table3"),
        "norms": Item(
            "what normalises in ResNet20",
            _norms,
            NORMS_TABLE,
            _parts("resnet"),  # nothing else has batch norm
            _needs_diagnostics,
        ),
        "malicious": _curve("share of malicious clients", _malicious),
        "root_size": _curve("size of the root data set", _root(_SIZES), ticks=SIZES),
        "bias": _curve("bias probability of the root data set", _root(_BIASES)),
        # With HAR the users are the clients.
        "q": _curve("q of the partition", _q, ("image", "resnet")),
    },
    options=(Option("dataset", DATASETS, "Data set."),),
    seeds=3,
)

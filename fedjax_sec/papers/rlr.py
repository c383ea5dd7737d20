"""*Defending against Backdoors in Federated Learning with Robust Learning Rate* (Ozdayi,
Kantarcioglu and Gel 2021): its tables and figures, and what it leaves to its appendix.

Without clipping M and sigma are 0, as in the paper's tables.
"""

from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from fedjax_sec.report import features, plotting
from fedjax_sec.report import paper_writers as writers
from fedjax_sec.report.paper import Case, Item, Option, Paper, Part, Row
from fedjax_sec.runs.config import Experiment

#: Clipping threshold M and noise sigma of Table 1 where there are any.
CLIPPING = {"iid": (4.0, 1e-3), "noniid": (0.5, 1e-3)}
#: Learning rate of the server under sign aggregation: the text gives none, so this is a choice.
SIGN_LEARNING_RATE = 1e-3
#: FoolsGold with many users compares output layers: whole histories would be N D floats.
FEATURES = {"iid": None, "noniid": 1290}
THRESHOLDS = {"iid": 4, "noniid": 8}
METRICS = {
    "backdoor": "attack_success_rate",
    "validation": "accuracy",
    "base": "base_class_accuracy",
}
_CLEAN = {"attack": None, "threat.num_malicious": 0}


def stages(aggregator: str, setting: str, *, rlr=False, clipped=False) -> dict:
    """The changes of one of Table 1's rows: defence, server and projection.

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
    defense, changes = [rules[aggregator]], {}
    if clipped:
        norm, sigma = CLIPPING[setting]
        noise = {"name": "gaussian_noise", "std": sigma, "max_norm": norm}
        defense = [{"name": "clip_norm", "max_norm": norm}, *defense, noise]
        changes["client.max_norm"] = norm
    if rlr:
        theta = THRESHOLDS[setting] if rlr is True else rlr
        defense.append({"name": "rlr", "threshold": theta})
    if aggregator == "Sign":
        changes["server.optimizer"] = {"name": "sgd", "learning_rate": SIGN_LEARNING_RATE}
    return changes | {"defense": defense}


def _table1(case: Case) -> dict[str, dict]:
    (setting,) = case.part.scales
    rows = {"FedAvg-No Attack": stages("FedAvg", setting) | _CLEAN}
    for name in ("FedAvg", "FoolsGold", "Comed", "Sign"):
        rows[name] = stages(name, setting)
        rows[f"{name}, clipping and noise"] = stages(name, setting, clipped=True)
    rows["FedAvg with RLR"] = stages("FedAvg", setting, rlr=True)
    rows["FedAvg with RLR, clipping and noise"] = stages("FedAvg", setting, rlr=True, clipped=True)
    # Measuring changes no run, so Figure 4 is drawn from the table's.
    for name in ("FedAvg", "FedAvg with RLR"):
        rows[name] |= {"evaluation.influence": {"max_images": 500}}
    return rows


def _some(*names: str):
    """Some of Table 1's rows."""
    return lambda case: {name: _table1(case)[name] for name in names}


def _combined(case: Case) -> dict[str, dict]:
    return {
        f"{name} with RLR{', clipping and noise' * clipped}": stages(
            name, "iid", rlr=True, clipped=clipped
        )
        for name in ("Comed", "Sign")
        for clipped in (False, True)
    }


def _removal(case: Case) -> dict[str, dict]:
    table, half = _table1(case), case.base["rounds"] // 2
    theta = {"schedule": "steps", "values": {0: 0, half: 4}}
    return {
        "FedAvg": table["FedAvg"],
        f"RLR from round {half}": stages("FedAvg", "iid", rlr=theta),
        "FedAvg with RLR": table["FedAvg with RLR"],
    }


def _patterns(case: Case) -> dict[str, dict]:
    rows = {}
    for pattern in ("square", "copyright", "apple"):
        both = {"name": "trojan", "base": 5, "target": 7, "pattern": pattern}
        change = {"attack": both, "evaluation.backdoor": both}
        rows[f"{pattern}: FedAvg"] = stages("FedAvg", "iid") | change
        rows[f"{pattern}: FedAvg with RLR"] = stages("FedAvg", "iid", rlr=True) | change
    return rows


def _semantic(case: Case) -> dict[str, dict]:
    flip = {"name": "label_flip", "base": 5, "target": 7}
    backdoor = {"evaluation.backdoor": flip}
    boosted = {"attack": [flip, {"name": "boost", "factor": 10.0}]} | backdoor
    return {
        "FedAvg, not boosted": stages("FedAvg", "iid") | {"attack": flip} | backdoor,
        **{
            f"FedAvg{' with RLR' * rlr}{', clipping and noise' * clipped}": stages(
                "FedAvg", "iid", rlr=rlr, clipped=clipped
            )
            | boosted
            for rlr in (False, True)
            for clipped in (False, True)
        },
    }


def _table2(split: bool):
    trojan = {"name": "trojan", "base": 5, "target": 7, "fraction": 0.5}
    trojan |= {"split": 4, "parts": "author"} if split else {}
    mean = {"attack": trojan, "defense": {"name": "mean"}}
    rlr = {"attack": trojan, "defense": ["mean", {"name": "rlr", "threshold": 8}]}
    return lambda case: {
        "FedAvg-No Attack": mean | _CLEAN,
        "FedAvg": mean,
        "FedAvg with RLR": rlr,
    }


def _describe(report) -> str:
    """The last row's experiment, an attacked one."""
    experiment = report.last.experiment
    data, client = experiment.data, experiment.client
    return (
        f"{report.last.summary['data']['label']}, {data.num_clients} agents "
        f"({experiment.clients_per_round} a round, {experiment.threat.num_malicious} corrupt), "
        f"{experiment.rounds} rounds, {client.epochs} local epochs of batch {client.batch_size}, "
        f"scale `{report.plan.scale}`"
    )


def _panels(report) -> Mapping:
    return {
        entry.row.row: {title: (entry.results, metric) for title, metric in METRICS.items()}
        for entry in report.entries
    }


def _draw_influence(report):
    rows = report.entries
    size = (4.4 * len(rows), 3.3)
    figure, panels = plotting.subplots(
        1, len(rows), figsize=size, squeeze=False, layout="constrained"
    )
    for panel, entry in zip(panels[0], rows, strict=True):
        plotting.influence(panel, entry.results[0], entry.row.row)
    return figure, f"{_describe(report)}; seed 0"


def _write_features(report) -> list:
    """Gradient SHAP of stamped test images that RLR reads as base class and FedAvg as target.

    Where there are none, images that RLR reads as base class, else the first.
    """
    folders = {entry.row.row: entry.folder for entry in report.entries}
    models = features.Models(report["FedAvg"].results[0].experiment, folders)
    x, labels, read = models.stamped(500)
    resists = read["FedAvg with RLR"] == models.backdoor.base
    both = resists & (read["FedAvg"] == models.backdoor.target)
    order = np.argsort(~both * 2 + ~resists, kind="stable")[:3]
    titles = {
        "no attack": "FedAvg-No Attack",
        "attack": "FedAvg",
        "attack, RLR": "FedAvg with RLR",
    }
    maps = {title: models.explain(row, jnp.asarray(x)[order]) for title, row in titles.items()}
    said = f"{_describe(report)}. Gradient SHAP, seed 0.{report.note}"
    return plotting.feature_maps(
        np.asarray(x[order]), maps, report.path, labels=labels[order], said=said
    )


def _needs(row: Row, experiment: Experiment):
    yield experiment.backdoor is not None, "a backdoor (evaluation.backdoor)"


def _needs_influence(row: Row, experiment: Experiment):
    yield from _needs(row, experiment)
    yield experiment.evaluation.influence is not None, "evaluation.influence"


def _needs_features(row: Row, experiment: Experiment):
    yield from _needs(row, experiment)
    yield experiment.backdoor.base is not None, "a backdoor with a base class"
    yield experiment.checkpoint.keep_params, "checkpoint.keep_params"


TABLE = writers.Table(
    ("aggregation",),
    lambda report, entry: {
        title: writers.percent(entry.results, metric) for title, metric in METRICS.items()
    },
    lambda report: f"{_describe(report)}. Percent after the last round, {report.over}.",
)
CURVES = writers.Curves(_panels, _describe)
_FIGURE2 = (
    "FedAvg",
    "FedAvg with RLR",
    "FedAvg, clipping and noise",
    "FedAvg with RLR, clipping and noise",
)
_FIGURE5 = ("FedAvg-No Attack", "FedAvg", "FedAvg with RLR")


def _parts(setting: str) -> Callable[..., Sequence[Part]]:
    """The file of a setting; the bottom half of Table 1 is of the data set that is asked for."""
    files = {"iid": "fashion_mnist", "cifar10": "cifar10"}
    published = {"noniid": "femnist_digits"}.get(setting, "")

    def parts(plan) -> list[Part]:
        file = files.get(setting) or plan["non_iid"]
        return [Part(file, (setting,), published, {"setting": setting})]

    return parts


def _item(setting: str, title: str, rows, write, needs=_needs, whole=False) -> Item:
    def listed(case: Case) -> list[Row]:
        return [Row(name, changes) for name, changes in rows(case).items()]

    return Item(title, listed, write, _parts(setting), needs, whole)


_INFLUENCE = (_some("FedAvg", "FedAvg with RLR"), writers.Figure(_draw_influence), _needs_influence)
_FEATURES = (_some(*_FIGURE5), _write_features, _needs_features, True)
PAPER = Paper(
    __name__,
    "Robust learning rate",
    {
        "table1-iid": _item("iid", "Table 1, top", _table1, TABLE),
        "table1-noniid": _item("noniid", "Table 1, bottom", _table1, TABLE),
        "table2-trojan": _item("cifar10", "Table 2, top", _table2(False), TABLE),
        "table2-distributed": _item("cifar10", "Table 2, bottom", _table2(True), TABLE),
        "figure2": _item("iid", "Figure 2", _some(*_FIGURE2), CURVES),
        "figure3": _item("noniid", "Figure 3", _some(*_FIGURE2), CURVES),
        "figure4-iid": _item("iid", "Figure 4, a and b", *_INFLUENCE),
        "figure4-noniid": _item("noniid", "Figure 4, c and d", *_INFLUENCE),
        "figure5-iid": _item("iid", "Figure 5, a", *_FEATURES),
        "figure5-noniid": _item("noniid", "Figure 5, b", *_FEATURES),
        "combined": _item("iid", "comed and sign with RLR", _combined, TABLE),
        "removal": _item("iid", "removing a backdoor during training", _removal, CURVES),
        "patterns": _item("iid", "other trojan patterns", _patterns, TABLE),
        "semantic": _item("iid", "boosted label flips", _semantic, TABLE),
    },
    options=(
        Option(
            "non_iid",
            ("mnist_by_writer", "femnist_digits"),
            "Data of the non-IID half; the paper's is femnist_digits.",
            "mnist_by_writer",
        ),
    ),
)

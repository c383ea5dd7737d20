"""What updates give away: our own experiments on reconstruction, in the papers' engine.

No paper prints these numbers: privacy, accuracy and robustness of defences side by side;
reconstruction along a training; labels over batch sizes.
"""

import numpy as np

from fedjax_sec.report import paper_writers as writers
from fedjax_sec.report import plotting
from fedjax_sec.report.paper import Case, Item, Paper, Part, Report, Row

#: Defence -> what it changes of the experiment.
DEFENSES = {
    "none": {},
    "noise 1e-3": {"defense": [{"name": "gradient_noise", "std": 1e-3}, "mean"]},
    "noise 1e-2": {"defense": [{"name": "gradient_noise", "std": 1e-2}, "mean"]},
    "noise 1e-1": {"defense": [{"name": "gradient_noise", "std": 1e-1}, "mean"]},
    "pruning 0.3": {"defense": [{"name": "gradient_pruning", "share": 0.3}, "mean"]},
    "pruning 0.9": {"defense": [{"name": "gradient_pruning", "share": 0.9}, "mean"]},
    "sign": {"defense": ["gradient_sign", "mean"]},
    "clipping 0.05": {"defense": [{"name": "gradient_clipping", "max_norm": 0.05}, "mean"]},
    "Soteria 0.6": {"defense": [{"name": "soteria", "share": 0.6}, "mean"]},
    "Soteria 0.9": {"defense": [{"name": "soteria", "share": 0.9}, "mean"]},
    "Outpost": {"defense": ["outpost", "mean"]},
    "DP-SGD 0.1": {"client": {"name": "dp_sgd", "noise": 0.1, "optimizer": 0.1}},
    "DP-SGD 1": {"client": {"name": "dp_sgd", "noise": 1.0, "optimizer": 0.1}},
    "5 local steps": {"client.steps": 5, "client.optimizer.learning_rate": 0.02},
    "secure aggregation": {"evaluation.monitors.secure_aggregation": True},
    "median": {"defense": "median"},
    "Krum": {"defense": {"name": "krum", "num_byzantine": 4}},
}
#: The attack whose effect is the robustness of a defence: 4 of 20 clients reverse their updates.
ATTACK = {"attack": {"name": "sign_flip", "scale": 3.0}, "threat.num_malicious": 4}
CLEAN, ATTACKED = "no attack", "sign flipping"
STRATEGIES = {
    "bias": {"name": "labels", "strategy": "bias"},
    "sign (iDLG)": {"name": "labels", "strategy": "sign"},
    "minimum (GradInversion)": {"name": "labels", "strategy": "minimum"},
    "label_bag": {"name": "label_bag"},
}
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


def _client(changes: dict) -> dict:
    """The changes with the client's own fields filled in."""
    client = changes.get("client")
    if client is None:
        return changes
    base = {"steps": 1, "batch_size": 8, "optimizer": {"name": "sgd", "learning_rate": 0.1}}
    return changes | {"client": base | {k: v for k, v in client.items() if k != "optimizer"}}


def _tradeoff(case: Case) -> list[Row]:
    rows = []
    for name, changes in DEFENSES.items():
        changes = _client(changes)
        rows.append(Row(name, changes, CLEAN))
        rows.append(Row(name, changes | ATTACK, ATTACKED))
    return rows


def _training(case: Case) -> list[Row]:
    """Who looks, and how clients train, along one training."""
    monitor = "evaluation.monitors."
    seen = {f"{monitor}observer": "downlink"}
    adversarial = {
        "client.name": "adversarial",
        "client.eps": 0.3,
        "client.step_size": 0.075,
        "client.pgd_steps": 10,
    }
    rows = {
        "server": {},
        "secure aggregation": {f"{monitor}secure_aggregation": True},
        "downlink, mean": seen,
        "downlink, Krum": seen
        | {f"{monitor}merged": 1, "defense": {"name": "krum", "num_byzantine": 4}},
        "server, adversarial training": adversarial,
        "server, 5 local steps": DEFENSES["5 local steps"],
    }
    return [Row(name, changes) for name, changes in rows.items()]


def _labels(case: Case) -> list[Row]:
    rows = []
    for size in BATCHES:
        sizes = {"client.batch_size": size, "data.max_train": 4 * size}
        for name, attack in STRATEGIES.items():
            if name == "label_bag" and size >= _BAG[case.part.file]:
                continue  # it needs fewer examples than features and classes
            rows.append(Row("", sizes | {"evaluation.monitors.attack": attack}, name, str(size)))
    return rows


#: The smaller of features and classes of the last layer.
_BAG = {"labels": 10, "labels_cifar100": 88}


# --- Writers ------------------------------------------------------------------------------------


def _metric(results, name: str, at=-1) -> np.ndarray:
    """Each seed's metric at an evaluation; the mean of all evaluations but the first for None."""
    values = [np.asarray(one.metrics[f"reconstruction/{name}"][1:], float) for one in results]
    return np.array([np.nanmean(one) if at is None else one[at] for one in values])


def _accuracy(results) -> np.ndarray:
    return writers.percent(results, "accuracy")


def _describe(report: Report) -> str:
    experiment, plan = report.last.experiment, report.plan
    attack = experiment.evaluation.monitors[0].attack
    return (
        f"{report.last.summary['data']['label']}, `{experiment.model.registered_name}`, "
        f"{experiment.data.num_clients} clients, {experiment.rounds} rounds, "
        f"`{attack.registered_name}`, scale `{plan.scale}`, {report.over}"
    )


def _measure_tradeoff(report: Report, entry) -> dict:
    line: dict = {"accuracy": _accuracy(entry.results)}
    if entry.row.column == CLEAN:
        line["identified"] = 100 * _metric(entry.results, "identified", None)
        line["PSNR (dB)"] = _metric(entry.results, "psnr", None)
        private = [one.summary.get("privacy") for one in entry.results]
        line["epsilon"] = np.array([one["epsilon"] for one in private]) if all(private) else None
    return line


def _draw_tradeoff(report: Report):
    figure, axes = plotting.subplots(1, 1, figsize=(7.2, 6.4), layout="constrained")
    by_row: dict[str, dict] = {}
    for entry in report.entries:
        by_row.setdefault(entry.row.row, {})[entry.row.column] = entry.results
    points = {row: pair for row, pair in by_row.items() if len(pair) == 2}
    x = [_accuracy(pair[CLEAN]).mean() for pair in points.values()]
    y = [100 * _metric(pair[CLEAN], "identified", None).mean() for pair in points.values()]
    robust = [_accuracy(pair[ATTACKED]).mean() for pair in points.values()]
    drawn = axes.scatter(x, y, c=robust, cmap="viridis", vmin=0, vmax=100, s=30, edgecolor="k")
    # Names would cover one another: points have numbers, fanned out where they lie close.
    for number, (name, at_x, at_y) in enumerate(zip(points, x, y, strict=True), start=1):
        turn = 2 * np.pi * number / 5
        shift = (11 * np.cos(turn), 11 * np.sin(turn))
        place = {"xytext": shift, "textcoords": "offset points", "ha": "center", "va": "center"}
        axes.annotate(str(number), (at_x, at_y), fontsize=8, **place)
        axes.plot([], [], linestyle="", marker=f"${number}$", color="k", label=name)
    plotting.legend_below(figure)
    axes.set(xlabel="test accuracy (%)", ylabel="examples identified (%)", ylim=(-4, 104))
    axes.grid(alpha=0.3)
    figure.colorbar(drawn, ax=axes, label=f"test accuracy under {ATTACKED} (%)")
    return figure, _describe(report).replace("`", "")


_TRADEOFF_TABLE = writers.Table(
    ("defence", "attack"),
    _measure_tradeoff,
    lambda report: (
        f"{_describe(report)}. Identified: the share of guesses whose nearest example, among those "
        f"of all clients, is the one they were made of; mean over all evaluations. Attack: 4 of "
        f"the clients send their updates times -3."
    ),
)


def _write_tradeoff(report: Report) -> list:
    return [*writers.Figure(_draw_tradeoff)(report), *_TRADEOFF_TABLE(report)]


def _draw_training(report: Report):
    figure, axes = plotting.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for panel, (metric, label, factor) in zip(
        axes,
        (("psnr", "PSNR (dB)", 1), ("identified", "examples identified (%)", 100)),
        strict=True,
    ):
        for entry in report.entries:
            rounds = entry.results[0].metrics["round"][1:]
            values = np.stack(
                [factor * one.metrics[f"reconstruction/{metric}"][1:] for one in entry.results]
            )
            (line,) = panel.plot(rounds, values.mean(axis=0), "o-", ms=3, label=entry.row.row)
            if len(values) > 1:
                plotting.spread_of(panel, rounds, values, line)
        panel.set(xlabel="round", ylabel=label)
        panel.grid(alpha=0.3)
    plotting.legend_below(figure)
    return figure, _describe(report).replace("`", "")


_TRAINING_TABLE = writers.Table(
    ("what is seen",),
    lambda report, entry: {
        "PSNR at first (dB)": _metric(entry.results, "psnr", 0),
        "PSNR at last (dB)": _metric(entry.results, "psnr"),
        "identified at first": 100 * _metric(entry.results, "identified", 0),
        "identified at last": 100 * _metric(entry.results, "identified"),
        "accuracy": _accuracy(entry.results),
    },
    lambda report: f"{_describe(report)}. At first: before the first evaluation.",
)


def _write_training(report: Report) -> list:
    return [*writers.Figure(_draw_training)(report), *_TRAINING_TABLE(report)]


def _recovered(results) -> dict[str, np.ndarray]:
    """Label recovery in percent of the untrained network, and of the trained one."""
    return {
        "untrained": 100 * _metric(results, "label_recovery", 0),
        "trained": 100 * _metric(results, "label_recovery"),
    }


_LABELS = writers.Points(
    ("", "strategy", "batch size"),
    tuple(STRATEGIES),
    _recovered,
    lambda row: {"untrained": "o-", "trained": "s--"},
    lambda report: (
        f"{report.last.summary['data']['label']}, {report.last.experiment.model.registered_name}: "
        f"labels recovered, of the untrained network (circles) and after "
        f"{report.last.experiment.rounds} rounds (squares, dashed); {report.over}"
    ),
    "batch size",
    "labels recovered (%)",
    (-4, 104),
    BATCHES,
    5.2,
    4.2,
)


def _part(*files: str):
    return lambda plan: [Part(file, (file.partition("_")[0],)) for file in files]


PAPER = Paper(
    __name__,
    "Reconstruction",
    {
        "tradeoff": Item(
            "Privacy, accuracy and robustness", _tradeoff, _write_tradeoff, _part("mnist")
        ),
        "training": Item("Along a training", _training, _write_training, _part("mnist")),
        "labels": Item("Labels on MNIST", _labels, _LABELS, _part("labels")),
        "labels_cifar100": Item("Labels on CIFAR-100", _labels, _LABELS, _part("labels_cifar100")),
    },
    seeds=1,
    labelled=True,
)

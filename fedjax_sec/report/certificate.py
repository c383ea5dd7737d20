"""Certifies finished runs against backdoors, as CRFL does: its theorem with a run's own numbers."""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sec import core
from fedjax_sec.core import ConfigError, files
from fedjax_sec.core.host import undisturbed
from fedjax_sec.core.optional import require
from fedjax_sec.core.random import Stream, stream
from fedjax_sec.evaluation import certificate as theorem
from fedjax_sec.report import plotting
from fedjax_sec.runs import results
from fedjax_sec.runs.config import Experiment
from fedjax_sec.runs.loading import read_trained
from fedjax_sec.runs.prepare import Prepared, bound_task, prepare

CONVENTIONS = ("paper", "author")
#: The author code certifies 51 batches of 32 examples (`smooth_mnist.py`), takes the largest norm
#: of a model attacked in round 10 for the constant of every run, and keeps probabilities so far
#: from 0 and 1 (`certify_mnist.py`).
AUTHOR_EXAMPLES, AUTHOR_RADIUS, AUTHOR_FLOOR = 51 * 32, 3.0, 1e-8
#: The files of a certificate, beside its figure.
FILES = ("certificate.json", "certificate.csv")
#: Keys of a configuration that make no other run.
_OUTSIDE = ("seed", "data.data_dir", "data.download", "evaluation", "checkpoint", "execution")


class Certificate(NamedTuple):
    """The certificate of one run.

    `radius` [T] is each example's, NaN where the certificate abstains; `correct` [T] says whether
    most copies read it as its class. `terms` are the theorem's, `inputs` the largest norm of a
    training input that an attacker holds.
    """

    run: str
    label: str
    convention: str
    copies: int
    alpha: float
    std: float
    terms: theorem.Terms
    attacked: int
    rounds: int
    inputs: float | None
    radius: np.ndarray
    correct: np.ndarray

    @property
    def largest(self) -> float:
        """The largest radius of an example; 0 where all are abstained from."""
        known = self.radius[np.isfinite(self.radius)]
        return float(known.max()) if len(known) else 0.0

    @property
    def abstained(self) -> int:
        """The number of examples that the certificate abstains from."""
        return int(np.isnan(self.radius).sum())

    def at(self, radii) -> theorem.Certified:
        """Certified rate and accuracy at some radii."""
        return theorem.certified(self.radius, self.correct, radii)

    def to_dict(self) -> dict:
        """Everything but the radii, as JSON has it."""
        left = sum(theorem.log_contraction(*one) for one in self.terms.later)
        terms = self.terms._asdict()
        later = terms.pop("later")
        return {
            "run": self.run,
            "data": self.label,
            "convention": self.convention,
            "copies": self.copies,
            "alpha": self.alpha,
            "smoothing_std": self.std,
            "rounds": self.rounds,
            "attacked_round": self.attacked,
            "terms": {name: np.asarray(value).tolist() for name, value in terms.items()},
            "later_rounds": len(later),
            "log_contraction": left,
            "lipschitz_on_inputs": self.inputs,
            "examples": len(self.radius),
            "read_correctly": float(self.correct.mean()),
            "abstained": self.abstained,
            "largest_radius": self.largest,
        }


@undisturbed
def certify(
    run: str | Path,
    *,
    copies: int = 1000,
    alpha: float = 0.001,
    std: float | None = None,
    images: int | None = None,
    convention: str = "paper",
    lipschitz: float | None = None,
    scale: float | None = None,
    weight: float | None = None,
    seed: int = 0,
) -> Certificate:
    """The certificate of a finished run whose defence is `[mean, crfl]`.

    Args:
      run: its folder, with its parameters.
      copies: M, noisy copies of the final model that vote.
      alpha: each bound of a probability fails with this probability.
      std: deviation of the smoothing noise (None: the training's, in the attacked round).
      images: test examples, the first ones (None: all; with `author` those of 51 batches of 32).
      convention: `paper`, or what the `author` code does otherwise: the constant of a model of norm
        3 whatever the attacked round, the norms of later rounds without their cap, local steps
        n / B that are not rounded, equal weights of all clients, and no abstaining.
      lipschitz: the constant of the loss's gradient in an example; needed for all networks but
        logistic regression.
      scale: gamma, what attackers multiply their updates by; needed where the attack on updates is
        no multiple.
      weight: an attacker's weight in the aggregate; needed where the aggregator is no mean.
      seed: of the copies' noise.

    Raises: `ConfigError` for a folder without a finished run or parameters, and for a run that the
    theorem says nothing of: without `crfl` or with other stages of the server, without an attack in
    exactly one round, with some of the clients in a round, with other local training than plain
    SGD.
    """
    if convention not in CONVENTIONS:
        raise ConfigError(
            f"convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}."
            f"{core.suggestion(convention, CONVENTIONS)}"
        )
    if copies < 1 or not 0 < alpha < 1:
        raise ConfigError(
            f"certify: copies must be >= 1 and alpha in (0, 1), got {copies} and {alpha}."
        )
    for option, value in (("lipschitz", lipschitz), ("scale", scale), ("weight", weight)):
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"certify: {option} must be > 0, got {value}.")
    name = f"certify: {str(run)!r}"
    trained = read_trained(run)
    check(trained.experiment, name)
    prepared = prepare(trained.experiment)
    author = convention == "author"
    terms, attacked = terms_of(prepared, name, author, std, lipschitz, scale, weight)
    source = prepared.source
    total = len(source.y_test)
    images = min(AUTHOR_EXAMPLES, total) if images is None and author else images or total
    if not 1 <= images <= total:
        raise ConfigError(
            f"certify: images must be between 1 and {total}, the test examples of {source.label}, "
            f"got {images}."
        )
    smoothing = terms.later[-1][1] if terms.later else terms.std
    counts = _votes(prepared, trained.flat, name, images, copies, smoothing, seed)
    label, lower, upper = theorem.bounds(counts, alpha, AUTHOR_FLOOR if author else 0.0)
    return Certificate(
        Path(run).absolute().name,
        source.label,
        convention,
        copies,
        alpha,
        float(smoothing),
        terms,
        attacked + 1,
        trained.experiment.rounds,
        _lipschitz_on_inputs(prepared, attacked),
        theorem.radius(lower, upper, terms, abstains=not author),
        label == np.asarray(source.y_test[:images]),
    )


def _votes(prepared: Prepared, flat, name, images, copies, std, seed) -> np.ndarray:
    source = prepared.source
    task = bound_task(
        prepared.experiment, source, prepared.network, prepared.task, prepared.setting
    )
    x = jnp.asarray(source.x_test[:images])
    shape = jax.eval_shape(lambda x: task.outputs(flat, task.inputs.decode(x)), x).shape
    if len(shape) != 2:
        raise ConfigError(f"{name}: each example must be of one class; its outputs are {shape}.")
    run = jax.jit(
        functools.partial(
            theorem.votes,
            lambda params, x: task.outputs(
                core.with_statistics(task.space, params, flat), task.inputs.decode(x)
            ),
            num_classes=shape[1],
            copies=copies,
            std=std,
        )
    )
    return np.asarray(run(jnp.asarray(flat), jax.random.key(seed), x))


# --- A run's own numbers --------------------------------------------------------------------------


#: Fields of `sgd` with which its steps are no plain SGD's.
BESIDE_SGD = ("clip_gradient", "max_norm", "l2", "augmentation")


def check(experiment: Experiment, name: str = "certify") -> None:
    """Raises `ConfigError` for a run that the theorem says nothing of."""
    stages = experiment.defense.server_stages
    names = [stage.registered_name for stage in stages]
    if "crfl" not in names:
        raise ConfigError(
            f"{name}: its defence {names} has no 'crfl', whose noise the certificate rests on; "
            f"train with defense: [mean, crfl]."
        )
    if names[1:] != ["crfl"]:
        raise ConfigError(
            f"{name}: the theorem is of updates that are averaged, clipped and smoothed, and the "
            f"run's defence is {names}; train with defense: [mean, crfl]."
        )
    if not experiment.attack.stages:
        raise ConfigError(
            f"{name}: it has no attack, and the certificate says how large the backdoor of an "
            f"attack may be; train with an attack on data, such as 'trojan'."
        )
    threat, server, rounds = experiment.threat, experiment.server, experiment.rounds
    if not experiment.attack.data_stages or experiment.attack.adds_copies:
        raise ConfigError(
            f"{name}: the theorem is of a backdoor in the malicious clients' own examples, with "
            f"attack {experiment.attack.dump_spec()} there is none; train with an attack on data, "
            f"such as 'trojan', that adds no copies."
        )
    times = -(-(rounds - threat.start) // threat.every)
    if times != 1:
        raise ConfigError(
            f"{name}: the theorem is of an attack in one round, and this one is in {times}; set "
            f"threat.start to that round and threat.every to {rounds} or more."
        )
    if experiment.clients_per_round < experiment.data.num_clients or server.dropout:
        raise ConfigError(f"{name}: the theorem needs all clients in every round.")
    if threat.redraw:
        raise ConfigError(f"{name}: with threat.redraw nobody knows who attacked.")
    algorithm, client = experiment.algorithm.registered_name, experiment.client
    if algorithm != "fedavg" or client.registered_name != "sgd":
        raise ConfigError(
            f"{name}: the theorem is of FedAvg with SGD, this is {algorithm!r} with "
            f"{client.registered_name!r}."
        )
    if client.optimizer.rate is None:
        raise ConfigError(
            f"{name}: the theorem is of plain SGD with a learning rate alone; client.optimizer is "
            f"{client.optimizer.dump_spec()}."
        )
    for field in BESIDE_SGD:
        if value := core.dump(getattr(client, field)):
            raise ConfigError(
                f"{name}: the theorem is of plain SGD with a learning rate alone; client.{field} "
                f"is {value}, leave it out."
            )
    if local := [stage.registered_name for stage in experiment.defense.client_stages]:
        raise ConfigError(
            f"{name}: the theorem is of plain SGD, and {local} of the run's defence change what "
            f"clients do; train with defense: [mean, crfl]."
        )
    if (last := stages[1].rounds) != rounds:
        raise ConfigError(
            f"{name}: its last model holds noise, since the last round of 'crfl' was {last} of "
            f"{rounds}; train with defense.rounds at null."
        )


def terms_of(
    prepared: Prepared,
    name: str = "certify",
    author: bool = False,
    std: float | None = None,
    lipschitz: float | None = None,
    scale: float | None = None,
    weight: float | None = None,
) -> tuple[theorem.Terms, int]:
    """The theorem's terms of a run, and the number of the attacked round from 0."""
    experiment, population = prepared.experiment, prepared.population
    index, rounds = experiment.threat.start, experiment.rounds
    now = core.resolve(prepared.components, index)
    clients = np.flatnonzero(population.malicious)
    counts = np.asarray(population.counts, np.float64)
    client, rate = now.algorithm.client, float(now.algorithm.rate)
    if client.epochs is not None:
        steps = client.epochs * counts[clients] / client.batch_size
        steps = steps if author else client.epochs * -(-counts[clients] // client.batch_size)
    else:
        steps = np.full(len(clients), float(client.steps))
    aggregator, rule = now.defense.server_stages
    if weight is not None:
        weights = np.full(len(clients), weight)
    elif aggregator.registered_name != "mean":
        raise ConfigError(
            f"{name}: an attacker's weight under {aggregator.registered_name!r} depends on the "
            f"updates; give the one that it had (--weight)."
        )
    elif author or not aggregator.weighted:
        weights = np.full(len(clients), 1.0 / len(counts))
    else:
        weights = counts[clients] / counts.sum()
    smoothing, noise = float(rule.std) if std is None else std, float(rule.std)
    later = [
        (_radius_of(experiment, t, cap=not author), _std_of(experiment, t))
        for t in range(index + 1, rounds)
    ]
    if later or author:  # the last round's noise is the smoothing's
        later[-1:] = [(_radius_of(experiment, rounds - 1, cap=not author), smoothing)]
    else:
        noise = smoothing
    if lipschitz is None:
        if experiment.model.registered_name != "logistic_regression":
            raise ConfigError(
                f"{name}: the constant of the loss's gradient is known of logistic regression "
                f"only, and the network is {experiment.model.registered_name!r}; give one "
                f"(--lipschitz)."
            )
        radius = AUTHOR_RADIUS if author else _radius_of(experiment, index)
        lipschitz = theorem.lipschitz_constant(radius) / min(prepared.source.std)
    terms = theorem.Terms(
        weight=rate * weights,
        steps=steps,
        rate=float(client.optimizer.rate),
        poisoned=poisoned_shares(prepared, clients),
        scale=_scale_of(now.attack, name, counts, clients, rate) if scale is None else scale,
        std=noise,
        lipschitz=lipschitz,
        later=tuple(later),
    )
    return terms, index


def poisoned_shares(prepared: Prepared, clients) -> np.ndarray:
    """The share of each of these clients' examples that the attack poisons."""
    population, labels_of = prepared.population, prepared.task.labels_of
    attack = core.resolve(prepared.experiment.attack, prepared.experiment.threat.start)
    key = stream(jax.random.key(prepared.experiment.seed), Stream.POISON)
    does = np.asarray(attack.poisoned_by(jnp.asarray(population.malicious)))
    y, shares = np.asarray(prepared.source.y_train), []
    for client in clients:
        count = int(population.counts[client])
        held = np.arange(population.index.shape[1]) < count
        labels = labels_of(jnp.asarray(y[population.index[client]]))
        masks = attack.choose(jax.random.fold_in(key, int(client)), labels, jnp.asarray(held))
        chosen = [np.asarray(m) & who for m, who in zip(masks, does[:, client], strict=True)]
        shares.append(np.any(chosen, axis=0).sum() / max(count, 1))
    return np.array(shares)


def _scale_of(attack, name: str, counts, clients, rate: float) -> float:
    """gamma: the factor of an attack that multiplies updates; 1 without one."""
    if not attack.update_stages:
        return 1.0
    fields = {field.name for one in attack.update_stages for field in dataclasses.fields(one)}
    if len(attack.update_stages) > 1 or not {"factor", "accounts_for"} <= fields:
        names = [one.registered_name for one in attack.update_stages]
        raise ConfigError(
            f"{name}: the theorem is of updates times a factor, such as those of 'boost', and what "
            f"{names} make of them may be anything; give a factor that bounds it (--scale)."
        )
    (one,) = attack.update_stages
    if one.factor is not None:
        return float(one.factor)
    if one.accounts_for == "clients":
        return float(len(counts))
    return float(counts.sum() / (rate * counts[clients].sum()))


def _rule_at(experiment: Experiment, index: int):
    return core.resolve(experiment.defense, index).server_stages[1]


def _radius_of(experiment: Experiment, index: int, cap: bool = True) -> float:
    rule = _rule_at(experiment, index)
    return float((rule if cap else dataclasses.replace(rule, cap=None)).radius(index))


def _std_of(experiment: Experiment, index: int) -> float:
    return float(_rule_at(experiment, index).std)


def _lipschitz_on_inputs(prepared: Prepared, index: int) -> float | None:
    """Our own constant for the training inputs, of logistic regression; None of others."""
    experiment, source = prepared.experiment, prepared.source
    if experiment.model.registered_name != "logistic_regression":
        return None
    inputs, largest = source.inputs, 0.0
    for start in range(0, len(source.x_train), 10_000):
        x = inputs.normalize(inputs.decode(source.x_train[start : start + 10_000]))
        norms = np.linalg.norm(np.asarray(x, np.float64).reshape(len(x), -1), axis=1)
        largest = max(largest, float(norms.max()))
    constant = theorem.lipschitz_on_inputs(_radius_of(experiment, index), largest)
    return constant / min(source.std)


# --- Files ----------------------------------------------------------------------------------------


def grid(
    certificates: Sequence[Certificate], points: int = 211, beyond: float = 1.05
) -> np.ndarray:
    """Radii from 0 to the largest of all certificates, and a little `beyond`."""
    return np.linspace(0.0, beyond * (max(one.largest for one in certificates) or 1.0), points)


def labelled(runs: Sequence[str | Path], made: Sequence[Certificate]) -> dict[str, Certificate]:
    """The certificates of some runs by what tells them apart, numbers in ascending order."""
    names = labels([results.RunFolder(run).experiment() for run in runs])
    if len(set(names)) < len(names):  # runs that differ in their seed, say
        names = [f"{name} ({Path(run).name})" for name, run in zip(names, runs, strict=True)]
    if len(set(names)) < len(names):
        raise ConfigError("certify: two of the runs are the same; name each once.")
    pairs = sorted(zip(names, made, strict=True), key=lambda pair: _natural(pair[0]))
    return dict(pairs)


def _natural(text: str) -> list:
    """A key by which numbers in texts are in ascending order.

    >>> sorted(["f = 10.0", "f = 9.5"], key=_natural)
    ['f = 9.5', 'f = 10.0']
    """
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [float(part) if i % 2 else part for i, part in enumerate(parts)]


def labels(experiments: Sequence[Experiment]) -> list[str]:
    """Settings that tell these runs apart: last words of the keys that differ, with values."""
    flat = [_flat(one.to_dict()) for one in experiments]
    keys = dict.fromkeys(key for one in flat for key in one)
    differing = [
        key
        for key in keys
        if not key.startswith(_OUTSIDE) and len({str(one.get(key)) for one in flat}) > 1
    ]
    return [
        ", ".join(f"{key.rpartition('.')[2]} = {one.get(key)}" for key in differing) or "run"
        for one in flat
    ]


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """A nested configuration by dotted keys.

    >>> _flat({"a": {"b": [1, {"c": 2}]}})
    {'a.b.0': 1, 'a.b.1.c': 2}
    """
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return {path: value}
    below = [_flat(one, f"{path}.{key}" if path else str(key)) for key, one in items]
    return {key: one for part in below for key, one in part.items()}


def to_frame(certificates: Mapping[str, Certificate]):
    """One row a run and radius: certified rate and accuracy, in [0, 1]."""
    radii = grid(list(certificates.values()))
    rows = [
        {"run": label, "radius": r, "certified_rate": rate, "certified_accuracy": accuracy}
        for label, one in certificates.items()
        for r, rate, accuracy in zip(*one.at(radii), strict=True)
    ]
    return require("pandas", "The table of a certificate").DataFrame(rows)


def table(certificates: Mapping[str, Certificate], points: int = 6):
    """The certificates: a column a run; facts, then rate / accuracy in percent at some radii."""
    radii = grid(list(certificates.values()), points, beyond=1.0)
    columns = {}
    for label, one in certificates.items():
        facts = {
            "examples": len(one.radius),
            "read correctly (%)": f"{100 * one.correct.mean():.1f}",
            "abstained": one.abstained,
            "largest radius": f"{one.largest:.4g}",
        }
        cells = zip(*one.at(radii), strict=True)
        facts |= {
            f"r = {r:.3g}": f"{100 * rate:.1f} / {100 * right:.1f}" for r, rate, right in cells
        }
        columns[label] = facts
    frame = require("pandas", "The table of a certificate").DataFrame(columns)
    return frame.rename_axis("")


def said(certificates: Mapping[str, Certificate]) -> list[str]:
    """Remarks on certificates beside their numbers, in a sentence for those that share it."""
    sentences: dict[str, list[str]] = {}
    for label, one in certificates.items():
        sentences.setdefault(_said(one), []).append(label)
    return [f"{'; '.join(labels)}: {sentence}" for sentence, labels in sentences.items()]


def _said(one: Certificate) -> str:
    terms = one.terms
    text = (
        f"attacked in round {one.attacked} of {one.rounds} by {len(terms.steps)} of the "
        f"clients, L = {terms.lipschitz:.4g}"
    )
    if one.inputs is not None and one.inputs > terms.lipschitz:
        text += (
            f", which holds for short inputs only (for these training inputs {one.inputs:.4g}: "
            f"--lipschitz)"
        )
    left = sum(theorem.log_contraction(*later) for later in terms.later)
    if terms.later and left == 0:
        text += "; the rounds since contract by a factor of 1, to the last bit of float64"
    return f"{text}."


def write(certificates: Mapping[str, Certificate], folder: Path) -> list[Path]:
    """Writes `certificate.json`, `certificate.csv` and the figure (PNG, PDF) into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    content = [{"label": label} | one.to_dict() for label, one in certificates.items()]
    whole = content[0] if len(content) == 1 else {"certificates": content}
    files.write_atomically(folder / FILES[0], json.dumps(whole, indent=1) + "\n")
    frame = to_frame(certificates)
    files.write_atomically(folder / FILES[1], frame.to_csv(index=False, float_format="%.6g"))
    first = next(iter(certificates.values()))
    title = (
        f"{first.label}, {len(first.radius)} test examples, {first.copies} copies, "
        f"alpha = {first.alpha:g}, convention {first.convention}"
    )
    radii = grid(list(certificates.values()))
    curves = {
        f"{label} ({one.abstained} abstained)": one.at(radii) for label, one in certificates.items()
    }
    figure = plotting.certified_curves(curves, title, folder / "certificate")
    return [*(folder / name for name in FILES), *figure]

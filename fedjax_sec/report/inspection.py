"""Pictures of an experiment before it runs: the clients' examples and its backdoor."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sec.core import ConfigError
from fedjax_sec.runs.config import Experiment
from fedjax_sec.runs.prepare import bound_task, make_population, prepare
from fedjax_sec.runs.source import load_source


class Holdings(NamedTuple):
    """Examples of each class that everybody holds: `clients` [N, C], `root` [C] or None."""

    clients: np.ndarray
    malicious: np.ndarray
    root: np.ndarray | None


def class_table(experiment: Experiment) -> Holdings:
    """How many training examples of each class every client holds, and the server's own."""
    source = load_source(experiment)
    labels, classes = np.asarray(source.y_train), source.num_classes
    population, _ = make_population(experiment, source)
    count = lambda positions: np.bincount(labels[positions], minlength=classes)  # noqa: E731
    rows = zip(population.index, population.counts, strict=True)
    clients = np.stack([count(index[:held]) for index, held in rows])
    root = None if population.root is None else count(population.root)
    return Holdings(clients, population.malicious, root)


class Pictures(NamedTuple):
    """Test images as they are and as a backdoor changes them; pixels in [0, 1], [n, H, W, C].

    `stamped` are what success is measured on, with the attacker's labels `targets`. `parts` are
    what malicious clients make of the same images, by their numbers, where that differs.
    """

    clean: np.ndarray
    labels: np.ndarray
    stamped: np.ndarray
    targets: np.ndarray
    parts: dict[tuple[int, ...], np.ndarray]


def backdoor_pictures(experiment: Experiment, count: int = 4) -> Pictures:
    """The first `count` test images that the experiment's backdoor is measured on.

    Raises `ConfigError` where there is no backdoor or the data holds no images.
    """
    prepared = prepare(experiment)
    source, backdoor = prepared.source, experiment.backdoor
    if backdoor is None:
        names = [stage.registered_name for stage in experiment.attack.stages]
        raise ConfigError(f"attack: there is no backdoor to show; the attack is {names or None}.")
    if source.x_test.ndim != 4:
        raise ConfigError(f"data: {source.label} holds no images, so there is nothing to show.")
    task = bound_task(experiment, source, prepared.network, prepared.task, prepared.setting)
    x, y = task.inputs.decode(jnp.asarray(source.x_test)), jnp.asarray(source.y_test)
    state = backdoor.init(prepared.setting, task)
    stamped, targets, include = backdoor.probes(state, x, y, task)
    rows = np.flatnonzero(include)[:count]
    # A backdoor with probes of its own, such as a single sample, is shown beside the first images.
    origin = rows if len(include) == len(y) else np.arange(len(rows))
    clean, labels, stamped = x[origin], y[origin], np.asarray(stamped[rows])
    parts: dict[tuple[int, ...], np.ndarray] = {}
    for rank in range(experiment.threat.num_malicious):
        key, number = jax.random.key(experiment.seed), jnp.int32(rank)
        part = np.asarray(backdoor.poison(key, state, clean, labels, number, task)[0])
        alike = [ranks for ranks, known in parts.items() if np.array_equal(known, part)]
        parts[(*alike[0], rank) if alike else (rank,)] = parts.pop(alike[0]) if alike else part
    if len(parts) == 1 and np.array_equal(next(iter(parts.values())), stamped):
        parts = {}
    parts = dict(sorted(parts.items()))
    clean, labels, targets = (np.asarray(a) for a in (clean, labels, targets[rows]))
    return Pictures(clean, labels, stamped, targets, parts)

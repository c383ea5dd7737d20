"""From an experiment and its data to what a program computes with: problem, clients, replicas."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from fedjax_sec import core
from fedjax_sec.core import ConfigError, registry
from fedjax_sec.core.random import Stream, stream
from fedjax_sec.data import checked, take
from fedjax_sec.evaluation.influence import Probes
from fedjax_sec.evaluation.metrics import TestSet
from fedjax_sec.ops.client_axis import layout
from fedjax_sec.ops.layers import layer_sizes
from fedjax_sec.round import (
    Components,
    Pool,
    Population,
    Problem,
    Replica,
    RoundState,
    init_state,
    make_task,
    to_pixels,
)
from fedjax_sec.runs.config import Experiment
from fedjax_sec.runs.memory import check_stack, device_memory
from fedjax_sec.runs.tuning import Choice, candidates


@functools.lru_cache(maxsize=4)
def _load(dataset, data_dir, download, max_train, max_test):
    source = checked(dataset.load(data_dir, download), dataset.registered_name)
    return take(source, max_train, max_test)


def load_source(experiment: Experiment):
    """The data set of an experiment, read once in a process, normalised as the experiment says."""
    data = experiment.data
    # The component is the key, not its name: a data set that is registered again is read again.
    dataset = registry.datasets.build(data.name, "data.name")
    source = _load(dataset, data.data_dir, data.download, data.max_train, data.max_test)
    if data.mean is None:
        return source
    for name in ("mean", "std"):
        given, channels = getattr(data, name), len(getattr(source, name))
        if len(given) != channels:
            raise ConfigError(
                f"data.{name} must hold {channels} numbers, one for each channel of "
                f"{source.label}, got {list(given)}."
            )
    return source._replace(mean=data.mean, std=data.std)


def check_on_data(experiment: Experiment, source, population: Population) -> None:
    """`Experiment.check` with what only the data tells."""
    model = experiment.model.make(source.x_train.shape[1:], source.num_classes)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    dim = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    check_stack(experiment.clients_per_round, dim, device_memory())
    experiment.check(
        capacity=population.index.shape[1],
        example_shape=source.x_train.shape[1:],
        num_classes=source.num_classes,
        layers=tuple(layer_sizes(shapes)),
        num_parameters=dim,
        examples=len(source.y_train),
    )


def check_bases(experiment: Experiment, source, population: Population) -> None:
    """Raises where an attack on data would poison nothing, or nothing could be measured."""
    base = None if experiment.backdoor is None else experiment.backdoor.base
    if base is not None and base not in np.asarray(source.y_test):
        raise ConfigError(
            f"attack: {source.label} has no test example of base class {base}, so the backdoor's "
            f"success cannot be measured; choose a base that is among "
            f"{', '.join(map(str, np.unique(source.y_test)[:20]))}."
        )
    malicious = population.malicious
    if experiment.threat.redraw:  # it is every client's turn
        malicious = np.ones_like(malicious)
    index, counts = population.index[malicious], population.counts[malicious]
    held = np.asarray(source.y_train)[index[np.arange(index.shape[1]) < counts[:, None]]]
    for stage in experiment.attack.data_stages:
        if stage.base is not None and stage.base not in held:
            raise ConfigError(
                f"attack: no malicious client holds an example of base class {stage.base}, so "
                f"{stage.registered_name!r} would do nothing; choose another base, or change the "
                f"seed, data.partition or threat.num_malicious."
            )
    poisons = _poisons(experiment, source, population._replace(malicious=malicious))
    for stage, something in zip(experiment.attack.data_stages, poisons, strict=True):
        if not something:
            raise ConfigError(
                f"attack: {stage.registered_name!r} would poison nothing: no example of a "
                f"malicious client falls into its share, and none of them has more than "
                f"{counts.max()}; raise its fraction, or give clients more data."
            )


def _poisons(experiment: Experiment, source, population: Population) -> list[bool]:
    """Whether each attack on data ever poisons an example, by its own choice of them."""
    if not experiment.attack.data_stages:
        return []
    key = stream(jax.random.key(experiment.seed), Stream.POISON)
    clients = np.flatnonzero(population.malicious)
    labels = jnp.asarray(np.asarray(source.y_train)[population.index[clients]])
    held = np.arange(labels.shape[1]) < population.counts[clients][:, None]

    def choose(attack):
        keys = jax.vmap(lambda client: jax.random.fold_in(key, client))(clients)
        masks = jax.vmap(attack.choose)(keys, labels, held)
        return np.array([bool(mask.any()) for mask in masks])

    return list(np.any([choose(one) for one in core.every_value(experiment.attack)], axis=0))


@functools.lru_cache(maxsize=16)
def _seen_pixels(model, input_shape, num_classes) -> np.ndarray:
    """Which pixels [H, W] move a logit: strides and poolings may drop what is near an edge.

    By the gradient on random images at initial weights, where a pixel without a path has exactly 0.
    """
    # XLA's own convolutions compile fastest, and are run only once here.
    network = _computed_as(model, Choice("vmap", None, "xla")).make(input_shape, num_classes)

    @jax.jit
    def seen(key):
        variables = network.init(key)
        images = jax.random.uniform(jax.random.fold_in(key, 1), (8, *input_shape))
        mixture = jax.random.normal(jax.random.fold_in(key, 2), (num_classes,))
        slope = jax.grad(lambda x: jnp.sum(network.apply(variables, x) @ mixture))(images)
        return jnp.any(slope != 0, axis=(0, 3))

    return np.asarray(seen(jax.random.key(0)))


def trigger_pixels(experiment: Experiment, source) -> tuple[int, int] | None:
    """How many pixels the trigger changes that the network sees, and how many in all.

    None where there is no trigger of pixels, or the network has no convolutions.
    """
    backdoor, shape = core.resolve(experiment.backdoor, 0), source.x_train.shape[1:]
    if not hasattr(backdoor, "trigger") or not hasattr(experiment.model, "convolution"):
        return None
    images = jax.random.uniform(jax.random.key(0), (8, *shape))
    changed = np.asarray(jnp.any(backdoor.trigger(images) != images, axis=(0, 3)))
    seen = changed & _seen_pixels(experiment.model, shape, source.num_classes)
    return int(seen.sum()), int(changed.sum())


def check_trigger(experiment: Experiment, source) -> None:
    """Raises where the network sees nothing of the trigger: no model could learn the backdoor."""
    found = trigger_pixels(experiment, source)
    if found is not None and found[0] == 0:
        raise ConfigError(
            f"attack: {experiment.model.registered_name!r} sees none of the {found[1]} pixels of "
            f"{experiment.backdoor.registered_name!r}, since strides or poolings drop them, so the "
            f"backdoor could not be learned; {_away_from_edges(experiment.backdoor)}."
        )


def _away_from_edges(backdoor) -> str:
    if hasattr(backdoor, "place"):
        return "set attack.place (with size), or attack.pixels, further inside"
    return "take a larger attack.size, or 'trojan', which has a place"


def make_population(experiment: Experiment, source) -> tuple[Population, int]:
    """Partition and malicious clients by the experiment's seed, and the examples left unused."""
    data, threat, root = experiment.data, experiment.threat, None
    labels, users = np.asarray(source.y_train), source.users_train

    def random(purpose: Stream):
        return np.random.default_rng([experiment.seed, int(purpose)])

    left = np.arange(len(labels))
    if experiment.server.root is not None:
        root = experiment.server.root.draw(random(Stream.ROOT), labels)
        left, root = np.delete(left, root), root.astype(np.int32)
    users = None if users is None else users[left]
    rng = random(Stream.PARTITION)
    parts = data.partition.split(rng, labels[left], data.num_clients, users)
    index = np.where(parts.mask, left[parts.index], 0).astype(np.int32)
    malicious = np.arange(data.num_clients) < threat.num_malicious
    if threat.placement == "random":
        malicious = random(Stream.MALICIOUS).permutation(malicious)
    counts, local = parts.counts, None
    if (test := data.local_test) is not None:
        rng = random(Stream.LOCAL_TEST)
        if test.data == "held_out":
            index, counts, local = test.hold_out(rng, index, counts)
        else:
            natural = source.users_train is not None and _by_user(source, index, counts)
            owners = source.users_train[index[:, 0]] if natural else None
            local = test.of_test_part(
                rng, owners, source.users_test, len(source.y_test), data.num_clients
            )
    start = every = dropout = None
    if threat.start > 0 or threat.every > 1:
        start, every = np.int32(threat.start), np.int32(threat.every)
    if experiment.server.dropout:
        dropout = np.float32(experiment.server.dropout)
    population = Population(index, counts, malicious, root, local, start, every, dropout)
    return population, parts.unused


def malicious_clients(population: Population) -> list[int]:
    """The numbers of one replica's malicious clients."""
    return np.flatnonzero(population.malicious).tolist()


def _by_user(source, index, counts) -> bool:
    """Whether every client's examples are one user's."""
    users = source.users_train[index]
    mask = np.arange(index.shape[1]) < counts[:, None]
    return bool(np.all((users == users[:, :1]) | ~mask))


@functools.lru_cache(maxsize=16)
def initial_params(model, input_shape, num_classes):
    """Seeds' keys [R] -> initial parameters [R, D], compiled once in a process for each model."""
    init = model.make(input_shape, num_classes).init
    return jax.jit(jax.vmap(lambda key: ravel_pytree(init(stream(key, Stream.INIT)))[0]))


def _computed_as(model, choice: Choice):
    """The network with its convolutions computed as chosen."""
    if choice.convolution is None:
        return model
    return dataclasses.replace(model, convolution=choice.convolution)


def make_problem(experiment: Experiment, source, choice: Choice, per_round: int) -> Problem:
    chosen = _computed_as(experiment.model, choice)
    model = chosen.make(source.x_train.shape[1:], source.num_classes)
    return Problem(
        model=model,
        input_shape=source.x_train.shape[1:],
        num_classes=source.num_classes,
        pixel_scale=source.scale,
        mean=source.mean,
        std=source.std,
        num_clients=experiment.data.num_clients,
        clients_per_round=per_round,
        omniscient=experiment.threat.knowledge == "omniscient",
        layout=layout(choice.clients, choice.chunk, per_round, model.convolves),
        malicious_per_round=experiment.threat.per_round,
        redraw=experiment.threat.redraw,
    )


def simple_problem(experiment: Experiment, source) -> Problem:
    """The problem of an experiment, computed as the rule says: for what does no training."""
    by_rule = candidates("vmap", None, getattr(experiment.model, "convolution", None), 1)[0]
    return make_problem(experiment, source, by_rule, experiment.clients_per_round)


def num_parameters(problem: Problem) -> int:
    shapes = jax.eval_shape(problem.model.init, jax.random.key(0))
    return sum(int(leaf.size) for leaf in jax.tree.leaves(shapes))


def probe_positions(experiment: Experiment, source) -> np.ndarray | None:
    """The test images on which influence is measured: probes not truly of the target class."""
    options = experiment.evaluation.influence
    if options is None:
        return None
    backdoor = core.resolve(experiment.backdoor, 0)
    problem, pool = simple_problem(experiment, source), Pool(source.x_train, source.y_train)
    dim = num_parameters(problem)
    if options.top > dim:
        raise ConfigError(
            f"evaluation.influence.top must be <= {dim}, the model's parameters, got {options.top}."
        )

    def probes(pool, x, y):
        return backdoor.probes(to_pixels(x, source.scale), y, make_task(problem, pool))

    def counted(pool, x, y):
        _, target, include = probes(pool, x, y)
        return include & (y != target)

    # Two images tell whether the probes are the test images, or others without known labels.
    test = (source.x_test, source.y_test)
    pair = [jax.ShapeDtypeStruct((2, *a.shape[1:]), a.dtype) for a in test]
    if jax.eval_shape(probes, pool, *pair)[0].shape[0] != 2:
        raise ConfigError(
            f"evaluation.influence needs probes with true labels; those of attack "
            f"{backdoor.registered_name!r} are not the test images. Choose another backdoor, such "
            f"as 'trojan', or set evaluation.influence to null."
        )
    found = np.flatnonzero(np.asarray(jax.jit(counted)(pool, *test)))[: options.max_images]
    if not len(found):
        raise ConfigError(
            f"evaluation.influence has nothing to measure on: attack {backdoor.registered_name!r} "
            f"has no probe among the {len(source.y_test)} test images that is not truly of its "
            f"target class; choose another base or target."
        )
    return found


def state_before(experiment: Experiment, problem, task, components, params) -> RoundState:
    """One replica's state before round 0."""
    state, influence = (
        init_state(problem, task, components, params),
        experiment.evaluation.influence,
    )
    return state if influence is None else state._replace(measured=influence.init())


def components_of(experiment: Experiment) -> Components:
    e = experiment
    return Components(e.client, e.server.optimizer, e.attack, e.defense, e.trainer)


def poisoned_probes(task, replica: Replica, backdoor, test: TestSet, scale) -> Probes:
    """The probes of one replica, with the attacker's and the true labels."""
    x, y = to_pixels(test.x[replica.probes], scale), test.y[replica.probes]
    x, target, include = backdoor.probes(x, y, task)
    return Probes(x, target, y, include & (y != target) & (replica.probes >= 0))


def make_replicas(experiments: Sequence[Experiment], source) -> tuple[Replica, list[int]]:
    """The experiments stacked along a leading replica axis, and each one's unused examples."""
    populations, unused, probes = [], [], None
    if experiments[0].evaluation.influence is not None:
        found = [probe_positions(experiment, source) for experiment in experiments]
        most = max(len(positions) for positions in found)
        padded = [np.pad(p, (0, most - len(p)), constant_values=-1) for p in found]
        probes = jnp.asarray(np.stack(padded), jnp.int32)
    for experiment in experiments:
        population, left = make_population(experiment, source)
        check_on_data(experiment, source, population)
        populations.append(population)
        unused.append(left)
    if any(np.any(p.counts == 0) for p in populations):
        populations = [p._replace(empty=p.counts == 0) for p in populations]
    width = max(p.index.shape[1] for p in populations)
    populations = [
        p._replace(index=np.pad(p.index, ((0, 0), (0, width - p.index.shape[1]))))
        for p in populations
    ]
    if populations[0].local is not None:
        most = max(p.local.shape[1] for p in populations)
        populations = [
            p._replace(
                local=np.pad(p.local, ((0, 0), (0, most - p.local.shape[1])), constant_values=-1)
            )
            for p in populations
        ]
    components = [components_of(experiment) for experiment in experiments]
    stack = lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves])  # noqa: E731
    keys = jnp.stack([jax.random.key(e.seed) for e in experiments])
    return Replica(
        keys, jax.tree.map(stack, *components), jax.tree.map(stack, *populations), probes
    ), unused

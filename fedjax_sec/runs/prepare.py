"""Everything of a run that needs no device: loaded, partitioned and checked once."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sec import core
from fedjax_sec.core import Setting, check_components, registry
from fedjax_sec.core.random import Stream, stream
from fedjax_sec.core.types import BoundTask, Space, TestSet
from fedjax_sec.data import Source
from fedjax_sec.ops.backend import compiler_options
from fedjax_sec.ops.client_axis import layout
from fedjax_sec.round import Components, Pool, Population, Problem, Replica, make_task
from fedjax_sec.runs.checks import (
    check_bases,
    check_on_data,
    check_trigger,
    has_labels,
    setting_on_data,
    trigger_pixels,
)
from fedjax_sec.runs.config import Experiment
from fedjax_sec.runs.loading import frozen_of, load_start, load_surrogates
from fedjax_sec.runs.source import (
    Network,
    load_auxiliary,
    load_source,
    make_network,
    network_of,
    withheld,
)
from fedjax_sec.runs.tuning import Choice


class Unused(NamedTuple):
    """How many training examples belong to no client, and how many of them by the partition.

    `left_out` are those that the partition could have dealt; the others are withheld from everybody
    or the remainder of equal shares.
    """

    total: int
    left_out: int


class Prepared(NamedTuple):
    """An experiment with its data, its clients and its network, all checks passed.

    `task` is the component that says what is learned. `probes` holds, for each monitor, the test
    examples that it looks at, or None. `start` are the parameters [D] that are given, `surrogates`
    the models that attacks on inputs are made on. `pixels` are how many pixels of the trigger the
    network sees, and of how many. `auxiliary` maps (data set, class) to the examples that attacks
    bring along.
    """

    experiment: Experiment
    source: Source
    task: Any
    network: Network
    setting: Setting
    population: Population
    unused: Unused
    probes: tuple
    start: np.ndarray | None
    surrogates: dict
    pixels: tuple[int, int] | None
    auxiliary: dict

    @property
    def pool(self) -> Pool:
        """The arrays that lie on the device once, on the host."""
        frozen = frozen_of(self.network)
        return Pool(
            self.source.x_train, self.source.y_train, frozen, tuple(self.auxiliary.values())
        )

    @property
    def space(self) -> Space:
        """The space of the model's parameters."""
        return self.network.space

    @property
    def components(self) -> Components:
        """The components of the round."""
        e = self.experiment
        return Components(
            e.complete_algorithm,
            e.attack,
            e.defense,
            self.task,
            e.trainer,
            e.monitors,
            e.evaluation.backdoor,
        )


def prepare(experiment: Experiment) -> Prepared:
    """Loads the data, deals it to the clients, and runs every check, before anything compiles.

    Raises `ConfigError` for what would stop the experiment or make a part of it do nothing: on top
    of `Experiment.check`, that is missing data, a network or a pattern that does not fit the data,
    a batch size beyond the largest client's examples, a backdoor whose class nobody holds or of
    which the network sees nothing, a monitor that has nothing to look at, and a run that this one
    cannot start from.
    """
    source = load_source(experiment)
    task = experiment.task or registry.tasks.build(source.task)
    network = network_of(experiment, source)
    shapes = jax.eval_shape(network.model.init, jax.random.key(0))
    known = experiment.setting(inputs=source.input_kind, labelled=has_labels(task, source))
    check_components((experiment.data.partition,), "data.partition", known)  # it reads labels
    auxiliary = load_auxiliary(experiment, source)
    population, unused = make_population(experiment, source)
    capacity, dim = population.index.shape[1], network.space.dim
    setting = setting_on_data(experiment, source, task, shapes, dim, capacity, auxiliary)
    check_on_data(experiment, source, setting)
    bound = bound_task(experiment, source, network, task, setting)
    check_bases(experiment, source, population, task)
    pixels = trigger_pixels(experiment, source, bound, setting)
    check_trigger(experiment, pixels)
    return Prepared(
        experiment,
        source,
        task,
        network,
        setting,
        population,
        unused,
        _probes(experiment, source, bound, setting),
        load_start(experiment),
        load_surrogates(experiment),
        pixels,
        auxiliary,
    )


def bound_task(experiment, source: Source, network: Network, task, setting) -> BoundTask:
    """The task on the experiment's network, on the host's arrays."""
    how, auxiliary = layout("vmap", None, 1, False), load_auxiliary(experiment, source)
    problem = _problem(experiment, source, network, how, 1, setting, auxiliary)
    frozen, arrays = frozen_of(network), tuple(auxiliary.values())
    return make_task(problem, Pool(source.x_train, source.y_train, frozen, arrays), task)


def _probes(experiment: Experiment, source: Source, task: BoundTask, setting) -> tuple:
    """The positions of the test examples that each monitor looks at, or None."""
    backdoor = core.resolve(experiment.backdoor, 0)
    test, probes = TestSet(source.x_test, source.y_test), []
    for monitor in experiment.monitors:
        state = () if backdoor is None else backdoor.init(setting, task)
        probes.append(monitor.positions(task, test, backdoor, state))
    return tuple(probes)


def make_population(experiment: Experiment, source) -> tuple[Population, Unused]:
    """Partition and malicious clients by the experiment's seed, and the examples left unused."""
    data, threat, root = experiment.data, experiment.threat, None
    labels, users = np.asarray(source.y_train), source.users_train

    def random(purpose: Stream):
        return np.random.default_rng([experiment.seed, int(purpose)])

    unseen = withheld(experiment, source)
    left = np.delete(np.arange(len(labels)), unseen)
    if experiment.server.root is not None:
        root = experiment.server.root.draw(random(Stream.ROOT), labels[left])
        left, root = np.delete(left, root), left[root].astype(np.int32)
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
    return population, Unused(parts.unused + len(unseen), parts.left_out)


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
    """Seeds' keys [R] -> initial parameters [R, D], compiled once in a process for each model.

    One seed after another: on two cores XLA waits for ever in several batched QR decompositions,
    which draw orthogonal matrices (jaxlib 0.10.2).
    """
    network, space = make_network(model, input_shape, num_classes)
    # Level 3 takes several times as long and gives the same bits.
    draw = jax.jit(
        lambda key: space.split(network.init(stream(key, Stream.INIT)))[0],
        compiler_options=compiler_options(2),
    )
    return lambda keys: jnp.stack([draw(key) for key in keys])


def make_problem(prepared: Prepared, choice: Choice, per_round: int) -> Problem:
    """The static part of all replicas, local training computed as chosen."""
    experiment, source = prepared.experiment, prepared.source
    network = network_of(experiment, source, choice)
    how = layout(choice.clients, choice.chunk, per_round, network.model.convolves)
    setting, auxiliary = prepared.setting, prepared.auxiliary
    return _problem(experiment, source, network, how, per_round, setting, auxiliary)


def _problem(
    experiment, source: Source, network: Network, how, per_round, setting, auxiliary
) -> Problem:
    return Problem(
        model=network.model,
        space=network.space,
        inputs=source.inputs,
        num_classes=source.num_classes,
        num_clients=experiment.data.num_clients,
        clients_per_round=per_round,
        omniscient=experiment.threat.knowledge == "omniscient",
        layout=how,
        malicious_per_round=experiment.threat.per_round,
        redraw=experiment.threat.redraw,
        setting=setting,
        auxiliary=tuple(auxiliary),
    )


def make_replicas(prepared: Sequence[Prepared]) -> Replica:
    """The prepared experiments stacked along a leading replica axis."""
    populations = [one.population for one in prepared]
    if any(np.any(p.counts == 0) for p in populations):
        populations = [p._replace(empty=p.counts == 0) for p in populations]
    index = _padded([p.index for p in populations], 0)
    populations = [p._replace(index=i) for p, i in zip(populations, index, strict=True)]
    if populations[0].local is not None:
        local = _padded([p.local for p in populations], -1)
        populations = [p._replace(local=one) for p, one in zip(populations, local, strict=True)]
    probes = []
    for positions in zip(*(one.probes for one in prepared), strict=True):
        given = None if positions[0] is None else np.stack(_padded(positions, -1))
        probes.append(None if given is None else jnp.asarray(given, jnp.int32))
    stack = lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves])  # noqa: E731
    return Replica(
        jnp.stack([jax.random.key(one.experiment.seed) for one in prepared]),
        jax.tree.map(stack, *(one.components for one in prepared)),
        jax.tree.map(stack, *populations),
        tuple(probes),
    )


def _padded(arrays: Sequence[np.ndarray], fill: int) -> list[np.ndarray]:
    """The arrays padded at the end of their last axis to the longest one's length."""
    width = max(array.shape[-1] for array in arrays)
    return [
        np.pad(
            array,
            [(0, 0)] * (array.ndim - 1) + [(0, width - array.shape[-1])],
            constant_values=fill,
        )
        for array in arrays
    ]

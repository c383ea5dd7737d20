"""Runs experiments: scans rounds on the device between evaluations, checkpoints, writes results.

Runs of the same structure (seeds, values of numeric fields) are replicas of one compiled program;
a single run is one replica.
"""

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from fedjax_sec import config as config_lib
from fedjax_sec import registry, results, schema
from fedjax_sec.caching import keep_compiled_programs
from fedjax_sec.checkpoints import Checkpoints
from fedjax_sec.config import Experiment
from fedjax_sec.datasets import take
from fedjax_sec.evaluation.batches import in_batches
from fedjax_sec.evaluation.influence import Probes
from fedjax_sec.evaluation.local import by_client
from fedjax_sec.evaluation.metrics import TestSet, evaluate
from fedjax_sec.evaluation.robustness import labels, surrogates_of, withstood
from fedjax_sec.memory import USABLE, check_state, device_memory, replicas_that_fit, tree_bytes
from fedjax_sec.ops.client_axis import layout
from fedjax_sec.ops.layers import layer_sizes
from fedjax_sec.round import (
    Components,
    Pool,
    Population,
    Problem,
    Replica,
    RoundState,
    Stream,
    init_state,
    make_task,
    run_round,
    stream,
    to_pixels,
    train_clients,
)
from fedjax_sec.schema import ConfigError
from fedjax_sec.tuning import Choice, Tuning, candidates, tune

#: Local steps on which ways to train are compared; for convolutional networks on a CPU, clients
#: and images too.
TUNING_STEPS, TUNING_CLIENTS, TUNING_IMAGES = 2, 8, 4096
#: The file that says how an interrupted run computed local training.
EXECUTION = "execution.json"
#: The folder, in a run's own, with the newest state.
CHECKPOINTS = "checkpoints"


@functools.lru_cache(maxsize=4)
def _load(name, data_dir, download, max_train, max_test):
    source = registry.datasets.build(name, "data.name").load(data_dir, download)
    return take(source, max_train, max_test)


def load_source(experiment: Experiment):
    """The data set of an experiment, read once in a process, normalised as the experiment says."""
    data = experiment.data
    source = _load(data.name, data.data_dir, data.download, data.max_train, data.max_test)
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


def verify(experiment: Experiment) -> None:
    """Raises what would stop the experiment, before anything is written or compiled.

    On top of `Experiment.check`, that is missing data, a network or a pattern that does not fit
    the data, a batch size beyond the largest client's examples, a backdoor whose class nobody
    holds, and an influence that cannot be measured.
    """
    source = load_source(experiment)
    experiment.model.make(source.x_train.shape[1:], source.num_classes)
    population, _ = make_population(experiment, source)
    check_on_data(experiment, source, population)
    _check_bases(experiment, source, population)
    _probe_positions(experiment, source)
    load_surrogates(experiment)
    images = experiment.evaluation.evasion_images
    if images is not None and images > len(source.y_test):
        raise ConfigError(
            f"evaluation.evasion_images must be <= {len(source.y_test)}, the test examples of "
            f"{source.label}, got {images}."
        )


def check_on_data(experiment: Experiment, source, population: Population) -> None:
    """`Experiment.check` with what only the data tells."""
    model = experiment.model.make(source.x_train.shape[1:], source.num_classes)
    experiment.check(
        capacity=population.index.shape[1],
        example_shape=source.x_train.shape[1:],
        num_classes=source.num_classes,
        layers=tuple(layer_sizes(jax.eval_shape(model.init, jax.random.key(0)))),
    )


def _check_bases(experiment: Experiment, source, population: Population) -> None:
    """Raises where an attack on one class could poison nothing, or nothing be measured."""
    base = None if experiment.backdoor is None else experiment.backdoor.base
    if base is not None and base not in np.asarray(source.y_test):
        raise ConfigError(
            f"attack: {source.label} has no test example of base class {base}, so the backdoor's "
            f"success cannot be measured."
        )
    malicious = population.malicious
    index, counts = population.index[malicious], population.counts[malicious]
    held = np.asarray(source.y_train)[index[np.arange(index.shape[1]) < counts[:, None]]]
    for stage in experiment.attack.data_stages:
        if stage.base is not None and stage.base not in held:
            raise ConfigError(
                f"attack: no malicious client holds an example of base class {stage.base}, so "
                f"{stage.registered_name!r} would do nothing; change the seed, data.partition or "
                f"threat.num_malicious."
            )


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
    return Population(index, counts, malicious, root, local), parts.unused


def _by_user(source, index, counts) -> bool:
    """Whether every client's examples are one user's."""
    users = source.users_train[index]
    mask = np.arange(index.shape[1]) < counts[:, None]
    return bool(np.all((users == users[:, :1]) | ~mask))


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


@functools.lru_cache(maxsize=16)
def _initial_params(model, input_shape, num_classes):
    """Seeds' keys [R] -> initial parameters [R, D], compiled once in a process for each model."""
    init = model.make(input_shape, num_classes).init
    return jax.jit(jax.vmap(lambda key: ravel_pytree(init(stream(key, Stream.INIT)))[0]))


def _make_problem(experiment: Experiment, source, choice: Choice, per_round: int) -> Problem:
    chosen = experiment.model
    if choice.convolution is not None:
        chosen = dataclasses.replace(chosen, convolution=choice.convolution)
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
    )


def _simple_problem(experiment: Experiment, source) -> Problem:
    """The problem of an experiment, computed as the rule says: for what does no training."""
    by_rule = candidates("vmap", None, getattr(experiment.model, "convolution", None), 1)[0]
    return _make_problem(experiment, source, by_rule, experiment.clients_per_round)


def _probe_positions(experiment: Experiment, source) -> np.ndarray | None:
    """The test images on which influence is measured: probes not truly of the target class."""
    options = experiment.evaluation.influence
    if options is None:
        return None
    backdoor = schema.resolve(experiment.backdoor, 0)
    problem, pool = _simple_problem(experiment, source), Pool(source.x_train, source.y_train)
    dim = _num_parameters(problem)
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
            f"{backdoor.registered_name!r} are not the test images."
        )
    found = np.flatnonzero(np.asarray(jax.jit(counted)(pool, *test)))[: options.max_images]
    if not len(found):
        raise ConfigError(
            f"evaluation.influence has nothing to measure on: attack {backdoor.registered_name!r} "
            f"has no probe among the {len(source.y_test)} test images that is not truly of its "
            f"target class."
        )
    return found


def _state_before(experiment: Experiment, problem, task, components, params) -> RoundState:
    """One replica's state before round 0."""
    state, influence = (
        init_state(problem, task, components, params),
        experiment.evaluation.influence,
    )
    return state if influence is None else state._replace(measured=influence.init())


def _components(experiment: Experiment) -> Components:
    e = experiment
    return Components(e.client, e.server.optimizer, e.attack, e.defense, e.trainer)


def _poisoned(task, replica: Replica, backdoor, test: TestSet, scale) -> Probes:
    """The probes of one replica, with the attacker's and the true labels."""
    x, y = to_pixels(test.x[replica.probes], scale), test.y[replica.probes]
    x, target, include = backdoor.probes(x, y, task)
    return Probes(x, target, y, include & (y != target) & (replica.probes >= 0))


def make_replicas(experiments: Sequence[Experiment], source) -> tuple[Replica, list[int]]:
    """The experiments stacked along a leading replica axis, and each one's unused examples."""
    populations, unused, probes = [], [], None
    if experiments[0].evaluation.influence is not None:
        found = [_probe_positions(experiment, source) for experiment in experiments]
        most = max(len(positions) for positions in found)
        padded = [np.pad(p, (0, most - len(p)), constant_values=-1) for p in found]
        probes = jnp.asarray(np.stack(padded), jnp.int32)
    for experiment in experiments:
        population, left = make_population(experiment, source)
        check_on_data(experiment, source, population)
        populations.append(population)
        unused.append(left)
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
    components = [_components(experiment) for experiment in experiments]
    stack = lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves])  # noqa: E731
    keys = jnp.stack([jax.random.key(e.seed) for e in experiments])
    return Replica(
        keys, jax.tree.map(stack, *components), jax.tree.map(stack, *populations), probes
    ), unused


def tuned(experiment: Experiment) -> Tuning:
    """How local training is computed: measured on a few steps of some clients, or remembered.

    On a CPU, which convolutional networks keep busy for long, on no more than `TUNING_CLIENTS` of
    them and about `TUNING_IMAGES` images; other networks are quick, and measured with all clients.
    """
    source = load_source(experiment)
    execution, per_round = experiment.execution, experiment.clients_per_round
    convolution = getattr(experiment.model, "convolution", None)
    lowerings = ()
    if convolution is not None:
        lowerings = [c for c in schema.choices(experiment.model, "convolution") if c != "auto"]
    found = candidates(execution.clients, execution.chunk, convolution, per_round, lowerings)
    if jax.default_backend() == "cpu" and convolution is not None:
        images = TUNING_STEPS * getattr(experiment.client, "batch_size", 1)
        per_round = min(per_round, TUNING_CLIENTS, max(2, TUNING_IMAGES // images))
    short = dataclasses.replace(experiment, client=experiment.client.shortened(TUNING_STEPS))
    shape = {
        "model": schema.dump(experiment.model),
        "input": source.x_train.shape[1:],
        "clients": per_round,
        "client": str(jax.tree.structure(short.client)),
        "poison": str(jax.tree.structure(experiment.attack.data_stages)),
    }

    @functools.cache
    def inputs():
        replica = jax.tree.map(lambda leaf: leaf[0], make_replicas([short], source)[0])
        return replica, jax.device_put(Pool(source.x_train, source.y_train))

    def measure(choice):
        replica, pool = inputs()
        problem = _make_problem(experiment, source, choice, per_round)
        task = make_task(problem, pool)

        def train(params, replica, pool):
            client = schema.resolve(replica.components.client, 0)
            states = jax.vmap(lambda _: client.init(task.dim))(jnp.arange(per_round))
            states = states if client.keeps_state else ()
            return train_clients(
                problem, make_task(problem, pool), pool, replica, params, states,
                jnp.arange(per_round), jnp.int32(0),
            )  # fmt: skip

        args = jnp.zeros(task.dim), replica, pool
        function = jax.jit(train).lower(*args).compile()
        memory, limit = function.memory_analysis(), device_memory()
        if memory and limit and memory.temp_size_in_bytes > USABLE * limit:
            return None
        return lambda: jax.block_until_ready(function(*args))

    return tune(found, shape, measure)


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
    verify(experiment)
    source, backdoor = load_source(experiment), experiment.backdoor
    if backdoor is None:
        names = [stage.registered_name for stage in experiment.attack.stages]
        raise ConfigError(f"attack: there is no backdoor to show; the attack is {names or None}.")
    if source.x_test.ndim != 4:
        raise ConfigError(f"data: {source.label} holds no images, so there is nothing to show.")
    problem = _make_problem(experiment, source, Choice("map"), experiment.clients_per_round)
    task = make_task(problem, Pool(jnp.asarray(source.x_train), jnp.asarray(source.y_train)))
    x, y = to_pixels(jnp.asarray(source.x_test), source.scale), jnp.asarray(source.y_test)
    stamped, targets, include = backdoor.probes(x, y, task)
    rows = np.flatnonzero(include)[:count]
    # A backdoor with probes of its own, such as a single sample, is shown beside the first images.
    origin = rows if len(include) == len(y) else np.arange(len(rows))
    clean, labels, stamped = x[origin], y[origin], np.asarray(stamped[rows])
    parts: dict[tuple[int, ...], np.ndarray] = {}
    for rank in range(experiment.threat.num_malicious):
        key, own = jax.random.key(experiment.seed), jnp.int32(rank)
        part = np.asarray(backdoor.poison(key, clean, labels, jnp.asarray(origin), own, task)[0])
        alike = [ranks for ranks, known in parts.items() if np.array_equal(known, part)]
        parts[(*alike[0], rank) if alike else (rank,)] = parts.pop(alike[0]) if alike else part
    if len(parts) == 1 and np.array_equal(next(iter(parts.values())), stamped):
        parts = {}
    parts = dict(sorted(parts.items()))
    clean, labels, targets = (np.asarray(a) for a in (clean, labels, targets[rows]))
    return Pictures(clean, labels, stamped, targets, parts)


class Program:
    """The compiled functions for all experiments of one structure.

    `traces` counts how often the round was traced: once for each length of scan. `compiled` maps
    each function to the seconds of its compilation and the bytes it needs.
    """

    def __init__(
        self, experiment: Experiment, at_once: int | None = None, tuning: Tuning | None = None
    ):
        keep_compiled_programs()
        source = load_source(experiment)
        self.experiment, self.source, self.at_once = experiment, source, at_once
        self.pool = jax.device_put(Pool(source.x_train, source.y_train))
        self.test = jax.device_put(TestSet(source.x_test, source.y_test))
        self.tuning = tuning or tuned(experiment)
        self.problem = _make_problem(
            experiment, source, self.tuning.choice, experiment.clients_per_round
        )
        # What rounds themselves need of the test set: nothing, unless influence is measured.
        self.watched = self.test if experiment.evaluation.influence is not None else None
        self.surrogates = load_surrogates(experiment)
        self.everywhere = self.problem.layout.everywhere()
        self.traces = 0
        self.compiled: dict[str, dict] = {}
        self._functions: dict = {}

    def replicas(self, experiments: Sequence[Experiment]) -> tuple[Replica, list[int]]:
        """The experiments stacked along a leading replica axis, and each one's unused examples."""
        return make_replicas(experiments, self.source)

    def _over_replicas(self, fn: Callable, *stacked):
        size = jax.tree.leaves(stacked)[0].shape[0]
        at_once = min(self.at_once or size, size)
        if size == 1:  # no batch axis at all: XLA's CPU code for one of size 1 is far slower
            out = fn(*jax.tree.map(lambda leaf: leaf[0], stacked))
            return jax.tree.map(lambda leaf: leaf[None], out)
        if at_once == size:
            return jax.vmap(fn)(*stacked)
        return jax.lax.map(
            lambda args: fn(*args), stacked, batch_size=None if at_once == 1 else at_once
        )

    def _compile(self, name, function, *args, donate=()):
        """The function compiled for arguments of these shapes, timing the compilation."""
        leaves, structure = jax.tree.flatten(args)
        key = (name, structure, tuple((leaf.shape, leaf.dtype.name) for leaf in leaves))
        if key not in self._functions:
            start = time.perf_counter()
            shardings = {"in_shardings": self.everywhere, "out_shardings": self.everywhere}
            jitted = jax.jit(
                function, donate_argnums=donate, **(shardings if self.everywhere else {})
            )
            self._functions[key] = jitted.lower(*args).compile()
            self._record(name, time.perf_counter() - start, self._functions[key])
        return self._functions[key]

    def _record(self, name, seconds, function=None):
        entry = self.compiled.setdefault(name, {"seconds": 0.0})
        entry["seconds"] += seconds
        memory = function.memory_analysis() if function is not None else None
        if memory is not None:  # not every backend knows
            entry["temporary_bytes"] = memory.temp_size_in_bytes
            entry["argument_bytes"] = memory.argument_size_in_bytes

    @property
    def compile_seconds(self) -> float:
        """Seconds spent on tracing and compiling so far, or on reading from the cache."""
        return sum(entry["seconds"] for entry in self.compiled.values())

    def prepare(self, experiments: Sequence[Experiment]) -> "Program":
        """Compiles everything that a run of these experiments needs, without running it."""
        replicas, _ = self.replicas(experiments)
        state = jax.eval_shape(self.init, replicas)
        first = experiments[0]
        self._evaluator(state, replicas)
        for rounds in {min(first.evaluation.every, first.rounds), _last_stretch(first)}:
            self._advancer(state, replicas, rounds)
        return self

    def init(self, replicas: Replica) -> RoundState:
        """The state of every replica before round 0."""

        experiment = self.experiment
        start = time.perf_counter()
        params = _initial_params(
            experiment.model, self.problem.input_shape, self.problem.num_classes
        )(replicas.key)
        self._record("init", time.perf_counter() - start)
        task = make_task(self.problem, self.pool)
        begin = jax.vmap(
            lambda r, p: _state_before(experiment, self.problem, task, r.components, p)
        )
        shapes = jax.eval_shape(begin, replicas, params)._asdict()
        check_state({part: tree_bytes(tree) for part, tree in shapes.items()}, device_memory())
        return begin(replicas, params)

    def advance(self, state: RoundState, replicas: Replica, start: int, rounds: int):
        """`rounds` more rounds from number `start` for every replica; `state` is donated.

        Returns the new state and metrics: of the last of these rounds, but `train_loss` averaged
        and `excluded` summed over all of them.
        """
        function = self._advancer(state, replicas, rounds)
        args = (state, replicas, self.pool, _round_number(start), self.watched)
        return function(*self._placed(*args))

    def _advancer(self, state, replicas, rounds: int):
        self._plan(state, replicas)
        args = (state, replicas, self.pool, _round_number(0), self.watched)
        function = self._compile(f"advance {rounds}", self._advance(rounds), *args, donate=(0,))
        replicas_that_fit(1, *self._needs(function, state, replicas), device_memory())
        return function

    def _advance(self, rounds: int):
        diagnostics = self.experiment.evaluation.diagnostics
        influence = self.experiment.evaluation.influence
        given = self.experiment.evaluation.backdoor

        def advance(state, replicas, pool, start, watched):
            task = make_task(self.problem, pool)

            def one(state, replica):
                measure = None
                if influence is not None:
                    scale = self.problem.pixel_scale
                    backdoor = given or replica.components.attack.backdoor
                    probes = _poisoned(
                        task, replica, schema.resolve(backdoor, start), watched, scale
                    )
                    measure = functools.partial(influence.measure, task, probes)

                def step(state, index):
                    self.traces += 1
                    last = index == start + rounds - 1 if diagnostics else None
                    return run_round(self.problem, task, pool, replica, state, index, last, measure)

                state, history = jax.lax.scan(step, state, start + jnp.arange(rounds))
                summary = jax.tree.map(lambda m: m[-1], history)
                summary["train_loss"] = jnp.nanmean(history["train_loss"])
                summary["excluded"] = history["excluded"].sum()
                return state, summary

            return self._over_replicas(one, state, replicas)

        return advance

    def _plan(self, state, replicas) -> None:
        """Settles, once, how many replicas run side by side, by what a single one needs.

        On a CPU, whose cores one replica fills, that is one. Elsewhere the round is compiled for
        one replica first, and XLA's own account of its memory decides.
        """
        size = jax.tree.leaves(replicas)[0].shape[0]
        if self.at_once is not None:
            return
        if jax.default_backend() == "cpu":
            self.at_once = 1
        elif size > 1:
            first = lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype)  # noqa: E731
            one = jax.tree.map(first, (state, replicas))
            traces = self.traces
            args = (*one, self.pool, _round_number(0), self.watched)
            function = self._compile("plan", self._advance(1), *args)
            self.traces = traces  # the round itself is still to be traced
            needs = self._needs(function, state, replicas)
            self.at_once = replicas_that_fit(size, *needs, device_memory())

    def _needs(self, function, state, replicas) -> tuple[int, int]:
        """Bytes that a compiled function works with, and bytes that lie in memory all the time."""
        memory = function.memory_analysis()  # None where the backend does not know
        working = memory.temp_size_in_bytes + memory.output_size_in_bytes if memory else 1
        return working, tree_bytes((self.pool, self.test, state, replicas))

    def evaluate(self, state: RoundState, replicas: Replica, done: int = 0):
        """Test metrics of every replica's global model after `done` rounds.

        Where a backdoor's fields follow schedules, it is measured as in the last of these rounds.
        """
        function = self._evaluator(state, replicas)
        last = _round_number(max(done - 1, 0))
        return function(*self._placed(*self._watching(state, replicas, last)))

    def _watching(self, state, replicas, last):
        others = {label: params for label, (_, params) in self.surrogates.items()}
        return state.params, replicas, self.pool, self.test, last, others

    def _placed(self, *args):
        """The arguments on all devices that share the work; untouched where there is one."""
        return jax.device_put(args, self.everywhere) if self.everywhere else args

    def _evaluator(self, state, replicas):
        self._plan(state, replicas)
        options = self.experiment.evaluation

        def measure(params, replicas, pool, test, last, others):
            task, scale = make_task(self.problem, pool), self.problem.pixel_scale

            def one(params, replica):
                backdoor = options.backdoor or replica.components.attack.backdoor
                found = evaluate(
                    params, test, task, scale, schema.resolve(backdoor, last),
                    options.batch_size, options.exclude_target,
                )  # fmt: skip
                withstand = functools.partial(self._withstand, task, params, replica, last, others)
                x, y = (part[: options.evasion_images] for part in test)
                for name, held in withstand(to_pixels(x, scale), y).items():
                    found[name] = held.mean()
                if (positions := replica.population.local) is not None:
                    held_out = self.experiment.data.local_test.data == "held_out"
                    own = pool if held_out else test
                    rows = jnp.maximum(positions, 0).reshape(-1)
                    x, y = to_pixels(own.x[rows], scale), own.y[rows]
                    read = in_batches(
                        lambda x: jnp.argmax(task.logits(params, x), axis=1), options.batch_size, x
                    )
                    found |= by_client({"accuracy": read == y} | withstand(x, y), positions)
                return found

            return self._over_replicas(one, params, replicas)

        return self._compile(
            "evaluate", measure, *self._watching(state, replicas, _round_number(0))
        )

    def _withstand(self, task, params, replica, last, others, x, y) -> dict:
        """`robust_accuracy/NAME` -> whether each example withstands that attack on inputs."""
        options, found = self.experiment.evaluation, {}
        key, logits = stream(replica.key, Stream.EVASION), functools.partial(task.logits, params)
        for label, attack in zip(labels(options.evasions), options.evasions, strict=True):
            surrogate = None
            if label in others:
                surrogate = functools.partial(self.surrogates[label][0], others[label])
            found[f"robust_accuracy/{label}"] = withstood(
                schema.resolve(attack, last), key, logits, x, y, options.batch_size, surrogate
            )
        return found

    def unravel(self, params) -> Any:
        """Flat parameters [D] as the model's own tree."""
        return make_task(self.problem, self.pool).unravel(params)


def _round_number(value: int):
    """On the device by an explicit transfer, which a transfer guard lets pass."""
    return jax.device_put(np.int32(value))


def _last_stretch(experiment: Experiment) -> int:
    """Rounds between the last two evaluations."""
    return experiment.rounds % experiment.evaluation.every or min(
        experiment.evaluation.every, experiment.rounds
    )


class Result(NamedTuple):
    """A finished run.

    `metrics[name]` holds one entry an evaluation, `metrics["round"]` the number of rounds done by
    then, 0 first; what is measured in training is NaN there. `params` are the final parameters as
    the model's tree, None when the run was finished before and only read back (`final_params` reads
    them); `summary` is what `summary.json` holds.
    """

    experiment: Experiment
    metrics: dict[str, np.ndarray]
    summary: dict
    params: Any


def read_result(experiment: Experiment, folder: results.RunFolder) -> Result:
    """A finished run read back from its folder."""
    return Result(experiment, stack_rows(folder.rows()), folder.summary(), None)


def final_params(folder: str | Path) -> Any:
    """The final parameters of a finished run, as the model's tree, from its folder.

    From `params.npy` where `checkpoint.keep_params` has kept it, else from the last checkpoint,
    which a run of its own has; a sweep's cells have none. Reads the data set for its shapes.

    Raises: `ConfigError` for a folder without a finished run, or that keeps no parameters.
    """
    folder = results.RunFolder(folder)
    if not folder.finished:
        raise ConfigError(f"Folder {str(folder.path)!r} holds no finished run.")
    experiment = config_lib.load(folder.path / results.CONFIG)
    source = load_source(experiment)
    problem = _simple_problem(experiment, source)
    task = make_task(problem, Pool(source.x_train, source.y_train))
    flat, checkpoints = folder.params(), folder.path / CHECKPOINTS
    if flat is None and checkpoints.is_dir():
        one = jax.eval_shape(
            lambda params: _state_before(
                experiment, problem, task, _components(experiment), params
            ),
            jax.ShapeDtypeStruct((task.dim,), jnp.float32),
        )
        state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), one)
        state, done, _ = Checkpoints(checkpoints).restore(state)
        flat = state.params[0] if done == experiment.rounds else None
    if flat is None:
        raise ConfigError(
            f"Folder {str(folder.path)!r} keeps no parameters; cells of a sweep do so with "
            f"checkpoint.keep_params: true."
        )
    return task.unravel(jnp.asarray(flat))


def logits_of(experiment: Experiment) -> Callable:
    """The experiment's network: (parameters as the model's tree, images in [0, 1]) -> logits.

    Normalises as in training; without dropout. With `Result.params` or `final_params`.
    """
    source = load_source(experiment)
    problem = _simple_problem(experiment, source)
    task = make_task(problem, Pool(source.x_train, source.y_train))
    return lambda params, x: task.logits(ravel_pytree(params)[0], x)


def load_surrogates(experiment: Experiment) -> dict[str, tuple[Callable, Any]]:
    """label -> (logits, parameters) of the models on which `evaluation.evasions` are made.

    Raises `ConfigError` for a folder without a finished run, or whose data has another shape.
    """
    at, found = "evaluation.evasions", {}
    for label, folder in surrogates_of(experiment.evaluation.evasions, at).items():
        path = Path(folder) / results.CONFIG
        if not path.is_file():
            raise ConfigError(f"{at}.surrogate: {folder!r} holds no finished run.")
        other = config_lib.load(path)
        shapes = [load_source(one).x_test.shape[1:] for one in (experiment, other)]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f"{at}.surrogate: {folder!r} takes inputs of shape {shapes[1]}, this experiment's "
                f"are {shapes[0]}."
            )
        found[label] = logits_of(other), final_params(folder)
    return found


def stack_rows(rows: Sequence[Mapping]) -> dict[str, np.ndarray]:
    """Metric rows as one array a metric, NaN where a row holds null or nothing.

    >>> stack_rows([{"round": 0}, {"round": 5, "train_loss": 0.5}])["train_loss"].tolist()
    [nan, 0.5]
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    found = {}
    for name in names:
        values = [np.asarray(row[name], dtype=float) for row in rows if name in row]
        nothing = np.full(values[0].shape, np.nan)
        given = iter(values)
        found[name] = np.stack([next(given) if name in row else nothing for row in rows])
    return found


def settle(experiment: Experiment, checkpoint_dir: str | Path | None) -> Tuning:
    """How to compute local training: as an interrupted run with this state did, else measured.

    It changes results by rounding, so it is written down beside the state: what resumes does not
    measure again.
    """
    path = None if checkpoint_dir is None else Path(checkpoint_dir).parent / EXECUTION
    if path is not None and path.exists():
        return Tuning.from_dict(json.loads(path.read_text()))
    tuning = tuned(experiment)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        results.write_atomically(path, json.dumps(tuning.to_dict(), indent=2) + "\n")
    return tuning


def train(
    experiments: Sequence[Experiment],
    folders: Sequence[results.RunFolder] | None = None,
    *,
    checkpoint_dir: str | Path | None = None,
    at_once: int | None = None,
    on_evaluation: Callable[[int, list[dict]], None] | None = None,
    program: Program | None = None,
    profile: str | Path | None = None,
) -> list[Result]:
    """Runs experiments of one structure as replicas of one program.

    Args:
      experiments: equal in `Experiment.structure()`.
      folders: where each one's metrics and summary go; already claimed with `RunFolder.open`.
      checkpoint_dir: where the common state is saved, and from which it is taken up if there.
      at_once: replicas vmapped at a time; the others follow one after another in the same
        program. None: as many as fit the memory of an accelerator; on a CPU, whose cores one
        replica fills, 1.
      on_evaluation: called with the rounds done and the rows just measured.
      program: compiled functions to use again.
      profile: folder for a JAX profiler trace of the rounds between two evaluations: the second
        time, when everything is warm, or the only time.
    """
    if len({e.structure() for e in experiments}) != 1:
        raise ConfigError("These experiments differ in structure and cannot share a program.")
    if program is None:
        program = Program(experiments[0], at_once, settle(experiments[0], checkpoint_dir))
    replicas, unused = program.replicas(experiments)
    first = experiments[0]
    begin = time.perf_counter()

    checkpoints = Checkpoints(checkpoint_dir) if checkpoint_dir else None
    state, done, elapsed = program.init(replicas), 0, 0.0
    if checkpoints:
        state, done, elapsed = checkpoints.restore(state)
    if folders:
        for folder in folders:
            folder.truncate(done or -1)  # round 0 is measured again
    rows_of = [folder.rows() if folders and done else [] for folder in folders or experiments]

    def record(done, metrics):
        host = jax.device_get(metrics)
        new = [
            results.to_json({"round": done} | {name: values[i] for name, values in host.items()})
            for i in range(len(experiments))
        ]
        for i, row in enumerate(new):
            rows_of[i].append(row)
            if folders:
                folders[i].append(row)
        if on_evaluation:
            on_evaluation(done, new)

    if done == 0:
        record(0, program.evaluate(state, replicas))
    evaluations, training_seconds = 0, 0.0
    rounds_here = first.rounds - done
    stretches = -(-rounds_here // first.evaluation.every)
    while done < first.rounds:
        rounds = min(first.evaluation.every, first.rounds - done)
        traced = profile is not None and evaluations == min(1, stretches - 1)
        tick, compiled = time.perf_counter(), program.compile_seconds
        with jax.profiler.trace(str(profile)) if traced else contextlib.nullcontext():
            state, training = program.advance(state, replicas, done, rounds)
            jax.block_until_ready(state)
        training_seconds += time.perf_counter() - tick - (program.compile_seconds - compiled)
        done += rounds
        record(done, program.evaluate(state, replicas, done) | training)
        evaluations += 1
        if checkpoints and (evaluations % first.checkpoint.every == 0 or done == first.rounds):
            checkpoints.save(done, state, elapsed + time.perf_counter() - begin)

    wall = elapsed + time.perf_counter() - begin
    timing = {
        "wall_seconds": wall,
        "compile_seconds": program.compile_seconds,
        "compiled": program.compiled,
        "rounds_per_second": (
            rounds_here * len(experiments) / training_seconds if training_seconds else None
        ),
        "replicas": len(experiments),
        "replicas_at_once": min(program.at_once or len(experiments), len(experiments)),
        "layout": program.problem.layout._asdict(),
        "tuning": program.tuning.to_dict(),
        "traces": program.traces,
    }
    found = []
    for i, experiment in enumerate(experiments):
        metrics = stack_rows(rows_of[i])
        summary = _summarize(experiment, program, metrics, unused[i], timing)
        if folders:
            if first.checkpoint.keep_params:
                folders[i].write_params(state.params[i])
            folders[i].write_summary(summary)
        found.append(Result(experiment, metrics, summary, program.unravel(state.params[i])))
    return found


def _summarize(experiment, program, metrics, unused, timing) -> dict:
    counts = program.source.describe()
    best = int(np.nanargmax(metrics["accuracy"]))

    def scalars(at: int) -> dict:
        return {name: float(values[at]) for name, values in metrics.items() if values.ndim == 1}

    final = scalars(-1)
    summary = {
        "data": {**counts, "unused_train": int(unused), "clients": experiment.data.num_clients},
        "parameters": _num_parameters(program.problem),
        "final": final,
        "best": scalars(best),
        "excluded_updates": int(np.nansum(metrics["excluded"])),
        **timing,
        **results.environment(),
    }
    warnings = _warnings(experiment, metrics, final, counts)
    return summary | ({"warnings": warnings} if warnings else {})


def _num_parameters(problem: Problem) -> int:
    shapes = jax.eval_shape(problem.model.init, jax.random.key(0))
    return sum(int(leaf.size) for leaf in jax.tree.leaves(shapes))


def _warnings(experiment, metrics, final, counts) -> list[str]:
    """What a reader must know before trusting the numbers."""
    found = []
    if counts["subset"]:
        found.append(f"data: {counts['label']}, not the whole data set")
    if not np.isfinite(final["loss"]):
        found.append("the global model's loss is not finite at the end")
    shift = metrics.get("attack_shift")
    if shift is not None and not np.nanmax(shift, initial=0.0) > 0:
        found.append("the attack changed no update in any round")
    return found


def run(
    config: str | Path | Mapping | Experiment,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_evaluation: Callable[[int, list[dict]], None] | None = None,
    profile: str | Path | None = None,
    **overrides,
) -> Result:
    """Runs one experiment.

    Args:
      config: a YAML file, a mapping, or an `Experiment`.
      out: folder for `config.yaml`, `metrics.jsonl`, `summary.json`, figures and checkpoints; None
        writes nothing.
      resume: continue the run in `out`, to the same bits as if it had never stopped.
      overwrite: replace the run in `out`.
      on_evaluation: called with the rounds done and a list with the metrics just measured.
      profile: folder for a JAX profiler trace of the rounds between two evaluations.
      **overrides: top-level keys, or dotted ones as `**{"client.l2": 1e-4}`.

    Returns: `Result` with metrics as arrays over evaluations and the final parameters.

    Raises: `ConfigError` (a `ValueError`) for a configuration that cannot be run, before anything
    compiles.

    >>> result = run({"data": {"name": "digits"}, "rounds": 2})
    >>> result.metrics["round"].tolist()
    [0.0, 2.0]
    """
    if isinstance(config, Experiment):
        config = config.to_dict()
    if isinstance(config, Mapping):
        experiment = config_lib.from_mapping(config, overrides)
    else:
        experiment = config_lib.load(config, overrides)
    if out is None:
        verify(experiment)
        return train([experiment], on_evaluation=on_evaluation, profile=profile)[0]
    verify(experiment)  # before the folder is claimed
    folder = results.RunFolder(out)
    folder.open(experiment.to_dict(), resume=resume, overwrite=overwrite)
    if folder.finished:
        if profile is not None:
            raise ConfigError(f"profile: the run in {str(folder.path)!r} is finished.")
        return read_result(experiment, folder)
    result = train(
        [experiment],
        [folder],
        checkpoint_dir=folder.path / CHECKPOINTS,
        on_evaluation=on_evaluation,
        profile=profile,
    )[0]
    from fedjax_sec import plotting  # slow to import, and not needed before

    plotting.accuracy_curve(result, folder.path / "figures")
    return result

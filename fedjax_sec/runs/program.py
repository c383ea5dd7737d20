"""The compiled functions of experiments of one structure, and how local training is computed.

Runs of the same structure (seeds, values of numeric fields) are replicas of one compiled program;
a single run is one replica.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sec import core
from fedjax_sec.core.random import Stream, stream
from fedjax_sec.evaluation.batches import in_batches
from fedjax_sec.evaluation.local import by_client
from fedjax_sec.evaluation.metrics import TestSet, evaluate
from fedjax_sec.evaluation.robustness import labels, withstood
from fedjax_sec.round import (
    Pool,
    Replica,
    RoundState,
    make_task,
    run_round,
    to_pixels,
    train_clients,
)
from fedjax_sec.runs.config import Experiment
from fedjax_sec.runs.loading import load_surrogates
from fedjax_sec.runs.memory import USABLE, check_state, device_memory, replicas_that_fit, tree_bytes
from fedjax_sec.runs.prepare import (
    initial_params,
    load_source,
    make_problem,
    make_replicas,
    poisoned_probes,
    state_before,
)
from fedjax_sec.runs.tuning import Tuning, candidates, tune

#: Local steps on which ways to train are compared; for convolutional networks on a CPU, clients
#: and images too.
TUNING_STEPS, TUNING_CLIENTS, TUNING_IMAGES = 2, 8, 4096

#: Metrics that count something in every round: updates left out and clients that sent none, rounds
#: whose aggregate was zero, rounds in which the attack changed an update.
COUNTS = ("excluded", "excluded_honest", "absent", "zero_aggregates", "attack_rounds")


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
        lowerings = [c for c in core.choices(experiment.model, "convolution") if c != "auto"]
    found = candidates(execution.clients, execution.chunk, convolution, per_round, lowerings)
    if jax.default_backend() == "cpu" and convolution is not None:
        images = TUNING_STEPS * getattr(experiment.client, "batch_size", 1)
        per_round = min(per_round, TUNING_CLIENTS, max(2, TUNING_IMAGES // images))
    short = dataclasses.replace(experiment, client=experiment.client.shortened(TUNING_STEPS))
    shape = {
        "model": core.dump(experiment.model),
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
        problem = make_problem(experiment, source, choice, per_round)
        task = make_task(problem, pool)

        def train(params, replica, pool):
            client = core.resolve(replica.components.client, 0)
            states = jax.vmap(lambda _: client.init(task.dim))(jnp.arange(per_round))
            states = states if client.keeps_state else ()
            return train_clients(
                problem,
                make_task(problem, pool),
                pool,
                replica,
                params,
                states,
                jnp.arange(per_round),
                jnp.int32(0),
            )

        args = jnp.zeros(task.dim), replica, pool
        function = jax.jit(train).lower(*args).compile()
        memory, limit = function.memory_analysis(), device_memory()
        if memory and limit and memory.temp_size_in_bytes > USABLE * limit:
            return None
        return lambda: jax.block_until_ready(function(*args))

    return tune(found, shape, measure)


class Program:
    """The compiled functions for all experiments of one structure.

    `traces` counts how often the round was traced: once for each length of scan. `compiled` maps
    each function to the seconds of its compilation and the bytes it needs.
    """

    def __init__(
        self, experiment: Experiment, at_once: int | None = None, tuning: Tuning | None = None
    ):
        source = load_source(experiment)
        self.experiment, self.source, self.at_once = experiment, source, at_once
        self.pool = jax.device_put(Pool(source.x_train, source.y_train))
        self.test = jax.device_put(TestSet(source.x_test, source.y_test))
        self.tuning = tuning or tuned(experiment)
        self.problem = make_problem(
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

    def init(
        self, replicas: Replica, starts: Sequence[np.ndarray | None] | None = None
    ) -> RoundState:
        """The state of every replica before round 0; `starts` are parameters that are given."""

        experiment = self.experiment
        start = time.perf_counter()
        params = initial_params(
            experiment.model, self.problem.input_shape, self.problem.num_classes
        )(replicas.key)
        if starts is not None:
            pairs = zip(params, starts, strict=True)
            params = jnp.stack([own if given is None else given for own, given in pairs])
        self._record("init", time.perf_counter() - start)
        task = make_task(self.problem, self.pool)
        begin = jax.vmap(lambda r, p: state_before(experiment, self.problem, task, r.components, p))
        shapes = jax.eval_shape(begin, replicas, params)._asdict()
        check_state({part: tree_bytes(tree) for part, tree in shapes.items()}, device_memory())
        return begin(replicas, params)

    def advance(self, state: RoundState, replicas: Replica, start: int, rounds: int):
        """`rounds` more rounds from number `start` for every replica; `state` is donated.

        Returns the new state and metrics: of the last of these rounds, but `train_loss` averaged
        and `COUNTS` summed over all of them.
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
                    probes = poisoned_probes(
                        task, replica, core.resolve(backdoor, start), watched, scale
                    )
                    measure = functools.partial(influence.measure, task, probes)

                def step(state, index):
                    self.traces += 1
                    last = index == start + rounds - 1 if diagnostics else None
                    return run_round(self.problem, task, pool, replica, state, index, last, measure)

                state, history = jax.lax.scan(step, state, start + jnp.arange(rounds))
                summary = jax.tree.map(lambda m: m[-1], history)
                summary["train_loss"] = jnp.nanmean(history["train_loss"])
                for name in COUNTS:
                    if name in summary:
                        summary[name] = history[name].sum()
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
                    params,
                    test,
                    task,
                    scale,
                    core.resolve(backdoor, last),
                    options.batch_size,
                    options.exclude_target,
                )
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
                core.resolve(attack, last), key, logits, x, y, options.batch_size, surrogate
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

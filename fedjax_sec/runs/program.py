"""The compiled functions of experiments of one structure, and how local training is computed.

Runs of the same structure (seeds, values of numeric fields) are replicas of one compiled program;
a single run is one replica.
"""

import functools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sec import core
from fedjax_sec.core import distributed
from fedjax_sec.core.random import Stream, stream
from fedjax_sec.core.types import TestSet
from fedjax_sec.evaluation.batches import in_batches
from fedjax_sec.evaluation.local import by_client
from fedjax_sec.evaluation.metrics import over_classes
from fedjax_sec.evaluation.robustness import labels, robust_mask
from fedjax_sec.ops.backend import compiler_options
from fedjax_sec.ops.client_axis import spreading
from fedjax_sec.round import (
    Replica,
    RoundState,
    adversary_of,
    backdoor_of,
    init_state,
    make_task,
    poisoned_tests,
    run_round,
    setting_of,
)
from fedjax_sec.runs.config import Experiment
from fedjax_sec.runs.execution import choose_layout
from fedjax_sec.runs.memory import check_state, device_memory, replicas_that_fit, tree_bytes
from fedjax_sec.runs.prepare import Prepared, initial_params, make_problem, make_replicas
from fedjax_sec.runs.tuning import Tuning

#: Metrics that count something in every round: updates left out and clients that sent none, rounds
#: whose aggregate was zero, rounds in which the attack changed an update.
COUNTS = ("excluded", "excluded_honest", "absent", "zero_aggregates", "attack_rounds")


class Program:
    """The compiled functions for all experiments of one structure.

    `traces` counts how often the round was traced: once for each length of scan. `compiled` maps
    each function to the seconds of its compilation, or of reading it from the cache, and the bytes
    it needs; `compile_seconds` are those of all together, where several compile side by side less
    than their sum.
    """

    def __init__(
        self, prepared: Prepared, at_once: int | None = None, tuning: Tuning | None = None
    ):
        self.prepared, self.experiment = prepared, prepared.experiment
        self.source, self.at_once = prepared.source, at_once
        source = prepared.source
        self.tuning = tuning or choose_layout(prepared)
        per_round = self.experiment.clients_per_round
        self.problem = make_problem(prepared, self.tuning.choice, per_round)
        self.pool = jax.device_put(prepared.pool)
        self.test = jax.device_put(TestSet(source.x_test, source.y_test))
        self.evaluators = self.experiment.evaluators
        self.surrogates = prepared.surrogates
        self.replicated = self.problem.layout.replicated()
        # Copied to all devices once, and not in every call.
        self._everywhere = self._placed(self.pool, self.test)
        self.traces = 0
        self.compiled: dict[str, dict] = {}
        self.compile_seconds = 0.0
        self._functions: dict = {}
        # Traced, not yet compiled: with the seconds that it took, and a lock for who compiles it.
        self._lowered: dict = {}
        self._finishing = threading.Lock()  # groups may share a program, each in a thread
        self._fitting: set = set()

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
        """The function compiled for arguments of these shapes."""
        start = time.perf_counter()
        key = self._lower(name, function, *args, donate=donate)
        if key in self._lowered:
            self._finish(key)
            self.compile_seconds += time.perf_counter() - start
        return self._functions[key]

    def _lower(self, name, function, *args, donate=()):
        """Traces a function for XLA, unless that was done; returns its key.

        In the caller's thread, whose settings of JAX count.
        """
        leaves, structure = jax.tree.flatten(args)
        key = (name, structure, tuple((leaf.shape, leaf.dtype.name) for leaf in leaves))
        if key not in self._functions and key not in self._lowered:
            start = time.perf_counter()
            shardings = {"in_shardings": self.replicated, "out_shardings": self.replicated}
            jitted = jax.jit(
                function, donate_argnums=donate, **(shardings if self.replicated else {})
            )
            if self.replicated:  # where the arguments lie now says nothing
                args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
            lowered = jitted.lower(*args)
            self._lowered[key] = lowered, time.perf_counter() - start, threading.Lock()
        return key

    def _finish(self, key) -> None:
        """Lets XLA compile what was traced, unless another thread has; waits for one that does."""
        if (traced := self._lowered.get(key)) is None:
            return
        lowered, seconds, lock = traced
        with lock:
            if key in self._functions:
                return
            start = time.perf_counter()
            options = compiler_options(self.tuning.optimization)
            self._functions[key] = function = lowered.compile(options or None)
            del self._lowered[key]
            self._record(key[0], seconds + time.perf_counter() - start, function)

    def _record(self, name, seconds, function=None):
        entry = self.compiled.setdefault(name, {"seconds": 0.0})
        entry["seconds"] += seconds
        memory = function.memory_analysis() if function is not None else None
        if memory is not None:  # not every backend knows
            entry["temporary_bytes"] = memory.temp_size_in_bytes
            entry["argument_bytes"] = memory.argument_size_in_bytes

    def compile(self, prepared: Sequence[Prepared]) -> "Program":
        """Compiles everything that a run of these experiments needs, without running it."""
        self.lower(prepared)
        begin, before = time.perf_counter(), self.compile_seconds
        with ThreadPoolExecutor(1) as thread:
            finished = thread.submit(self.finish)
            self._initial_params(make_replicas(prepared))  # compiled meanwhile
            finished.result()
        self.compile_seconds = before + time.perf_counter() - begin
        return self

    def lower(self, prepared: Sequence[Prepared]) -> "Program":
        """Traces everything that a run of these experiments needs: the first half of `compile`."""
        begin = time.perf_counter()
        replicas = make_replicas(prepared)
        state = self.state_shapes(replicas)
        self._check_size(state)
        first = prepared[0].experiment
        self._plan(state, replicas)
        self._lower(*self._evaluating(state, replicas))
        for rounds in {min(first.evaluation.every, first.rounds), _last_stretch(first)}:
            self._lower(*self._advancing(state, replicas, rounds), donate=(0,))
        self.compile_seconds += time.perf_counter() - begin
        return self

    def finish(self) -> "Program":
        """Compiles what `lower` has traced, side by side; in any thread, and in several."""
        with self._finishing:  # so that the time counts once
            begin, keys = time.perf_counter(), list(self._lowered)
            with ThreadPoolExecutor(len(keys) or 1) as threads:
                list(threads.map(self._finish, keys))
            self.compile_seconds += time.perf_counter() - begin
        return self

    def init(
        self, replicas: Replica, starts: Sequence[np.ndarray | None] | None = None
    ) -> RoundState:
        """The state of every replica before round 0; `starts` are parameters that are given."""

        begin = time.perf_counter()
        params = self._initial_params(replicas)
        self.compile_seconds += time.perf_counter() - begin
        if starts is not None:
            pairs = zip(params, starts, strict=True)
            params = jnp.stack([drawn if given is None else given for drawn, given in pairs])

        self._check_size(self.state_shapes(replicas))
        return self._begin(replicas, params)

    def state_shapes(self, replicas: Replica) -> RoundState:
        """The shapes of `init`'s state; nothing is computed."""
        size = jax.tree.leaves(replicas)[0].shape[0]
        params = jax.ShapeDtypeStruct((size, self.problem.space.dim), jnp.float32)
        return jax.eval_shape(self._begin, replicas, params)

    def _begin(self, replicas: Replica, params) -> RoundState:
        def begin(replica, params):
            task = make_task(self.problem, self.pool, replica.components.task)
            return init_state(self.problem, task, replica.components, params, replica.key)

        return jax.vmap(begin)(replicas, params)

    def _check_size(self, state: RoundState) -> None:
        parts = {part: tree_bytes(tree) for part, tree in state._asdict().items()}
        check_state(parts, device_memory())

    def _initial_params(self, replicas: Replica):
        start = time.perf_counter()
        shape, classes = self.problem.inputs.shape, self.problem.num_classes
        params = initial_params(self.experiment.model, shape, classes)(replicas.key)
        self._record("init", time.perf_counter() - start)
        return params

    def params(self, state: RoundState, replicas: Replica):
        """The global parameters [R, D]."""
        return jax.vmap(lambda server, r: r.components.algorithm.params(server))(
            state.server, replicas
        )

    def advance(self, state: RoundState, replicas: Replica, start: int, rounds: int):
        """`rounds` more rounds from number `start` for every replica; `state` is donated.

        Returns the new state and metrics: of the last of these rounds, but `train_loss` averaged
        and `COUNTS` summed over all of them.
        """
        function = self._advancer(state, replicas, rounds)
        pool, test = self._everywhere
        return function(*self._placed(state, replicas, pool, _round_number(start), test))

    def _advancer(self, state, replicas, rounds: int):
        self._plan(state, replicas)
        function = self._compile(*self._advancing(state, replicas, rounds), donate=(0,))
        if function not in self._fitting:  # XLA's account of memory takes longer than short rounds
            replicas_that_fit(1, *self._needs(function, state, replicas), device_memory())
            self._fitting.add(function)
        return function

    def _advancing(self, state, replicas, rounds: int) -> tuple:
        args = (state, replicas, self.pool, _round_number(0), self.test)
        return f"advance {rounds}", self._advance(rounds), *args

    def _advance(self, rounds: int):
        def advance(state, replicas, pool, start, test):
            def one(state, replica):
                task = make_task(self.problem, pool, replica.components.task)

                def step(state, index):
                    self.traces += 1
                    last = index == start + rounds - 1
                    with spreading(self.problem.layout):
                        return run_round(
                            self.problem, task, pool, replica, state, index, last, test
                        )

                state, history = jax.lax.scan(step, state, start + jnp.arange(rounds))
                return state, over_rounds(history)

            return self._over_replicas(one, state, replicas)

        return advance

    def _plan(self, state, replicas) -> None:
        """Chooses, once, how many replicas run side by side, by what a single one needs.

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
            args = (*one, self.pool, _round_number(0), self.test)
            function = self._compile("plan", self._advance(1), *args)
            self.traces = traces  # the round itself is still to be traced
            needs = self._needs(function, state, replicas)
            self.at_once = replicas_that_fit(size, *needs, device_memory())

    def needs(self, state, replicas, rounds: int) -> tuple[int, int]:
        """`_needs` of so many rounds in one program, compiled if it is not yet."""
        return self._needs(self._advancer(state, replicas, rounds), state, replicas)

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
        return function(*self._placed(*self._watching(state, replicas, last, *self._everywhere)))

    def _watching(self, state, replicas, last, pool, test):
        others = {label: params for label, (_, params) in self.surrogates.items()}
        return state, replicas, pool, test, last, others

    def _placed(self, *args):
        """The arguments on all devices that share the work; untouched where there is one."""
        return distributed.placed(args, self.replicated) if self.replicated else args

    def _evaluator(self, state, replicas):
        self._plan(state, replicas)
        return self._compile(*self._evaluating(state, replicas))

    def _evaluating(self, state, replicas) -> tuple:
        def measure(state, replicas, pool, test, last, others):
            def one(state, replica):
                task = make_task(self.problem, pool, replica.components.task)
                return self._measure(task, state, replica, pool, test, last, others)

            return self._over_replicas(one, state, replicas)

        watched = self._watching(state, replicas, _round_number(0), self.pool, self.test)
        return "evaluate", measure, *watched

    def _measure(self, task, state, replica, pool, test, last, others) -> dict:
        """One replica's metrics: every evaluator's, robust ones, and those on local test data."""
        components = core.resolve(replica.components, last)
        params = components.algorithm.params(state.server)
        adversary = backdoor_of(components, state.attack, setting_of(self.problem), task)
        metrics, headline = {}, task.task.headline
        for i, evaluator in enumerate(self.evaluators):
            key = jax.random.fold_in(stream(replica.key, Stream.EVALUATE), i)
            values = evaluator.measure(key, params, test.x, test.y, task, adversary)
            prefix = evaluator.registered_name if evaluator.prefix is None else evaluator.prefix
            for name, value in values.items():
                metrics[f"{prefix}/{name}" if prefix else name] = value
        bases, each = None if adversary is None else adversary[0].bases, f"per_class_{headline}"
        if bases is not None and each in metrics:
            truth = task.task.labels_of(test.y)
            counts = jnp.stack([(truth == base).sum() for base in bases])
            shares = jnp.stack([metrics[each][base] for base in bases])
            metrics[f"base_class_{headline}"] = over_classes(shares, counts)
        robust = functools.partial(self._robust, task, replica, last, others)
        images = self.experiment.evaluation.evasion_images
        x, y = test.x[:images], test.y[:images]
        for name, mask in robust(params, task.inputs.decode(x), y).items():
            metrics[name] = mask.mean()
        if replica.population.local is not None:
            held_out = self.experiment.data.local_test.data == "held_out"
            data = pool if held_out else test
            replica = replica._replace(components=components)
            replica = adversary_of(
                self.problem, replica, jax.random.fold_in(replica.key, last), last
            )[0]
            metrics |= self._local(task, state, replica, data, params, robust)
        return metrics

    def _local(self, task, state, replica, data, params, robust) -> dict:
        """Metrics on the clients' own test data, of the global model or of each client's own.

        `replica` has the malicious clients of the last round, some of whose test data may be
        poisoned.
        """
        algorithm, headline = replica.components.algorithm, task.task.headline
        size, positions = self.experiment.evaluation.batch_size, replica.population.local

        def right(params, x, y):
            def answers(x, y):
                return task.task.right(task.outputs(params, x), y)

            return {headline: in_batches(answers, size, x, y)} | robust(params, x, y)

        clients = jnp.arange(positions.shape[0])

        def examples(client, row):
            at = jnp.maximum(row, 0)
            x, y = task.inputs.decode(data.x[at]), data.y[at]
            return poisoned_tests(task, replica, state.attack, client, x, y, row >= 0)

        if not algorithm.personalizes:
            x, y = jax.tree.map(
                lambda leaf: leaf.reshape(-1, *leaf.shape[2:]),
                jax.vmap(examples)(clients, positions),
            )
            return by_client(right(params, x, y), positions)

        def of_client(args):
            local_state, client, row = args
            personal = algorithm.personal(state.server, local_state, task)
            return right(personal, *examples(client, row))

        masks = jax.lax.map(of_client, (state.client, clients, positions))
        return by_client(
            {name: mask.reshape(-1, *mask.shape[2:]) for name, mask in masks.items()}, positions
        )

    def _robust(self, task, replica, last, others, params, x, y) -> dict:
        """`robust_HEADLINE/NAME` -> whether each example withstands that attack on inputs."""
        options, masks = self.experiment.evaluation, {}
        key = stream(replica.key, Stream.EVASION)
        outputs = functools.partial(task.outputs, params)
        for label, attack in zip(labels(options.evasions), options.evasions, strict=True):
            surrogate = None
            if label in others:
                surrogate = functools.partial(self.surrogates[label][0], others[label])
            masks[f"robust_{task.task.headline}/{label}"] = robust_mask(
                core.resolve(attack, last),
                key,
                outputs,
                task.task.right,
                x,
                y,
                options.batch_size,
                surrogate,
            )
        return masks

    def unravel(self, params) -> Any:
        """Flat parameters [D] as the model's own tree."""
        return self.problem.space.join(params, self.pool.frozen)


def over_rounds(history: dict) -> dict:
    """Metrics of rounds [n, ...] as one row: the last, but `train_loss` averaged, `COUNTS` summed.

    >>> over_rounds({"train_loss": jnp.array([1.0, 3.0]), "absent": jnp.array([1, 2])})["absent"]
    Array(3, dtype=int32)
    """
    row = jax.tree.map(lambda metric: metric[-1], history)
    row["train_loss"] = jnp.nanmean(history["train_loss"])
    return row | {name: history[name].sum() for name in COUNTS if name in row}


def _round_number(value: int):
    """On the device by an explicit transfer, which a transfer guard lets pass."""
    return jax.device_put(np.int32(value))


def _last_stretch(experiment: Experiment) -> int:
    """Rounds between the last two evaluations."""
    return experiment.rounds % experiment.evaluation.every or min(
        experiment.evaluation.every, experiment.rounds
    )

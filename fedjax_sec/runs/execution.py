"""How local training is computed: measured where that is worth it, remembered, or by the rule."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from fedjax_sec import core
from fedjax_sec.core import value_of
from fedjax_sec.core.caching import usable_cores
from fedjax_sec.core.types import InputSpec
from fedjax_sec.ops.backend import compiler_options, on_cpu
from fedjax_sec.ops.client_axis import layout
from fedjax_sec.round import init_state, make_task, train_clients
from fedjax_sec.runs.memory import USABLE, device_memory
from fedjax_sec.runs.prepare import Prepared, make_problem, make_replicas
from fedjax_sec.runs.tuning import Choice, Tuning, candidates, is_worth_measuring, switched, tune

#: Local steps on which ways to train are compared; for convolutional networks on a CPU, clients
#: and images too.
TUNING_STEPS, TUNING_CLIENTS, TUNING_IMAGES = 2, 8, 4096

#: Operations that a core of a CPU computes in a second in training: a rough number, and a choice.
CORE_RATE = 1e10
#: Seconds of training from which XLA's own optimisation on a CPU is worth its compilation, a
#: choice: up to that, level 2 of LLVM, which compiles sooner, and slower convolutional rounds.
THOROUGH, LIGHT = 60.0, 2


def choose_layout(
    prepared: Prepared, replicas: int = 1, before: Callable[[], object] = lambda: None
) -> Tuning:
    """How local training is computed: measured on a few steps of some clients, or remembered.

    Where so many replicas train too shortly for a measurement to be worth it, the rule decides, and
    the compiler of a CPU optimises less. `FEDJAX_SEC_TUNING` (`on`, `off`) decides otherwise about
    measuring. `before` is called before anything is measured.

    On a CPU, which convolutional networks keep busy for long, on no more than `TUNING_CLIENTS` of
    them and about `TUNING_IMAGES` images; other networks are quick, and measured with all clients.
    There a deep network's shorter one is measured; elsewhere its memory decides, too. What is
    measured are equal clients: `waiting` says what unequal ones add.
    """
    experiment = prepared.experiment
    execution, per_round = experiment.execution, experiment.clients_per_round
    convolution, lowerings = value_of(experiment.model, "convolution"), ()
    if convolution is not None:
        lowerings = [c for c in core.choices(experiment.model, "convolution") if c != "auto"]
        if on_cpu():
            images = TUNING_STEPS * (value_of(experiment.client, "batch_size") or 1)
            per_round = min(per_round, TUNING_CLIENTS, max(2, TUNING_IMAGES // images))
    deep = prepared.network.model.deep
    options = candidates(
        execution.clients, execution.chunk, convolution, per_round, lowerings, deep
    )
    expected = replicas * training_seconds(prepared) if on_cpu() else math.inf
    level = LIGHT if expected < THOROUGH else None
    measures = is_worth_measuring(options, expected) if switched() is None else switched()
    if not measures:
        return Tuning(options[0], {}, level)
    return _measured(prepared, options, per_round, before, level)._replace(optimization=level)


def waiting(prepared: Prepared, choice: Choice) -> float:
    """How many times as many local steps a round computes as its clients take, 1 or more.

    Clients side by side wait for the one that takes most. Counted as `Client.gradients` counts,
    over all clients in their order, who are those of every round where all take part.
    """
    experiment = prepared.experiment
    if experiment.client.gradients(1) == experiment.client.gradients(2):
        return 1.0  # as many for every client, or not told
    counts = prepared.population.counts
    steps = [max(experiment.client.gradients(int(count)), 1) for count in counts]
    side_by_side = layout(
        choice.clients, choice.chunk, experiment.clients_per_round, choice.convolution is not None
    ).at_once
    groups = [steps[i : i + side_by_side] for i in range(0, len(steps), side_by_side)]
    return sum(len(group) * max(group) for group in groups) / sum(steps)


def _measured(
    prepared: Prepared,
    options: Sequence[Choice],
    per_round: int,
    before: Callable[[], object],
    level: int | None,
) -> Tuning:
    """The fastest option for the first steps of so many clients."""
    experiment = prepared.experiment
    client = experiment.client.shortened(TUNING_STEPS)
    model = experiment.model.shortened() if on_cpu() else experiment.model
    short = dataclasses.replace(experiment, client=client, model=model)
    short = prepared._replace(experiment=short)
    shape = {
        "model": core.dump(model),
        "input": prepared.source.x_train.shape[1:],
        "clients": per_round,
        "client": str(jax.tree.structure(client)),
        "algorithm": str(jax.tree.structure(experiment.algorithm)),
        "poison": str(jax.tree.structure(experiment.attack.data_stages)),
    }
    if stages := experiment.defense.client_stages:
        shape["defense"] = str(jax.tree.structure(stages))

    @functools.cache
    def inputs():
        replica = jax.tree.map(lambda leaf: leaf[0], make_replicas([short]))
        return replica, jax.device_put(prepared.pool)

    def measure(choice):
        replica, pool = inputs()
        problem = make_problem(short, choice, per_round)

        def train(params, replica, pool):
            task = make_task(problem, pool, replica.components.task)
            state = init_state(problem, task, replica.components, params, replica.key)
            ids = jnp.arange(per_round)
            local_states = jax.tree.map(lambda leaf: leaf[ids], state.client)
            args = state.server, state.attack, local_states, ids, jnp.int32(0)
            return train_clients(problem, task, pool, replica, *args)

        args = jnp.zeros(problem.space.dim), replica, pool
        function = jax.jit(train).lower(*args).compile(compiler_options(level) or None)
        memory, limit = function.memory_analysis(), device_memory()
        if memory and limit and memory.temp_size_in_bytes > USABLE * limit:
            return None
        return lambda: jax.block_until_ready(function(*args))

    return tune(options, shape, measure, before, functools.partial(waiting, prepared))


def training_seconds(prepared: Prepared) -> float:
    """What the local training of a whole run takes on this machine's CPU, roughly.

    Three forward passes for each gradient of an example, counted by XLA, at `CORE_RATE` a core;
    infinite for a client that does not say how many it computes.
    """
    experiment = prepared.experiment
    gradients = experiment.client.gradients(prepared.setting.capacity)
    if gradients is None:
        return math.inf
    passes = 3 * gradients * experiment.clients_per_round * experiment.rounds
    source = prepared.source
    each = _operations(experiment.model, source.inputs, source.num_classes)
    return passes * each / (CORE_RATE * usable_cores())


@functools.lru_cache(maxsize=16)
def _operations(component, inputs: InputSpec, num_classes: int) -> float:
    """Operations of a network's forward pass of one example."""
    if value_of(component, "convolution") is not None:
        # Other ways to compute them add operations that only move data.
        component = dataclasses.replace(component, convolution="xla")
    model = component.make(inputs.shape, num_classes)
    kind = jnp.int32 if inputs.kind == "tokens" else jnp.float32

    def forward(variables, x):
        masked = {"mask": jnp.ones(1, bool)} if model.pools_batch else {}
        return model.apply(variables, x, **masked)

    variables = jax.eval_shape(model.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((1, *inputs.shape), kind)
    cost = jax.jit(forward).lower(variables, x).cost_analysis()
    return (cost or {}).get("flops", math.inf)

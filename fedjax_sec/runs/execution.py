"""How local training is computed: measured on a few steps of some clients, or remembered."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from fedjax_sec import core
from fedjax_sec.core import value_of
from fedjax_sec.round import init_state, make_task, train_clients
from fedjax_sec.runs.memory import USABLE, device_memory
from fedjax_sec.runs.prepare import Prepared, make_problem, make_replicas
from fedjax_sec.runs.tuning import Tuning, candidates, tune

#: Local steps on which ways to train are compared; for convolutional networks on a CPU, clients
#: and images too.
TUNING_STEPS, TUNING_CLIENTS, TUNING_IMAGES = 2, 8, 4096


def choose_layout(prepared: Prepared) -> Tuning:
    """How local training is computed: measured on a few steps of some clients, or remembered.

    On a CPU, which convolutional networks keep busy for long, on no more than `TUNING_CLIENTS` of
    them and about `TUNING_IMAGES` images; other networks are quick, and measured with all clients.
    There a deep network's shorter one is measured; elsewhere its memory decides, too.
    """
    experiment, source = prepared.experiment, prepared.source
    execution, per_round = experiment.execution, experiment.clients_per_round
    convolution = value_of(experiment.model, "convolution")
    lowerings = ()
    if convolution is not None:
        lowerings = [c for c in core.choices(experiment.model, "convolution") if c != "auto"]
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu and convolution is not None:
        images = TUNING_STEPS * (value_of(experiment.client, "batch_size") or 1)
        per_round = min(per_round, TUNING_CLIENTS, max(2, TUNING_IMAGES // images))
    deep = prepared.network.model.deep
    options = candidates(
        execution.clients, execution.chunk, convolution, per_round, lowerings, deep
    )
    client = experiment.client.shortened(TUNING_STEPS)
    model = experiment.model.shortened() if on_cpu else experiment.model
    short = dataclasses.replace(experiment, client=client, model=model)
    short = prepared._replace(experiment=short)
    shape = {
        "model": core.dump(model),
        "input": source.x_train.shape[1:],
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
        function = jax.jit(train).lower(*args).compile()
        memory, limit = function.memory_analysis(), device_memory()
        if memory and limit and memory.temp_size_in_bytes > USABLE * limit:
            return None
        return lambda: jax.block_until_ready(function(*args))

    return tune(options, shape, measure)

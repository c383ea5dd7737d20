"""Shared parts of tests of attacks on models: whole rounds, with all messages of each."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from programs import program_of, replicas_of, task_on

from fedjax_sec import core
from fedjax_sec.round import run_round
from fedjax_sec.runs import config


@core.pytree
class Sees(core.Monitor):
    """Keeps the whole trace of a round, which no monitor of the package does."""

    registered_name = "sees"
    prefix = ""

    def observe(self, key, state, trace, task):
        return state, {
            "ids": trace.ids,
            "malicious": trace.malicious,
            "before": trace.before,
            "after": trace.after,
            "honest": trace.honest.vector,
            "sent": trace.sent.vector,
            "weights": jnp.stack([trace.honest.weight, trace.sent.weight]),
        }


def rounds_of(spec, count=3):
    """The records of the first rounds of an experiment, and the attack's state behind each."""
    experiment = config.from_mapping(spec)
    monitors = (*experiment.evaluation.monitors, Sees())
    evaluation = dataclasses.replace(experiment.evaluation, monitors=monitors, diagnostics=False)
    experiment = dataclasses.replace(experiment, evaluation=evaluation)
    program = program_of(experiment)
    replicas = replicas_of([experiment])
    replica, state = jax.tree.map(lambda a: a[0], (replicas, program.init(replicas)))
    task = task_on(program)

    @jax.jit
    def step(state, index):
        return run_round(program.problem, task, program.pool, replica, state, index)

    records = []
    for index in range(count):
        state, metrics = step(state, jnp.int32(index))
        record = {name: np.asarray(metrics[name]) for name in metrics}
        records.append(record | {"state": jax.tree.map(np.asarray, state.attack.update)})
    return records, task

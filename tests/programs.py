"""Shared parts of tests of whole rounds: programs, replicas and tasks of experiments."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from fedjax_sec import core
from fedjax_sec.algorithms import Averaging
from fedjax_sec.core import optimizers, registry
from fedjax_sec.core.space import make_space
from fedjax_sec.core.types import InputSpec, Message
from fedjax_sec.round import Problem, make_task
from fedjax_sec.runs import experiment as experiment_lib
from fedjax_sec.runs.prepare import make_replicas, prepare
from fedjax_sec.runs.program import Program


@core.pytree
class Apart(Averaging):
    """Clients keep models of their own, which nobody sends."""

    registered_name = "apart"
    personalizes = True
    client: Any = core.given("How a client trains.")
    optimizer: Any = core.given("The server's optimizer.")

    def init_client(self, params, setting, task):
        return params

    def train(self, key, download, state, data, task):
        done = self.local(key, state, (), data, task)
        return Message(jnp.zeros_like(state), data.reported), state + done.delta, done.metrics

    def personal(self, server, state, task):
        return state


def program_of(experiment, *args, **options) -> Program:
    """The program of an experiment."""
    return Program(prepare(experiment), *args, **options)


def share_programs(monkeypatch, programs: dict, *modules) -> None:
    """Lets the modules keep a program of each structure in `programs` instead of making another."""

    def program(first, at_once=None, tuning=None):
        key = first.experiment.structure()
        if key not in programs:
            programs[key] = Program(first, at_once, tuning)
        return programs[key]

    for module in modules:
        monkeypatch.setattr(module, "Program", program)


def replicas_of(experiments: Sequence):
    """The experiments as replicas of one program."""
    return make_replicas([prepare(one) for one in experiments])


def train(experiments: Sequence, *args, **options):
    """The results of experiments that share a program."""
    return experiment_lib.train([prepare(one) for one in experiments], *args, **options)


def task_on(program: Program):
    """The program's task, with its pool."""
    return make_task(program.problem, program.pool, program.prepared.task)


def classification():
    """The task of most tests."""
    return registry.tasks.build("classification")


def problem_of(
    model,
    input_shape,
    num_classes,
    pixel_scale,
    mean,
    std,
    num_clients,
    clients_per_round,
    omniscient,
    layout,
) -> Problem:
    """A problem on images of this shape and scale."""
    kind = "pixels" if len(input_shape) == 3 else "features"
    inputs = InputSpec(kind, tuple(input_shape), pixel_scale, tuple(mean), tuple(std))
    return Problem(
        model=model,
        space=make_space(model),
        inputs=inputs,
        num_classes=num_classes,
        num_clients=num_clients,
        clients_per_round=clients_per_round,
        omniscient=omniscient,
        layout=layout,
    )


def observed(task) -> np.ndarray:
    """Which entries of the vector [D] are running statistics."""
    mask = np.zeros(task.dim, bool)
    mask[task.space.observed] = True
    return mask


def with_client(components, client):
    """The components with another client in the algorithm."""
    algorithm = dataclasses.replace(components.algorithm, client=client)
    return components._replace(algorithm=algorithm)


def averaging(client):
    """FedAvg of this client, with a server of rate 1."""
    optimizer = optimizers.build({"name": "sgd", "learning_rate": 1.0})
    algorithm = registry.algorithms.build("fedavg")
    return dataclasses.replace(algorithm, client=client, optimizer=optimizer)

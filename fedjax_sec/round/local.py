"""Local training of a round's clients, and the server's on its own examples."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from fedjax_sec import core
from fedjax_sec.core import ConfigError, Hooks
from fedjax_sec.core.random import Stream, stream
from fedjax_sec.core.types import (
    BoundTask,
    ClientView,
    LocalData,
    Message,
    Metrics,
    State,
)
from fedjax_sec.ops.client_axis import map_clients
from fedjax_sec.round.state import Pool, Problem, Replica


def local_data(
    task: BoundTask, pool: Pool, replica: Replica, attack_state: Any, index: Array
) -> Callable:
    """client number -> its `LocalData` in round `index`, poisoned where it is malicious."""
    attack, population = replica.components.attack, replica.population
    poison_key = stream(replica.key, Stream.POISON)
    poisons = bool(attack.data_stages)
    if poisons:
        poisoned_by = attack.poisoned_by(population.malicious)
        ranks = jnp.cumsum(poisoned_by, axis=1) - 1  # among those who poison alike

    def of(client_id):
        row = population.index[client_id]
        count, capacity = population.counts[client_id], population.index.shape[1]
        held, copied = count, None
        if poisons:
            key = jax.random.fold_in(poison_key, client_id)
            who, its_ranks = poisoned_by[:, client_id], ranks[:, client_id]
            labels = task.task.labels_of(pool.y[row])
            chosen = attack.choose(key, labels, jnp.arange(capacity) < count)
            if attack.adds_copies:  # they follow the client's own examples
                mask = attack.copied(chosen, who)
                copied = jnp.argsort(~mask, stable=True)
                count = count + mask.sum()

        def fetch(position):
            is_copy = position >= held
            if copied is not None:
                position = jnp.where(is_copy, copied[jnp.maximum(position - held, 0)], position)
            example = row[position]
            x, y = task.inputs.decode(pool.x[example]), pool.y[example]
            if poisons:
                x, y = attack.poison(
                    key, attack_state, x, y, position, chosen, who, its_ranks, task, is_copy
                )
            return x, y

        capacity = capacity if copied is None else 2 * capacity
        return LocalData(count, capacity, index, fetch, held.astype(jnp.float32))

    return of


def poisoned_tests(
    task: BoundTask, replica: Replica, attack_state: Any, client: Array, x: Array, y: Array, held
) -> tuple[Array, Array]:
    """A client's own test examples [T, ...], poisoned where it is malicious and an attack says so.

    `held` [T] is false where there is no example.
    """
    attack = replica.components.attack
    if not any(stage.local_test for stage in attack.data_stages):
        return x, y
    poisoned_by = attack.poisoned_by(replica.population.malicious)
    ranks = jnp.cumsum(poisoned_by, axis=1) - 1
    key = jax.random.fold_in(stream(replica.key, Stream.LOCAL_TEST), client)
    who, its_ranks = poisoned_by[:, client], ranks[:, client]
    return attack.poison_tests(key, attack_state, x, y, held, who, its_ranks, task)


def train_clients(
    problem: Problem,
    task: BoundTask,
    pool: Pool,
    replica: Replica,
    server: State,
    attack_state: Any,
    local_states: State,
    ids: Int[Array, " K"],
    index: Array,
) -> tuple[Message, State, Metrics]:
    """Local training of the clients `ids` from the same server, laid out as `problem` says.

    Returns their messages, their new states and their metrics, each with a leading axis K.
    """
    replica = replica._replace(components=core.resolve(replica.components, index))
    train = client_training(task, pool, replica, attack_state, index)

    def train_client(client_id, local_state):
        # Closed over and called in here: leaves that ignore the client stay unbatched.
        download = replica.components.algorithm.download(server, client_id)
        return train(download, client_id, local_state)

    return map_clients(train_client, problem.layout, ids, local_states)


def client_training(
    task: BoundTask, pool: Pool, replica: Replica, attack_state: Any, index: Array
) -> Callable:
    """(download, client number, its state) -> (its message, its new state, metrics).

    `replica` holds the numbers of round `index`, no schedules.
    """
    algorithm, defense = replica.components.algorithm, replica.components.defense
    # The client's own stream does not depend on the round: an epoch's order must be the same for
    # all rounds that it spans.
    client_key = stream(replica.key, Stream.CLIENT)
    data = local_data(task, pool, replica, attack_state, index)

    def train(download, client_id, local_state):
        key, examples = jax.random.fold_in(client_key, client_id), data(client_id)
        if not defense.client_stages:
            return algorithm.train(key, download, local_state, examples, task)
        honest = ~replica.population.malicious[client_id]
        view = ClientView(task, examples, algorithm.client, algorithm.received(download))
        hooks, called = _noting(defense.hooks(view, honest))
        trained = algorithm.train(key, download, local_state, examples, task, hooks)
        if not called:
            raise ConfigError(
                f"defense: {[stage.registered_name for stage in defense.client_stages]} act in "
                f"local training, and there the algorithm {algorithm.registered_name!r} with its "
                f"client calls no hooks, so they would do nothing."
            )
        return trained

    return train


def _noting(hooks: Hooks) -> tuple[Hooks, list]:
    """The hooks, and a list that is not empty once one of them was called."""
    called = []

    def noted(function):
        def call(*args):
            called.append(function)
            return function(*args)

        return None if function is None else call

    acting = ("correct", "after_step", "send")
    return hooks._replace(**{name: noted(getattr(hooks, name)) for name in acting}), called

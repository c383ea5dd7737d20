"""Local training of a round's clients, and the server's on its own examples."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fedjax_sec import core
from fedjax_sec.core.random import Stream, stream
from fedjax_sec.core.types import (
    LocalData,
    Metrics,
    ServerData,
    State,
    Task,
)
from fedjax_sec.ops.client_axis import map_clients
from fedjax_sec.round.state import (
    Pool,
    Problem,
    Replica,
    to_pixels,
)


def train_clients(
    problem: Problem,
    task: Task,
    pool: Pool,
    replica: Replica,
    params: Float[Array, " D"],
    local_states: State,
    ids: Int[Array, " K"],
    index: Array,
) -> tuple[Float[Array, "K D"], State, Metrics]:
    """Local training of the clients `ids` from the same parameters, laid out as `problem` says.

    Returns their updates, their new states and their metrics, each with a leading axis K.
    """
    components, population = core.resolve(replica.components, index), replica.population
    # The client's own stream does not depend on the round: an epoch's order must be the same for
    # all rounds that it spans.
    client_key = stream(replica.key, Stream.CLIENT)
    poison_key = stream(replica.key, Stream.POISON)
    poisons = bool(components.attack.data_stages)
    if poisons:
        poisoned_by = components.attack.poisoned_by(population.malicious)
        ranks = jnp.cumsum(poisoned_by, axis=1) - 1  # among those who poison alike

    def train_client(client_id, local_state):
        row = population.index[client_id]
        count, capacity = population.counts[client_id], population.index.shape[1]
        held, copied = count, None
        if poisons:
            own = jax.random.fold_in(poison_key, client_id)
            who, its_ranks = poisoned_by[:, client_id], ranks[:, client_id]
            chosen = components.attack.choose(own, pool.y[row], jnp.arange(capacity) < count)
            if components.attack.adds_copies:  # they follow the client's own examples
                mask = components.attack.copied(chosen, who)
                copied = jnp.argsort(~mask, stable=True)
                count = count + mask.sum()

        def fetch(position):
            is_copy = position >= held
            if copied is not None:
                position = jnp.where(is_copy, copied[jnp.maximum(position - held, 0)], position)
            example = row[position]
            x, y = to_pixels(pool.x[example], problem.pixel_scale), pool.y[example]
            if poisons:
                x, y = components.attack.poison(
                    own, x, y, position, chosen, who, its_ranks, task, is_copy
                )
            return x, y

        capacity = capacity if copied is None else 2 * capacity
        local = LocalData(count, capacity, index, fetch)
        own_key = jax.random.fold_in(client_key, client_id)
        return components.client.apply(own_key, params, local_state, local, task)

    return map_clients(train_client, problem.layout, ids, local_states)


def server_data(
    problem: Problem, task: Task, pool: Pool, replica: Replica, params, index: Array
) -> ServerData | None:
    """What the server can compute on its root data set in this round; None without one."""
    root, trainer = replica.population.root, replica.components.trainer
    if root is None:
        return None
    count, key = root.shape[0], stream(replica.key, Stream.ROOT)

    def fetch(position):
        return to_pixels(pool.x[root[position]], problem.pixel_scale), pool.y[root[position]]

    @functools.cache  # several stages may ask, and so may the diagnostics
    def update():
        local = LocalData(jnp.int32(count), count, index, fetch)
        return trainer.apply(key, params, trainer.init(task.dim), local, task)[0]

    def loss(params):
        x, y = fetch(jnp.arange(count))
        return task.loss(params, x, y, jnp.ones(count, bool))

    return ServerData(update, loss)

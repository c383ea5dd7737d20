"""The server's half of a round: its view of the messages, its own examples, its step."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from fedjax_sec.core.random import Stream, stream
from fedjax_sec.core.space import trained_part
from fedjax_sec.core.types import (
    BoundTask,
    LocalData,
    Message,
    Metrics,
    ServerData,
    ServerView,
    State,
)
from fedjax_sec.round.participants import Participants
from fedjax_sec.round.pipeline import Defended, where_rows
from fedjax_sec.round.state import Pool, Replica


def server_view(
    task: BoundTask,
    pool: Pool,
    replica: Replica,
    who: Participants,
    weights: Float[Array, " K"],
    params: Float[Array, " D"],
    index: Array,
) -> ServerView:
    """The server's view before it gets the messages of clients that report these weights."""
    return ServerView(
        params=params,
        weights=weights,
        client_ids=who.ids,
        valid=who.present,
        round=index,
        root=server_data(task, pool, replica, params, index),
        space=task.space,
        rate=replica.components.algorithm.rate,
    )


def server_data(
    task: BoundTask,
    pool: Pool,
    replica: Replica,
    params: Float[Array, " D"],
    index: Array,
) -> ServerData | None:
    """The server's update and loss on its root data set in this round; None without one."""
    root, trainer = replica.population.root, replica.components.trainer
    if root is None:
        return None
    count, key = root.shape[0], stream(replica.key, Stream.ROOT)

    def fetch(position):
        return task.inputs.decode(pool.x[root[position]]), pool.y[root[position]]

    @functools.cache  # several stages may ask, and so may the diagnostics
    def update():
        data = LocalData(jnp.int32(count), count, index, fetch, jnp.float32(count))
        return trainer.apply(key, params, trainer.init(task.dim), data, task).delta

    def loss(params):
        x, y = fetch(jnp.arange(count))
        return task.loss(params, x, y, jnp.ones(count, bool))

    return ServerData(update, loss)


def receive(view: ServerView, sent: Message) -> ServerView:
    """The server's view of what was sent: a message is valid where all of its leaves are finite."""
    valid = view.valid
    if sent.weight is not view.weights:  # an attack may have rewritten it
        valid &= jnp.isfinite(sent.weight) & (sent.weight >= 0)
        view = view._replace(weights=jnp.where(valid, sent.weight, 0.0))
    for leaf in jax.tree.leaves(sent.extra):
        valid &= jnp.isfinite(leaf).reshape(leaf.shape[0], -1).all(axis=1)
    return view._replace(valid=valid)


def serve(
    key: PRNGKeyArray,
    replica: Replica,
    who: Participants,
    server: State,
    sent: Message,
    view: ServerView,
    defended: Defended,
    task: BoundTask,
) -> tuple[State, Metrics]:
    """The server's step along what the defence made of the messages, and the server's metrics.

    `view` is the one of `receive`, `key` the round's.
    """
    algorithm, excluded = replica.components.algorithm, defended.metrics["excluded"]
    learned = trained_part(task.space, defended.aggregate.shape[0])
    new, metrics = algorithm.step(
        stream(key, Stream.ALGORITHM),
        server,
        defended.aggregate,
        _usable(sent, excluded | ~view.valid),
        defended.view,
        task,
    )
    metrics = {f"{algorithm.registered_name}/{name}": value for name, value in metrics.items()}
    return new, metrics | {
        "aggregate_norm": jnp.linalg.norm(defended.aggregate[learned]),
        "excluded": excluded.sum(),
        "excluded_honest": (excluded & who.honest).sum(),
        "absent": (~who.present).sum(),
        "zero_aggregates": (~defended.metrics["moved"]).astype(jnp.int32),
    }


def _usable(sent: Message, excluded: Array) -> Message:
    """The messages with weight and extra of excluded rows at zero: NaN times 0 is NaN."""
    blank = functools.partial(_blank, excluded)
    return Message(sent.vector, blank(sent.weight), jax.tree.map(blank, sent.extra))


def _blank(rows: Array, leaf: Array) -> Array:
    return where_rows(rows, jnp.zeros_like(leaf), leaf)


def mean_over(values: Any, mask: Array) -> Array:
    """Mean over the clients of `mask`; NaN (null in the results) when there are none."""
    return jnp.sum(jnp.where(mask, values, 0.0)) / mask.sum()

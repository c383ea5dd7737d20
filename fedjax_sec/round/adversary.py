"""The adversary's half of a round: its view, and the messages that it rewrites."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from fedjax_sec import core
from fedjax_sec.core.random import Stream, stream
from fedjax_sec.core.types import (
    AttackerView,
    BoundTask,
    Message,
    Metrics,
    ServerData,
    ServerView,
    State,
)
from fedjax_sec.ops.moments import differs_in_rows
from fedjax_sec.round.participants import Participants
from fedjax_sec.round.state import Pool, Population, Replica


def attacker_view(
    task: BoundTask,
    pool: Pool,
    replica: Replica,
    who: Participants,
    malicious: Bool[Array, " K"],
    visible: Bool[Array, " K"],
    params: Float[Array, " D"],
    index: Array,
) -> AttackerView:
    """The view of an adversary with the rows `malicious` that sees the rows `visible`.

    What it knows of the server's rule is still missing.
    """
    population = replica.population
    return AttackerView(
        malicious,
        visible,
        params,
        who.ids,
        index,
        task,
        sampler(task, pool, population, who.ids, lambda: visible),
        ranks=(jnp.cumsum(population.malicious) - 1)[who.ids],
        weights=known_weights(jnp.where(who.present, who.counts, 0), malicious, visible),
        server_rate=replica.components.algorithm.rate,
        space=task.space,
    )


def sampler(
    task: BoundTask, pool: Pool, population: Population, ids: Int[Array, " K"], usable: Callable
) -> Callable:
    """(key, num) -> examples, decoded and with their labels, of the rows `usable() [K]`."""

    def sample(key, num):
        who_key, which_key = jax.random.split(key)
        counts = population.counts[ids]
        share = jnp.where(usable(), counts, 0).astype(jnp.float32)
        who = jax.random.categorical(who_key, jnp.log(share), shape=(num,))
        which = jax.random.randint(which_key, (num,), 0, jnp.maximum(counts[who], 1))
        example = population.index[ids[who], which]
        return task.inputs.decode(pool.x[example]), pool.y[example]

    return sample


def tamper(
    key: PRNGKeyArray,
    replica: Replica,
    who: Participants,
    message: Message,
    before: State,
    state: State,
    view: AttackerView,
) -> tuple[Message, State, Metrics]:
    """(the messages as sent, the attack's new state, its metrics).

    `state` is this round's, prepared; `before` the one from the round before.
    """
    attack = replica.components.attack
    sent, state, metrics = attack.apply(stream(key, Stream.ATTACK), message, state, view)
    if replica.population.start is not None:  # nobody was malicious: nothing to remember or report
        keep = functools.partial(jnp.where, who.attacked)
        state = jax.tree.map(keep, state, before)
        metrics = {name: keep(value, jnp.nan) for name, value in metrics.items()}
    return sent, attack.remember(state, message, who.present, view), metrics


def differs(honest: Message, sent: Message, malicious: Array) -> Array:
    """Whether the attack changed what a malicious client sends."""
    changed = differs_in_rows(honest.vector, sent.vector, malicious)
    for old, new in zip(jax.tree.leaves(honest[1:]), jax.tree.leaves(sent[1:]), strict=True):
        if new is not old:
            apart = (new != old).reshape(new.shape[0], -1).any(axis=1)
            changed = changed | jnp.any(apart & malicious)
    return changed


def known_defense(
    defense, key: PRNGKeyArray, view: ServerView, state: State | None, num_clients: int
) -> tuple[Callable, Callable | None]:
    """`defend` and `server_update` of the adversary's view.

    `state` is the defence's where the adversary sees all, None where it does not. Randomness is
    not known to anybody beforehand: `defend` draws its own.
    """
    key = jax.random.fold_in(key, 1 << 16)
    if state is None:
        view = view._replace(weights=jnp.ones_like(view.weights), root=None)

    def defend(updates, guess=None):
        at = state
        if at is None:
            at = defense.init(num_clients, updates.shape[1], view.space)
        root = view.root
        if guess is not None:
            root = ServerData(lambda: guess, _unseen if root is None else root.loss)
        return defense.apply(key, updates, at, view._replace(root=root)).aggregate

    return defend, None if view.root is None else view.root.update


def _unseen(params: Any):
    raise core.ConfigError(
        "attack: the defence evaluates clients on the server's own examples, and this adversary "
        "does not see the loss on the server's examples; only one with knowledge 'omniscient' does."
    )


def known_weights(
    counts: Int[Array, " K"], malicious: Bool[Array, " K"], visible: Bool[Array, " K"]
) -> Float[Array, " K"]:
    """`weights` of the adversary's view: for those that it does not see the mean of its own.

    >>> bad = jnp.array([True, False])
    >>> print(known_weights(jnp.array([3, 9]), bad, visible=bad))
    [3. 3.]
    """
    weights = counts.astype(jnp.float32)
    mean = jnp.sum(jnp.where(malicious, weights, 0.0)) / jnp.maximum(malicious.sum(), 1)
    return jnp.where(visible, weights, mean)

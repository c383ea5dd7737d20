"""A round whose clients and server are apart: the half of one client, and the server's.

Both draw from the streams of a simulated round, so that the two halves together are that round,
with an attack that each client can carry out for itself.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from fedjax_sec import core
from fedjax_sec.core.random import Stream, stream
from fedjax_sec.core.types import BoundTask, Message, Metrics, State
from fedjax_sec.round.adversary import attacker_view, differs, tamper
from fedjax_sec.round.local import client_training
from fedjax_sec.round.participants import Participants, participants
from fedjax_sec.round.pipeline import AttackState, where_rows
from fedjax_sec.round.server import mean_over, receive, serve, server_view
from fedjax_sec.round.state import (
    Pool,
    Problem,
    Replica,
    RoundState,
    message_shapes,
    setting_of,
)


class ClientState(NamedTuple):
    """A client's memory from round to round: its algorithm's, and its attack's if malicious."""

    local: State
    attack: AttackState


def init_client(problem: Problem, task: BoundTask, replica: Replica, download) -> ClientState:
    """A client's state before its first round, in which it gets this download."""
    components, setting = core.resolve(replica.components, 0), setting_of(problem)
    algorithm = components.algorithm
    local = algorithm.init_client(algorithm.received(download), setting, task)
    dim = message_shapes(problem, task, components, download, local).vector.shape[0]
    return ClientState(local, components.attack.init(problem.num_clients, dim, setting, task))


def client_round(
    problem: Problem,
    task: BoundTask,
    pool: Pool,
    replica: Replica,
    client: Int[Array, ""],
    download,
    state: ClientState,
    index: Int[Array, ""],
) -> tuple[Message, ClientState, Metrics]:
    """One client's half of round `index`: it trains, and if it is malicious, it attacks.

    Returns its message, its new state, and its metrics, with `attacked`: whether the attack changed
    the message. The attack gets a stack [K, D] in which all rows but the client's are zero and
    unseen.
    """
    replica = replica._replace(components=core.resolve(replica.components, index))
    key = jax.random.fold_in(replica.key, index)
    replica, who = participants(problem, replica, key, index)
    components, mine = replica.components, who.ids == client
    malicious, params = who.malicious & mine, components.algorithm.received(download)
    view = attacker_view(task, pool, replica, who, malicious, malicious, params, index)
    attack_state = components.attack.prepare(stream(key, Stream.PREPARE), state.attack, view)
    train = client_training(task, pool, replica, attack_state, index)
    message, local, metrics = train(download, client, state.local)
    if not components.attack.update_stages:
        return message, ClientState(local, attack_state), metrics | {"attacked": jnp.array(False)}

    def among_others(leaf):
        leaf = jnp.asarray(leaf)
        return where_rows(mine, leaf[None], jnp.zeros((mine.shape[0], *leaf.shape), leaf.dtype))

    rows = jax.tree.map(among_others, message)
    alone = who._replace(present=who.present & mine)
    sent, attack_state, _ = tamper(key, replica, alone, rows, state.attack, attack_state, view)
    metrics = metrics | {"attacked": differs(rows, sent, malicious)}
    sent = jax.tree.map(lambda leaf: leaf[jnp.argmax(mine)], sent)
    return sent, ClientState(local, attack_state), metrics


def clients_of(problem: Problem, replica: Replica, index: Int[Array, ""]) -> Participants:
    """The clients of round `index`, whom the server asks where they are `present`."""
    key = jax.random.fold_in(replica.key, index)
    return participants(problem, replica, key, index)[1]


def server_round(
    problem: Problem,
    task: BoundTask,
    pool: Pool,
    replica: Replica,
    state: RoundState,
    sent: Message,
    arrived: Bool[Array, " K"],
    client_metrics: Metrics,
    index: Int[Array, ""],
) -> tuple[RoundState, Metrics, Array | None]:
    """The server's half of round `index`, with the messages that arrived; all other rows are zero.

    Returns the new state, the round's metrics and which clients the defence kept [K], None where
    its rule keeps nobody in particular. `client_metrics [K]` are what the clients say of their
    training.
    """
    replica = replica._replace(components=core.resolve(replica.components, index))
    key = jax.random.fold_in(replica.key, index)
    replica, who = participants(problem, replica, key, index)
    who = who._replace(
        present=who.present & arrived,
        malicious=who.malicious & arrived,
        honest=who.honest & arrived,
    )
    components = replica.components
    params = components.algorithm.params(state.server)
    # Reported weights are not trusted: a view with others makes `receive` check them.
    weights = jnp.zeros_like(sent.weight)
    view = receive(server_view(task, pool, replica, who, weights, params, index), sent)
    defended = components.defense.apply(
        stream(key, Stream.DEFENSE), sent.vector, state.defense, view
    )
    server, served = serve(key, replica, who, state.server, sent, view, defended, task)
    metrics = {name: mean_over(value, who.honest) for name, value in client_metrics.items()}
    del metrics["attacked"]
    if components.attack.update_stages:
        attacked = client_metrics["attacked"] > 0
        metrics["attack_rounds"] = jnp.any(attacked & who.malicious).astype(jnp.int32)
    new = state._replace(server=server, defense=defended.state)
    return new, metrics | served, defended.metrics.get("kept")

"""One federated round as a pure function: the only place where the stages meet."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fedjax_sec import core
from fedjax_sec.core.random import Stream, stream
from fedjax_sec.core.types import BoundTask, Metrics, RoundTrace, TestSet
from fedjax_sec.ops.moments import finite_rows
from fedjax_sec.round.adversary import attacker_view, differs, known_defense, sampler, tamper
from fedjax_sec.round.local import local_data, train_clients
from fedjax_sec.round.monitors import observe
from fedjax_sec.round.participants import participants
from fedjax_sec.round.pipeline import where_rows
from fedjax_sec.round.server import mean_over, receive, serve, server_view
from fedjax_sec.round.state import Pool, Problem, Replica, RoundState, backdoor_of, setting_of


def run_round(
    problem: Problem,
    task: BoundTask,
    pool: Pool,
    replica: Replica,
    state: RoundState,
    index: Array,
    last: Array | bool = True,
    test: TestSet | None = None,
) -> tuple[RoundState, Metrics]:
    """Round number `index`: sample, gather, poison, train, attack, defend, step the server.

    Returns the new state and the round's metrics, the same keys every round. `last` is a traced
    boolean: monitors that look at the last round before an evaluation look where it is true. `test`
    are the test examples, for monitors that read them.
    """
    # From here on no component holds a schedule, only the numbers of this round.
    replica = replica._replace(components=core.resolve(replica.components, index))
    key = jax.random.fold_in(replica.key, index)
    replica, who = participants(problem, replica, key, index)
    components, population = replica.components, replica.population
    algorithm, params = components.algorithm, components.algorithm.params(state.server)
    ids, present, malicious, honest = who.ids, who.present, who.malicious, who.honest
    visible = present if problem.omniscient else malicious
    attacker = attacker_view(task, pool, replica, who, malicious, visible, params, index)
    attack_state = components.attack.prepare(stream(key, Stream.PREPARE), state.attack, attacker)

    before = jax.tree.map(lambda leaf: leaf[ids], state.client)
    sent_honestly, local_states, client_metrics = train_clients(
        problem, task, pool, replica, state.server, attack_state, before, ids, index
    )
    if population.dropout is not None:  # it sent nothing and learned nothing
        zeros = jax.tree.map(jnp.zeros_like, sent_honestly)
        silent = jax.tree.map(functools.partial(where_rows, present), sent_honestly, zeros)
        sent_honestly = silent._replace(weight=sent_honestly.weight)
        local_states = jax.tree.map(functools.partial(where_rows, present), local_states, before)
    client_state = jax.tree.map(lambda old, new: old.at[ids].set(new), state.client, local_states)

    # The adversary.
    def usable():
        # A client whose update is not finite may hold NaN; without any other, its own data remain.
        finite = visible & finite_rows(sent_honestly.vector)
        return jnp.where(jnp.any(finite), finite, visible)

    view = server_view(task, pool, replica, who, sent_honestly.weight, params, index)
    stages = (*components.attack.stages, *components.defense.stages)
    if core.needing(stages, "root") and view.root is not None:
        view.root.update()  # once, and not within a loop of an attack's
    defense_key = stream(key, Stream.DEFENSE)
    defend, server_update = known_defense(
        components.defense,
        defense_key,
        view,
        state.defense if problem.omniscient else None,
        problem.num_clients,
    )
    attacker = attacker._replace(
        sample=sampler(task, pool, population, ids, usable),
        defend=defend,
        server_update=server_update,
    )
    sent, attack_state, attack_metrics = tamper(
        key, replica, who, sent_honestly, state.attack, attack_state, attacker
    )

    # The server.
    view = receive(view, sent)
    defended = components.defense.apply(defense_key, sent.vector, state.defense, view)
    server, served = serve(key, replica, who, state.server, sent, view, defended, task)
    metrics = {name: mean_over(value, honest) for name, value in client_metrics.items()} | served
    if components.attack.update_stages:
        changed = differs(sent_honestly, sent, malicious)
        metrics["attack_rounds"] = changed.astype(jnp.int32)

    def explain() -> Metrics:
        return components.defense.apply(defense_key, sent.vector, state.defense, view).metrics

    def data(k):
        return local_data(task, pool, replica, attack_state, index)(ids[k])

    def drawn(k, step):
        client_key = jax.random.fold_in(stream(replica.key, Stream.CLIENT), ids[k])
        return algorithm.client.drawn(client_key, data(k), step)

    trace = RoundTrace(
        round=index,
        ids=ids,
        malicious=malicious,
        present=present,
        before=params,
        after=algorithm.params(server),
        honest=sent_honestly,
        sent=sent,
        aggregates=defended.aggregates,
        attack=attack_metrics,
        explain=explain,
        data=data,
        adversary=(components.attack, attack_state),
        backdoor=backdoor_of(components, attack_state, setting_of(problem), task),
        sampled=problem.clients_per_round < problem.num_clients,
        redrawn=problem.redraw,
        client=algorithm.client,
        test=test,
        drawn=drawn,
    )
    monitors, seen = observe(
        components.monitors,
        stream(key, Stream.MONITOR),
        state.monitors,
        trace,
        task,
        replica.probes,
        last,
    )
    new_state = RoundState(server, client_state, attack_state, defended.state, monitors)
    return new_state, metrics | seen

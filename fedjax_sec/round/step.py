"""One federated round as a pure function: the only place where the stages meet."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fedjax_sec import core
from fedjax_sec.core.random import Stream, stream
from fedjax_sec.core.types import (
    AttackerView,
    BoundTask,
    Message,
    Metrics,
    RoundTrace,
    ServerView,
    TestSet,
)
from fedjax_sec.ops.moments import differs_in_rows, finite_rows
from fedjax_sec.round.local import local_data, server_data, train_clients
from fedjax_sec.round.monitors import observe
from fedjax_sec.round.pipeline import where_rows
from fedjax_sec.round.state import (
    Pool,
    Problem,
    Replica,
    RoundState,
    backdoor_of,
    setting_of,
)
from fedjax_sec.round.views import draw_clients, known_defense, known_weights


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
    replica, attacked = adversary_of(problem, replica, key, index)
    components, population = replica.components, replica.population
    algorithm, clients = components.algorithm, problem.num_clients
    params = algorithm.params(state.server)
    ids = draw_clients(problem, population, stream(key, Stream.SAMPLE), attacked)
    counts = population.counts[ids]
    present = jnp.ones(ids.shape, bool) if population.empty is None else ~population.empty[ids]
    if (dropout := population.dropout) is not None:
        chance = jax.random.uniform(stream(key, Stream.DROPOUT), (clients,))
        present &= chance[ids] >= dropout
    malicious, honest = population.malicious[ids] & present, ~population.malicious[ids] & present
    visible = present if problem.omniscient else malicious

    def sample_from(usable):
        def sample(sample_key, num):
            who_key, which_key = jax.random.split(sample_key)
            share = jnp.where(usable(), counts, 0).astype(jnp.float32)
            who = jax.random.categorical(who_key, jnp.log(share), shape=(num,))
            which = jax.random.randint(which_key, (num,), 0, jnp.maximum(counts[who], 1))
            example = population.index[ids[who], which]
            return task.inputs.decode(pool.x[example]), pool.y[example]

        return sample

    attacker = AttackerView(
        malicious,
        visible,
        params,
        ids,
        index,
        task,
        sample_from(lambda: visible),
        ranks=(jnp.cumsum(population.malicious) - 1)[ids],
        weights=known_weights(jnp.where(present, counts, 0), malicious, visible),
        server_rate=algorithm.rate,
        space=task.space,
    )
    attack_state = components.attack.prepare(stream(key, Stream.PREPARE), state.attack, attacker)

    before = jax.tree.map(lambda leaf: leaf[ids], state.client)
    sent_honestly, local_states, client_metrics = train_clients(
        problem, task, pool, replica, state.server, attack_state, before, ids, index
    )
    if dropout is not None:  # it sent nothing and learned nothing
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

    server_view = ServerView(
        params=params,
        weights=sent_honestly.weight,
        client_ids=ids,
        valid=present,
        round=index,
        root=server_data(task, pool, replica, params, index),
        space=task.space,
        rate=algorithm.rate,
    )
    stages = (*components.attack.stages, *components.defense.stages)
    if core.needing(stages, "root") and server_view.root is not None:
        server_view.root.update()  # once, and not within a loop of an attack's
    defense_key = stream(key, Stream.DEFENSE)
    defend, server_update = known_defense(
        components.defense,
        defense_key,
        server_view,
        state.defense if problem.omniscient else None,
        clients,
    )
    attacker = attacker._replace(
        sample=sample_from(usable), defend=defend, server_update=server_update
    )
    sent, attack_state, attack_metrics = components.attack.apply(
        stream(key, Stream.ATTACK), sent_honestly, attack_state, attacker
    )
    if population.start is not None:  # nobody was malicious: nothing to remember or to report
        keep = functools.partial(jnp.where, attacked)
        attack_state = jax.tree.map(keep, attack_state, state.attack)
        attack_metrics = {name: keep(value, jnp.nan) for name, value in attack_metrics.items()}
    attack_state = components.attack.remember(attack_state, sent_honestly, present, attacker)

    # The server.
    server_view = _received(server_view, sent)
    defended = components.defense.apply(defense_key, sent.vector, state.defense, server_view)
    server, step_metrics = algorithm.step(
        stream(key, Stream.ALGORITHM),
        state.server,
        defended.aggregate,
        _usable(sent, defended.metrics["excluded"] | ~server_view.valid),
        defended.view,
        task,
    )

    metrics = {name: _mean_over(value, honest) for name, value in client_metrics.items()}
    metrics |= {f"{algorithm.registered_name}/{name}": v for name, v in step_metrics.items()}
    metrics["aggregate_norm"] = jnp.linalg.norm(defended.aggregate)
    excluded = defended.metrics["excluded"]
    metrics["excluded"] = excluded.sum()
    metrics["excluded_honest"] = (excluded & honest).sum()
    metrics["absent"] = (~present).sum()
    metrics["zero_aggregates"] = (~defended.metrics["moved"]).astype(jnp.int32)
    if components.attack.update_stages:
        changed = _differs(sent_honestly, sent, malicious)
        metrics["attack_rounds"] = changed.astype(jnp.int32)

    def explain() -> Metrics:
        return components.defense.apply(
            defense_key, sent.vector, state.defense, server_view
        ).metrics

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
        sampled=problem.clients_per_round < clients,
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


def adversary_of(
    problem: Problem, replica: Replica, key: Array, index: Array
) -> tuple[Replica, Array]:
    """The replica with round `index`'s malicious clients, and whether the round is attacked.

    `key` is the round's. In the other rounds nobody is malicious.
    """
    population, attacked = replica.population, jnp.array(True)
    malicious = population.malicious
    if problem.redraw:
        malicious = jax.random.permutation(stream(key, Stream.REDRAW), malicious)
    if population.start is not None and population.every is not None:
        since = index - population.start
        attacked = (since >= 0) & (since % population.every == 0)
        malicious = malicious & attacked
    return replica._replace(population=population._replace(malicious=malicious)), attacked


def _received(view: ServerView, sent: Message) -> ServerView:
    """The server's view of what was sent: a message is valid where all of its leaves are finite."""
    valid = view.valid
    if sent.weight is not view.weights:  # an attack may have rewritten it
        valid &= jnp.isfinite(sent.weight) & (sent.weight >= 0)
        view = view._replace(weights=jnp.where(valid, sent.weight, 0.0))
    for leaf in jax.tree.leaves(sent.extra):
        valid &= jnp.isfinite(leaf).reshape(leaf.shape[0], -1).all(axis=1)
    return view._replace(valid=valid)


def _usable(sent: Message, excluded: Array) -> Message:
    """The messages with weight and extra of excluded rows at zero: NaN times 0 is NaN."""
    blank = functools.partial(_blank, excluded)
    return Message(sent.vector, blank(sent.weight), jax.tree.map(blank, sent.extra))


def _blank(rows: Array, leaf: Array) -> Array:
    return where_rows(rows, jnp.zeros_like(leaf), leaf)


def _differs(honest: Message, sent: Message, malicious: Array) -> Array:
    """Whether the attack changed what a malicious client sends."""
    changed = differs_in_rows(honest.vector, sent.vector, malicious)
    for old, new in zip(jax.tree.leaves(honest[1:]), jax.tree.leaves(sent[1:]), strict=True):
        if new is not old:
            apart = (new != old).reshape(new.shape[0], -1).any(axis=1)
            changed = changed | jnp.any(apart & malicious)
    return changed


def _mean_over(values: Any, mask: Array) -> Array:
    """Mean over the clients of `mask`; NaN (null in the results) when there are none."""
    return jnp.sum(jnp.where(mask, values, 0.0)) / mask.sum()

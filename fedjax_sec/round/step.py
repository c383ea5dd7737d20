"""One federated round as a pure function: the only place where the stages meet."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from fedjax_sec import core
from fedjax_sec.core.random import Stream, stream
from fedjax_sec.core.types import (
    AttackerView,
    Metrics,
    ServerView,
    Task,
)
from fedjax_sec.ops.moments import differs_in_rows, finite_rows, row_norms
from fedjax_sec.round.local import server_data, train_clients
from fedjax_sec.round.state import (
    Pool,
    Problem,
    Replica,
    RoundState,
    to_pixels,
)
from fedjax_sec.round.views import draw_clients, known_defense, known_weights


def run_round(
    problem: Problem,
    task: Task,
    pool: Pool,
    replica: Replica,
    state: RoundState,
    index: Array,
    diagnose: Array | None = None,
    measure: Callable | None = None,
) -> tuple[RoundState, Metrics]:
    """Round number `index`: sample, gather, poison, train, attack, defend, step the server.

    Returns the new state and the round's metrics, the same keys every round. `diagnose` is a
    traced boolean: only where it is true are update norms and what the defence kept computed
    (they cost several passes over the stack; zeros elsewhere). None leaves them out.
    `measure(measured, before, after, flipped) -> (measured, metrics)` looks at the server's step:
    the parameters around it, and where the defence turned the aggregate's sign (None: nowhere).
    """
    # From here on no component holds a schedule, only the numbers of this round.
    replica = replica._replace(components=core.resolve(replica.components, index))
    key = jax.random.fold_in(replica.key, index)
    replica, attacked = _adversary_of(problem, replica, key, index)
    components, population = replica.components, replica.population
    clients = problem.num_clients
    ids = draw_clients(problem, population, stream(key, Stream.SAMPLE), attacked)
    counts = population.counts[ids]
    present = jnp.ones(ids.shape, bool) if population.empty is None else ~population.empty[ids]
    if (dropout := population.dropout) is not None:
        chance = jax.random.uniform(stream(key, Stream.DROPOUT), (clients,))
        present &= chance[ids] >= dropout
    malicious, honest = population.malicious[ids] & present, ~population.malicious[ids] & present

    before = jax.tree.map(lambda leaf: leaf[ids], state.client)
    updates, local_states, client_metrics = train_clients(
        problem, task, pool, replica, state.params, before, ids, index
    )
    if dropout is not None:  # it sent nothing and learned nothing
        updates = jnp.where(present[:, None], updates, 0.0)
        keep = functools.partial(_where_rows, present)
        local_states = jax.tree.map(keep, local_states, before)
    client_state = jax.tree.map(lambda old, new: old.at[ids].set(new), state.client, local_states)

    # The adversary.
    visible = present if problem.omniscient else malicious

    def sample(sample_key, num):
        who_key, which_key = jax.random.split(sample_key)
        # A client whose update is not finite may hold NaN; without any other, its own data remain.
        usable = visible & finite_rows(updates)
        usable = jnp.where(jnp.any(usable), usable, visible)
        share = jnp.where(usable, counts, 0).astype(jnp.float32)
        who = jax.random.categorical(who_key, jnp.log(share), shape=(num,))
        which = jax.random.randint(which_key, (num,), 0, jnp.maximum(counts[who], 1))
        example = population.index[ids[who], which]
        return to_pixels(pool.x[example], problem.pixel_scale), pool.y[example]

    server_view = ServerView(
        params=state.params,
        weights=counts.astype(jnp.float32),
        client_ids=ids,
        valid=present,
        round=index,
        with_kept=False,
        root=server_data(problem, task, pool, replica, state.params, index),
    )
    stages = (*components.attack.stages, *components.defense.stages)
    if core.needing(stages, "root") and server_view.root is not None:
        server_view.root.update()  # once, and not within a loop of an attack's
    defense_key = stream(key, Stream.DEFENSE)
    attacker = AttackerView(
        malicious,
        visible,
        state.params,
        ids,
        index,
        task,
        sample,
        *known_defense(
            components.defense,
            defense_key,
            server_view,
            state.defense if problem.omniscient else None,
            clients,
        ),
        ranks=(jnp.cumsum(population.malicious) - 1)[ids],
        weights=known_weights(jnp.where(present, counts, 0), malicious, visible),
        server_rate=components.server.rate,
    )
    sent, attack_state, attack_metrics = components.attack.apply(
        stream(key, Stream.ATTACK), updates, state.attack, attacker
    )
    if population.start is not None:  # nobody was malicious: nothing to remember or to report
        keep = functools.partial(jnp.where, attacked)
        attack_state = jax.tree.map(keep, attack_state, state.attack)
        attack_metrics = {name: keep(value, jnp.nan) for name, value in attack_metrics.items()}

    # The server.
    aggregate, defense_state, defense_metrics = components.defense.apply(
        defense_key, sent, state.defense, server_view
    )
    change, server_state = components.server.transformation().update(
        -aggregate, state.server, state.params
    )
    params = state.params + change
    new_state = state._replace(
        params=params,
        server=server_state,
        client=client_state,
        attack=attack_state,
        defense=defense_state,
    )

    metrics = {"train_loss": _mean_over(client_metrics["train_loss"], honest)}
    metrics["aggregate_norm"] = jnp.linalg.norm(aggregate)
    excluded = defense_metrics["excluded"]
    metrics["excluded"] = excluded.sum()
    metrics["excluded_honest"] = (excluded & honest).sum()
    metrics["absent"] = (~present).sum()
    metrics["zero_aggregates"] = (~defense_metrics["moved"]).astype(jnp.int32)
    if components.attack.update_stages:
        changed = differs_in_rows(updates, sent, malicious)
        metrics["attack_rounds"] = changed.astype(jnp.int32)
    if diagnose is not None:

        def explain():
            view = server_view._replace(with_kept=True)
            _, _, explained = components.defense.apply(defense_key, sent, state.defense, view)
            return _diagnostics(updates, sent, honest, malicious, attack_metrics, explained)

        nothing = jax.tree.map(lambda m: jnp.zeros(m.shape, m.dtype), jax.eval_shape(explain))
        metrics |= jax.lax.cond(diagnose, explain, lambda: nothing)
        if problem.clients_per_round < clients:  # whose entries `update_norm` and `kept` hold
            metrics["clients"] = ids
        if problem.redraw:
            metrics["malicious"] = malicious
    if measure is not None:
        measured, found = measure(
            state.measured, state.params, params, defense_metrics.get("flipped")
        )
        new_state, metrics = new_state._replace(measured=measured), metrics | found
    return new_state, metrics


def _adversary_of(
    problem: Problem, replica: Replica, key: PRNGKeyArray, index: Array
) -> tuple[Replica, Array]:
    """The replica with this round's malicious clients, and whether the round is attacked.

    In the other rounds nobody is malicious.
    """
    population, attacked = replica.population, jnp.array(True)
    malicious = population.malicious
    if problem.redraw:
        malicious = jax.random.permutation(stream(key, Stream.REDRAW), malicious)
    if population.start is not None:
        since = index - population.start
        attacked = (since >= 0) & (since % population.every == 0)
        malicious = malicious & attacked
    return replica._replace(population=population._replace(malicious=malicious)), attacked


def _where_rows(rows, new, old):
    return jnp.where(rows.reshape(-1, *[1] * (new.ndim - 1)), new, old)


def _diagnostics(updates, sent, honest, malicious, attack_metrics, defense_metrics) -> Metrics:
    """What a reader needs to see why a defence held or failed.

    `detection/true_positive_rate` and `.../false_positive_rate`: of the malicious and of the
    honest clients that took part, the share of which nothing was kept.
    """
    kept, norms = defense_metrics["kept"], row_norms(sent)
    removed = (kept == 0).astype(norms.dtype)
    metrics = {
        "update_norm": norms,
        "kept": kept,
        "update_norm_honest": _mean_over(norms, honest),
        "update_norm_malicious": _mean_over(norms, malicious),
        "kept_honest": _mean_over(kept, honest),
        "kept_malicious": _mean_over(kept, malicious),
        "detection/true_positive_rate": _mean_over(removed, malicious),
        "detection/false_positive_rate": _mean_over(removed, honest),
    }
    if sent is not updates:
        metrics["attack_shift"] = _mean_over(row_norms(sent - updates), malicious)
    for extra in (attack_metrics, defense_metrics):
        metrics |= {name: v for name, v in extra.items() if "/" in name and jnp.ndim(v) == 0}
    return metrics


def _mean_over(values, mask):
    """Mean over the clients of `mask`; NaN (null in the results) when there are none."""
    return jnp.sum(jnp.where(mask, values, 0.0)) / mask.sum()

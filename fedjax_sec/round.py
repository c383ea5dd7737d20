"""One federated round as a pure function: the only place where the stages meet."""
# ruff: noqa: F821

import enum
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from fedjax_sec import schema
from fedjax_sec.ops.client_axis import Layout, map_clients
from fedjax_sec.ops.moments import differs_in_rows, finite_rows, row_norms
from fedjax_sec.types import (
    AttackerView,
    LocalData,
    Metrics,
    Model,
    ServerData,
    ServerView,
    State,
    Task,
)


class Stream(enum.IntEnum):
    """Named random streams. Adding one never shifts another, so runs with and without an attack
    share their honest clients' randomness; numbers must never be reused."""

    INIT = 0
    PARTITION = 1
    MALICIOUS = 2
    SAMPLE = 3
    CLIENT = 4
    POISON = 5
    ATTACK = 6
    DEFENSE = 7
    ROOT = 8
    EVASION = 9
    LOCAL_TEST = 10
    DROPOUT = 11
    REDRAW = 12


def stream(key: PRNGKeyArray, name: Stream) -> PRNGKeyArray:
    """The key of one purpose."""
    return jax.random.fold_in(key, int(name))


class Pool(NamedTuple):
    """The training examples of all clients, on the device once and shared by all replicas."""

    x: UInt8[Array, "T *shape"]
    y: Int[Array, "T"]


class Population(NamedTuple):
    """Who holds what, and who is malicious. `index` pads each client's row to M with zeros.

    `root` are the server's own examples, which no client holds; None where it has none. `local`
    are the clients' own test examples, padded with -1: of the training set where they were held
    out, else of the test set; None where nobody has any. `start` and `every`: the attack takes
    place in the rounds `start`, `start + every`, ...; None where it does in all rounds. `dropout`
    is the probability that a client of the round sends nothing; None where all do. `empty` are
    the clients without examples, which never take part; None where there are none.
    """

    index: Int[Array, "N M"]
    counts: Int[Array, "N"]
    malicious: Bool[Array, "N"]
    root: Int[Array, "S"] | None = None
    local: Int[Array, "N Mt"] | None = None
    start: Int[Array, ""] | None = None
    every: Int[Array, ""] | None = None
    dropout: Float[Array, ""] | None = None
    empty: Bool[Array, "N"] | None = None


class Components(NamedTuple):
    """The experiment's components. A pytree: numeric fields are leaves, so they can be stacked.

    `trainer` is how the server trains on its root data set: a client, or None without one.
    """

    client: Any
    server: Any  # the server's optimizer
    attack: Any
    defense: Any
    trainer: Any = None


class Replica(NamedTuple):
    """One run of an experiment: a seed's key and population, and the components' values.

    `probes` are the test images on which influence is measured, by position and padded with -1;
    None where it is not.
    """

    key: PRNGKeyArray
    components: Components
    population: Population
    probes: Int[Array, "P"] | None = None


class RoundState(NamedTuple):
    """Everything that a round hands to the next. `client` is stacked over all N, or empty.

    `measured` is what a measurement adds up over the rounds, empty where there is none.
    """

    params: Float[Array, "D"]
    server: State
    client: State
    attack: State
    defense: State
    measured: State = ()


class Problem(NamedTuple):
    """What is fixed for all replicas of one compiled program. `pixel_scale` maps stored integers
    to [0, 1]; `mean` and `std` normalise at the model's entry; `layout` is how the round's
    clients are trained. `malicious_per_round` malicious clients are in every attacked round (None:
    as many as chance draws); `redraw`: each round has malicious clients of its own."""

    model: Model
    input_shape: tuple[int, ...]
    num_classes: int
    pixel_scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_clients: int
    clients_per_round: int
    omniscient: bool
    layout: Layout
    malicious_per_round: int | None = None
    redraw: bool = False


def to_pixels(x: Array, scale: float) -> Float[Array, "..."]:
    """Stored integers as pixels in [0, 1]."""
    return x.astype(jnp.float32) * (1.0 / scale)


def make_task(problem: Problem, pool: Pool) -> Task:
    """The learning task on flat parameters [D]."""
    shapes = jax.eval_shape(problem.model.init, jax.random.key(0))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    flat, unravel = ravel_pytree(zeros)
    mean, std = np.array(problem.mean, np.float32), np.array(problem.std, np.float32)
    model, statistics, observe = problem.model, None, None

    def normalized(x):
        shape = (1,) * (x.ndim - 1) + (-1,)
        return (x - mean.reshape(shape)) / std.reshape(shape)

    def logits(params, x, *, train=False, key=None, mask=None):
        masked = {"mask": mask} if model.pools_batch else {}
        return model.apply(unravel(params), normalized(x), train=train, key=key, **masked)

    def loss(params, x, y, mask, *, train=False, key=None):
        log_probs = jax.nn.log_softmax(logits(params, x, train=train, key=key, mask=mask))
        # A product with the one-hot label: its gradient needs no scatter. The mask is of examples,
        # however many labels [B, ...] each has.
        labels = jax.nn.one_hot(y, problem.num_classes)
        chosen = labels * mask.reshape(-1, *[1] * (labels.ndim - 1))
        count = mask.sum() * math.prod(y.shape[1:])
        return -jnp.sum(chosen * log_probs) / jnp.maximum(count, 1)

    def example(index):
        return to_pixels(pool.x[index], problem.pixel_scale), pool.y[index]

    if model.observe is not None:
        marked = jax.tree.map(jnp.zeros_like, zeros)
        marked["batch_stats"] = jax.tree.map(jnp.ones_like, zeros["batch_stats"])
        statistics = ravel_pytree(marked)[0] > 0

        def observe(params, x, mask):
            return ravel_pytree(model.observe(unravel(params), normalized(x), mask))[0]

    classes = problem.num_classes
    return Task(logits, loss, example, unravel, flat.size, classes, statistics, observe)


def init_state(
    problem: Problem, task: Task, components: Components, params: Float[Array, "D"]
) -> RoundState:
    """The state before round 0, with these initial parameters; schedules at their first value."""
    components = schema.resolve(components, 0)
    client = ()
    if components.client.keeps_state:
        one = components.client.init(task.dim)
        client = jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf, (problem.num_clients, *jnp.shape(leaf))), one
        )
    return RoundState(
        params=params,
        server=components.server.transformation().init(params),
        client=client,
        attack=components.attack.init(problem.num_clients, task.dim),
        defense=components.defense.init(problem.num_clients, task.dim),
    )


def train_clients(
    problem: Problem,
    task: Task,
    pool: Pool,
    replica: Replica,
    params: Float[Array, "D"],
    local_states: State,
    ids: Int[Array, "K"],
    index: Array,
) -> tuple[Float[Array, "K D"], State, Metrics]:
    """Local training of the clients `ids` from the same parameters, laid out as `problem` says.

    Returns their updates, their new states and their metrics, each with a leading axis K.
    """
    components, population = schema.resolve(replica.components, index), replica.population
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
        at = defense.init(num_clients, updates.shape[1]) if state is None else state
        root = view.root
        if guess is not None:
            root = ServerData(lambda: guess, _unseen if root is None else root.loss)
        return defense.apply(key, updates, at, view._replace(root=root))[0]

    return defend, None if view.root is None else view.root.update


def draw_clients(
    problem: Problem, population: Population, key: PRNGKeyArray, attacked: Array
) -> Int[Array, "K"]:
    """The clients of a round: K of those who hold examples, without replacement, or all N.

    Where `problem` fixes the number of malicious ones, an attacked round has exactly so many.
    """
    clients, per_round = problem.num_clients, problem.clients_per_round
    if per_round == clients:
        return jnp.arange(clients)
    ids = jax.random.choice(key, clients, (per_round,), replace=False)
    chance, place = jax.random.uniform(jax.random.fold_in(key, 1), (2, clients))
    if (empty := population.empty) is not None:
        chance = jnp.where(empty, 1.0 + chance, chance)  # they come last, whatever they draw
        ids = jnp.where(jnp.any(empty), jnp.argsort(chance)[:per_round], ids)
    if (number := problem.malicious_per_round) is not None:
        bad = _ranks(jnp.where(population.malicious, chance, 3.0)) < number
        good = _ranks(jnp.where(population.malicious, 3.0, chance)) < per_round - number
        fixed = jnp.argsort(jnp.where(bad | good, place, 2.0))[:per_round]
        ids = jnp.where(attacked, fixed, ids)
    return ids


def _ranks(values):
    """Each value's place in ascending order."""
    return jnp.argsort(jnp.argsort(values))


def _unseen(params):
    raise schema.ConfigError(
        "attack: the defence evaluates clients on the server's own examples, and this adversary "
        "does not see the loss on the server's examples; only one with knowledge 'omniscient' does."
    )


def known_weights(
    counts: Int[Array, "K"], malicious: Bool[Array, "K"], visible: Bool[Array, "K"]
) -> Float[Array, "K"]:
    """`weights` of the adversary's view: for those that it does not see the mean of its own.

    >>> bad = jnp.array([True, False])
    >>> print(known_weights(jnp.array([3, 9]), bad, visible=bad))
    [3. 3.]
    """
    weights = counts.astype(jnp.float32)
    mean = jnp.sum(jnp.where(malicious, weights, 0.0)) / jnp.maximum(malicious.sum(), 1)
    return jnp.where(visible, weights, mean)


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
    replica = replica._replace(components=schema.resolve(replica.components, index))
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
    if schema.needing(stages, "needs_root") and server_view.root is not None:
        server_view.root.update()  # once, and not within a loop of an attack's
    defense_key = stream(key, Stream.DEFENSE)
    attacker = AttackerView(
        malicious, visible, state.params, ids, index, task, sample,
        *known_defense(
            components.defense, defense_key, server_view,
            state.defense if problem.omniscient else None, clients,
        ),
        ranks=(jnp.cumsum(population.malicious) - 1)[ids],
        weights=known_weights(jnp.where(present, counts, 0), malicious, visible),
        server_rate=components.server.rate,
    )  # fmt: skip
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

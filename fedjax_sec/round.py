"""One federated round as a pure function: the only place where the stages meet."""
# ruff: noqa: F821

import enum
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from fedjax_sec import schema
from fedjax_sec.ops.client_axis import Layout, map_clients
from fedjax_sec.ops.moments import finite_rows, row_norms
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
    out, else of the test set; None where nobody has any. `start` is the round in which the attack
    begins; None where that is the first.
    """

    index: Int[Array, "N M"]
    counts: Int[Array, "N"]
    malicious: Bool[Array, "N"]
    root: Int[Array, "S"] | None = None
    local: Int[Array, "N Mt"] | None = None
    start: Int[Array, ""] | None = None


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
    clients are trained."""

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
        # A product with the one-hot label: its gradient needs no scatter.
        chosen = jax.nn.one_hot(y, problem.num_classes) * mask[:, None]
        return -jnp.sum(chosen * log_probs) / jnp.maximum(mask.sum(), 1)

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
    ranks = jnp.cumsum(population.malicious) - 1  # among the malicious clients

    def train_client(client_id, local_state):
        row, is_malicious = population.index[client_id], population.malicious[client_id]
        count, capacity = population.counts[client_id], population.index.shape[1]
        held, copied = count, None
        if poisons:
            own = jax.random.fold_in(poison_key, client_id)
            chosen = components.attack.choose(own, pool.y[row], jnp.arange(capacity) < count)
            if components.attack.adds_copies:  # they follow the client's own examples
                mask = components.attack.copied(chosen)
                copied = jnp.argsort(~mask, stable=True)
                count = count + jnp.where(is_malicious, mask.sum(), 0)

        def fetch(position):
            is_copy = position >= held
            if copied is not None:
                position = jnp.where(is_copy, copied[jnp.maximum(position - held, 0)], position)
            example = row[position]
            x, y = to_pixels(pool.x[example], problem.pixel_scale), pool.y[example]
            if poisons:
                px, py = components.attack.poison(
                    own, x, y, position, chosen, ranks[client_id], task, is_copy
                )
                x, y = jnp.where(is_malicious, px, x), jnp.where(is_malicious, py, y)
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
        root = view.root if guess is None else ServerData(lambda: guess, None)
        return defense.apply(key, updates, at, view._replace(root=root))[0]

    return defend, None if view.root is None else view.root.update


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
    begun = None
    if (start := replica.population.start) is not None:
        begun = index >= start
        malicious = replica.population.malicious & begun
        replica = replica._replace(population=replica.population._replace(malicious=malicious))
    components, population = replica.components, replica.population
    clients, per_round = problem.num_clients, problem.clients_per_round
    key = jax.random.fold_in(replica.key, index)

    ids = jnp.arange(clients)
    if per_round < clients:
        ids = jax.random.choice(stream(key, Stream.SAMPLE), clients, (per_round,), replace=False)
    malicious = population.malicious[ids]
    counts = population.counts[ids]

    local_states = jax.tree.map(lambda leaf: leaf[ids], state.client)
    updates, local_states, client_metrics = train_clients(
        problem, task, pool, replica, state.params, local_states, ids, index
    )
    client_state = jax.tree.map(lambda old, new: old.at[ids].set(new), state.client, local_states)

    # The adversary.
    visible = jnp.ones_like(malicious) if problem.omniscient else malicious

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
        valid=jnp.ones_like(malicious),
        round=index,
        with_kept=False,
        root=server_data(problem, task, pool, replica, state.params, index),
    )
    stages = (*components.attack.stages, *components.defense.stages)
    if any(getattr(stage, "needs_root", False) for stage in stages):
        server_view.root.update()  # once, and not within a loop of an attack's
    defense_key = stream(key, Stream.DEFENSE)
    attacker = AttackerView(
        malicious, visible, state.params, ids, index, task, sample,
        *known_defense(
            components.defense, defense_key, server_view,
            state.defense if problem.omniscient else None, clients,
        ),
        weights=known_weights(counts, malicious, visible),
        server_rate=components.server.rate,
    )  # fmt: skip
    sent, attack_state, attack_metrics = components.attack.apply(
        stream(key, Stream.ATTACK), updates, state.attack, attacker
    )
    if begun is not None:  # so far nobody was malicious: nothing to remember, nothing to report
        keep = functools.partial(jnp.where, begun)
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

    metrics = {"train_loss": _mean_over(client_metrics["train_loss"], ~malicious)}
    metrics["aggregate_norm"] = jnp.linalg.norm(aggregate)
    metrics["excluded"] = defense_metrics["excluded"]
    if diagnose is not None:

        def explain():
            view = server_view._replace(with_kept=True)
            _, _, explained = components.defense.apply(defense_key, sent, state.defense, view)
            return _diagnostics(updates, sent, malicious, attack_metrics, explained)

        nothing = jax.tree.map(lambda m: jnp.zeros(m.shape, m.dtype), jax.eval_shape(explain))
        metrics |= jax.lax.cond(diagnose, explain, lambda: nothing)
    if measure is not None:
        measured, found = measure(
            state.measured, state.params, params, defense_metrics.get("flipped")
        )
        new_state, metrics = new_state._replace(measured=measured), metrics | found
    return new_state, metrics


def _diagnostics(honest, sent, malicious, attack_metrics, defense_metrics) -> Metrics:
    """What a reader needs to see why a defence held or failed."""
    kept, norms = defense_metrics["kept"], row_norms(sent)
    metrics = {
        "update_norm": norms,
        "kept": kept,
        "update_norm_honest": _mean_over(norms, ~malicious),
        "update_norm_malicious": _mean_over(norms, malicious),
        "kept_honest": _mean_over(kept, ~malicious),
        "kept_malicious": _mean_over(kept, malicious),
    }
    if sent is not honest:
        metrics["attack_shift"] = _mean_over(row_norms(sent - honest), malicious)
    for extra in (attack_metrics, defense_metrics):
        metrics |= {name: v for name, v in extra.items() if "/" in name and jnp.ndim(v) == 0}
    return metrics


def _mean_over(values, mask):
    """Mean over the clients of `mask`; NaN (null in the results) when there are none."""
    return jnp.sum(jnp.where(mask, values, 0.0)) / mask.sum()

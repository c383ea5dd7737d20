"""The round's data: populations, components, replicas, and the state between rounds."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from fedjax_sec import core
from fedjax_sec.core import Setting
from fedjax_sec.core.random import Stream, stream
from fedjax_sec.core.types import BoundTask, InputSpec, LocalData, Message, Model, Space, State
from fedjax_sec.ops.client_axis import Layout


class Pool(NamedTuple):
    """Arrays that lie on the device once, shared by all replicas and clients.

    The training examples of all clients as stored, the model's frozen leaves, and the examples
    that attacks on data bring along, in the order of `Problem.auxiliary`.
    """

    x: Array
    y: Int[Array, " T *shape"]
    frozen: Any = ()
    auxiliary: tuple = ()


class Population(NamedTuple):
    """The clients' examples and the malicious ones. `index` pads each client's row to M with zeros.

    `root` are the server's own examples, which no client holds; None where it has none. `local`
    are the clients' own test examples, padded with -1: of the training set where they were held
    out, else of the test set; None where nobody has any. `start` and `every`: the attack takes
    place in the rounds `start`, `start + every`, ...; None where it does in all rounds. `dropout`
    is the probability that a client of the round sends nothing; None where all do. `empty` are
    the clients without examples, which never take part; None where there are none.
    """

    index: Int[Array, "N M"]
    counts: Int[Array, " N"]
    malicious: Bool[Array, " N"]
    root: Int[Array, " S"] | None = None
    local: Int[Array, "N Mt"] | None = None
    start: Int[Array, ""] | None = None
    every: Int[Array, ""] | None = None
    dropout: Float[Array, ""] | None = None
    empty: Bool[Array, " N"] | None = None


class Components(NamedTuple):
    """The experiment's components. A pytree: numeric fields are leaves, so they can be stacked.

    `algorithm` holds the clients' training and the server's optimizer. `trainer` is how the server
    trains on its root data set: a client, or None without one. `backdoor` is the attack on data
    whose success is measured where that is not the attack's own.
    """

    algorithm: Any
    attack: Any
    defense: Any
    task: Any
    trainer: Any = None
    monitors: tuple = ()
    backdoor: Any = None


class Replica(NamedTuple):
    """One run of an experiment: a seed's key and population, and the components' values.

    `probes` holds, for each monitor, the test examples that it looks at, by position and padded
    with -1; None where it looks at none.
    """

    key: PRNGKeyArray
    components: Components
    population: Population
    probes: tuple = ()


class RoundState(NamedTuple):
    """Everything that a round hands to the next: the server's state, the clients' (stacked over all
    N, or empty), the adversary's, the defence's, and the monitors'."""

    server: State
    client: State
    attack: State
    defense: State
    monitors: tuple = ()


class Problem(NamedTuple):
    """The static part of one compiled program, the same for all its replicas.

    `layout` is how the round's clients are trained. `malicious_per_round` malicious clients are in
    every attacked round (None: as many as chance draws); `redraw`: each round has malicious clients
    of its own. `setting` is what components were checked against. `auxiliary` says of which data
    set, and of which class of it (None: all), each of the pool's `auxiliary` is.
    """

    model: Model
    space: Space
    inputs: InputSpec
    num_classes: int
    num_clients: int
    clients_per_round: int
    omniscient: bool
    layout: Layout
    malicious_per_round: int | None = None
    redraw: bool = False
    setting: Setting | None = None
    auxiliary: tuple = ()


def make_task(problem: Problem, pool: Pool, task: Any) -> BoundTask:
    """The learning task on flat parameters [D]: the component `task` on the problem's model."""
    model, space, inputs = problem.model, problem.space, problem.inputs

    def outputs(params, x, *, train=False, key=None, mask=None):
        masked = {"mask": mask} if model.pools_batch else {}
        variables = space.join(params, pool.frozen)
        return model.apply(variables, inputs.normalize(x), train=train, key=key, **masked)

    def outputs_and_observed(params, x, mask, key):
        if model.observe is None:
            return outputs(params, x, train=True, key=key, mask=mask), params[space.observed]
        variables = space.join(params, pool.frozen)
        out, moved = model.observe(variables, inputs.normalize(x), mask, key)
        return out, space.split(moved)[0][space.observed]

    def example(index):
        return inputs.decode(pool.x[index][None])[0], pool.y[index]

    def run(part, params, h):
        return model.parts[part](space.join(params, pool.frozen), h)

    def auxiliary(dataset, label=None):
        for known, examples in zip(problem.auxiliary, pool.auxiliary, strict=True):
            if known == (dataset, label):
                return examples
        raise core.ConfigError(
            f"attack: the examples of {dataset.registered_name!r} (class {label}) are not on the "
            f"device; an attack on data names them in `auxiliary`."
        )

    return BoundTask(
        task=task,
        outputs=outputs,
        outputs_and_observed=outputs_and_observed,
        losses=task.losses,
        space=space,
        inputs=inputs,
        num_classes=problem.num_classes,
        example=example,
        run=run,
        head=model.head,
        frozen=pool.frozen,
        auxiliary=auxiliary,
        # Side by side, all first steps share the server's weights: one matrix product over all
        # clients' batches. A deep network would take too long to compile twice.
        first_step_apart=problem.layout.at_once > 1 and not model.deep,
    )


def backdoor_of(components: Components, state: Any, setting, task: BoundTask) -> tuple | None:
    """(the backdoor whose success is measured, its state by now); None without one."""
    given = components.backdoor
    if given is not None:
        return given, given.init(setting, task)
    if components.attack.backdoor is None:
        return None
    return components.attack.backdoor, components.attack.memory(state)(components.attack.backdoor)


def setting_of(problem: Problem) -> Setting:
    """The setting that components were checked against, or the little that the problem says."""
    if problem.setting is not None:
        return problem.setting
    return Setting(
        problem.clients_per_round, sampled=_samples(problem), registered=problem.num_clients
    )


def _samples(problem: Problem) -> bool:
    return problem.clients_per_round < problem.num_clients


def init_state(
    problem: Problem,
    task: BoundTask,
    components: Components,
    params: Float[Array, " D"],
    key: PRNGKeyArray,
) -> RoundState:
    """The state before round 0, with these initial parameters; schedules at their first value."""
    components = core.resolve(components, 0)
    algorithm, setting = components.algorithm, setting_of(problem)
    server = algorithm.init(stream(key, Stream.ALGORITHM), params, setting, task)
    one = algorithm.init_client(params, setting, task)
    client = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (problem.num_clients, *jnp.shape(leaf))), one
    )
    download = algorithm.download(server, jnp.int32(0))
    message = message_shapes(problem, task, components, download, one)
    clients, dim = problem.num_clients, message.vector.shape[0]
    return RoundState(
        server=server,
        client=client,
        attack=components.attack.init(clients, dim, setting, task),
        defense=components.defense.init(clients, dim, task.space),
        monitors=tuple(m.init(setting, task, message) for m in components.monitors),
    )


def message_shapes(
    problem, task: BoundTask, components: Components, download, client_state
) -> Message:
    """The shapes of one client's message: the algorithm's word, or what its training returns."""
    given = components.algorithm.message(setting_of(problem), task)
    if given is not None:
        return given
    spec = task.inputs
    dtype = jnp.int32 if spec.kind == "tokens" else jnp.float32

    def train(key, download, client_state):
        def fetch(position):
            count = position.shape[0]
            x, y = jnp.zeros((1, *spec.shape), dtype), task.example(0)[1][None]
            return jnp.repeat(x, count, axis=0), jnp.repeat(y, count, axis=0)

        capacity = setting_of(problem).capacity or 1
        data = LocalData(jnp.int32(1), capacity, jnp.int32(0), fetch, jnp.float32(1))
        return components.algorithm.train(key, download, client_state, data, task)[0]

    return jax.eval_shape(functools.partial(train, jax.random.key(0)), download, client_state)

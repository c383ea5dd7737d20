"""Tiny worlds, one for each kind of input: data, a network, a task, and a round of four clients."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sec.core import (
    Algorithm,
    Auxiliary,
    BoundTask,
    ConfigError,
    InputSpec,
    LocalData,
    Message,
    Model,
    Setting,
    check_components,
    registry,
    walk,
)
from fedjax_sec.core.components import INPUTS
from fedjax_sec.core.space import make_space
from fedjax_sec.core.types import TestSet
from fedjax_sec.ops.client_axis import Layout
from fedjax_sec.ops.interception import embed
from fedjax_sec.ops.layers import layer_sizes
from fedjax_sec.round import (
    Components,
    Pool,
    Population,
    Problem,
    Replica,
    RoundState,
    init_state,
    make_task,
    run_round,
)
from fedjax_sec.round.pipeline import Attack, Defense

#: The shape of one image of the tiny task.
SHAPE = (4, 4, 1)
#: The number of classes of the tiny task.
CLASSES = 3
#: The units in the hidden layer of the tiny task's network.
HIDDEN = 5
#: The mean by which the tiny task's pixels are normalised.
MEAN = 0.4
#: The deviation by which the tiny task's pixels are normalised.
STD = 0.5
FEATURES, LENGTH, VOCABULARY = 24, 5, 7
CLIENTS, CAPACITY = 4, 9


@functools.cache
def tiny_pool(count: int = 40, kind: str = "pixels") -> Pool:
    """`count` random examples as stored, and their targets.

    Images of 4 x 4 pixels (0 to 255) and vectors of 24 features in 3 classes; sequences of 5 of 7
    tokens, whose targets are the next tokens, -1 at some ends.
    """
    rng = np.random.default_rng(0)
    if kind == "tokens":
        tokens = rng.integers(0, VOCABULARY, (count, LENGTH + 1)).astype(np.int32)
        x, y = tokens[:, :-1], tokens[:, 1:].copy()
        y[::5, -1] = -1
    elif kind == "features":
        x = rng.normal(size=(count, FEATURES)).astype(np.float32)
        y = rng.integers(0, CLASSES, count).astype(np.int32)
    else:
        x = rng.integers(0, 256, (count, *SHAPE), np.uint8)
        y = rng.integers(0, CLASSES, count).astype(np.int32)
    with jax.ensure_compile_time_eval():  # the first call may come from within a trace
        return Pool(jnp.asarray(x), jnp.asarray(y))


def tiny_auxiliary(kind: str):
    """`BoundTask.auxiliary` of a tiny world: for any data set the pool's last examples."""

    def auxiliary(dataset, label=None):
        pool = tiny_pool(kind=kind)
        return Auxiliary(pool.x[-6:], pool.y[-6:], pool.x[-9:-6], pool.y[-9:-6])

    return auxiliary


def inputs_of(kind: str) -> InputSpec:
    """The `InputSpec` of a tiny world."""
    if kind == "tokens":
        return InputSpec("tokens", (LENGTH,))
    if kind == "features":
        return InputSpec("features", (FEATURES,))
    return InputSpec("pixels", SHAPE, 255.0, (MEAN,), (STD,))


def _next_token(vocabulary: int, width: int = 5) -> Model:
    """A network on tokens: the mean of the embeddings so far, and a linear layer."""

    def init(key):
        first, second = jax.random.split(key)
        return {
            "params": {
                "embedding": {"embedding": 0.5 * jax.random.normal(first, (vocabulary, width))},
                "output": {
                    "kernel": 0.5 * jax.random.normal(second, (width, vocabulary)),
                    "bias": jnp.zeros(vocabulary),
                },
            }
        }

    def apply(variables, x, *, train=False, key=None):
        layers = variables["params"]
        embedded = embed(layers["embedding"]["embedding"], x)
        seen = jnp.cumsum(jnp.tanh(embedded), axis=1)
        mean = seen / jnp.arange(1.0, x.shape[1] + 1)[None, :, None]
        output = layers["output"]
        return mean @ output["kernel"] + output["bias"][None, None]

    return Model(init, apply, head="params/output")


class World(NamedTuple):
    """One kind of input: what is fixed of a round, the data, and the task on both."""

    kind: str
    problem: Problem
    pool: Pool
    task: BoundTask
    setting: Setting

    @property
    def classes(self) -> int:
        """The number of classes, or of tokens."""
        return self.problem.num_classes

    def sample(self, key, num: int):
        """Draws examples and targets, as `AttackerView.sample` does."""
        rows = jax.random.randint(key, (num,), 0, self.pool.y.shape[0])
        return self.task.inputs.decode(self.pool.x[rows]), self.pool.y[rows]

    def params(self, scale: float = 0.2):
        """Some parameters [D]."""
        return scale * jax.random.normal(jax.random.key(7), (self.task.dim,))

    def local_data(self, count, row=None, capacity: int = CAPACITY, index: int = 0) -> LocalData:
        """A client that holds the first `count` of the positions `row` of the pool."""
        row = jnp.arange(capacity) if row is None else jnp.asarray(row)

        def fetch(position):
            example = row[position]
            return self.task.inputs.decode(self.pool.x[example]), self.pool.y[example]

        count = jnp.asarray(count)
        reported = count.astype(jnp.float32)
        return LocalData(count, capacity, jnp.asarray(index), fetch, reported)


@functools.cache
def world(kind: str = "pixels", linear: bool = False) -> World:
    """The tiny world of a kind of input, made as an experiment makes its task.

    With a perceptron on what has labels, or a `linear` model.
    """
    pool, inputs = tiny_pool(kind=kind), inputs_of(kind)
    labelled = kind != "tokens"
    if labelled:
        spec = "logistic_regression" if linear else {"name": "mlp", "hidden": [HIDDEN]}
        model, classes = registry.models.build(spec).make(inputs.shape, CLASSES), CLASSES
    else:
        model, classes = _next_token(VOCABULARY), VOCABULARY
    space = make_space(model)
    setting = Setting(
        CLIENTS,
        2,
        capacity=CAPACITY,
        example_shape=inputs.shape,
        num_classes=classes,
        layers=tuple(layer_sizes(jax.eval_shape(model.init, jax.random.key(0)))),
        num_parameters=space.dim,
        examples=pool.y.shape[0],
        inputs=kind,
        labelled=labelled,
        registered=CLIENTS,
    )
    problem = Problem(
        model=model,
        space=space,
        inputs=inputs,
        num_classes=classes,
        num_clients=CLIENTS,
        clients_per_round=CLIENTS,
        omniscient=False,
        layout=Layout(CLIENTS),
        setting=setting,
    )
    task = registry.tasks.build("classification" if labelled else "language_model")
    bound = make_task(problem, pool, task)._replace(auxiliary=tiny_auxiliary(kind))
    return World(kind, problem, pool, bound, setting)


def tiny_task(kind: str = "pixels") -> BoundTask:
    """The task of a tiny world: on pixels, a perceptron 16-5-3."""
    return world(kind).task


def sample(key, num: int, kind: str = "pixels"):
    """Draws examples and targets of a tiny world."""
    return world(kind).sample(key, num)


def kinds_of(part) -> list[str]:
    """The kinds of inputs on which a component and all that is nested in it work.

    >>> kinds_of(registry.attacks.build("pattern"))
    ['pixels']
    """
    parts = [one for _, one, _ in walk(part)]
    labels = any(one.needs_labels for one in parts)
    kinds = [kind for kind in sorted(INPUTS) if all(kind in one.inputs for one in parts)]
    return [kind for kind in kinds if world(kind).setting.labelled or not labels]


def accepted(part, setting: Setting) -> bool:
    """Whether the checks of the component, and of what is nested in it, accept a setting."""
    try:
        check_components((part,), "part", setting)
    except ConfigError:
        return False
    return True


# --- A round ------------------------------------------------------------------------------------


def plain_client(**changes):
    """Two steps of SGD on batches of four."""
    return registry.clients.build({"name": "sgd", "batch_size": 4, "steps": 2} | changes)


def complete(algorithm: Algorithm) -> Algorithm:
    """The algorithm with a client and a server's optimizer in its `given` fields."""
    server = registry.BUILDERS["optimizer"]({"name": "sgd", "learning_rate": 1.0}, "optimizer")
    given = {"client": plain_client(), "optimizer": server}
    names = {field.name for field in dataclasses.fields(algorithm)}
    return dataclasses.replace(algorithm, **{n: v for n, v in given.items() if n in names})


def backdoor_of(kind: str):
    """An attack on data for a tiny world; None where an example has no class."""
    names = {"pixels": {"name": "pattern", "size": 2}, "features": "feature_trigger"}
    return registry.attacks.build(names[kind]) if kind in names else None


class Rounds(NamedTuple):
    """Rounds of a tiny world, to be run with `run_rounds`."""

    world: World
    replica: Replica
    state: RoundState
    test: TestSet


def make_rounds(place: World, algorithm=None, monitors: tuple = (), task: Any = None) -> Rounds:
    """Four clients, of whom the second one flips signs and, where there are classes, poisons."""
    backdoor = backdoor_of(place.kind)
    attack = [registry.attacks.build("sign_flip")]
    attack = ([] if backdoor is None else [backdoor]) + attack
    components = Components(
        complete(registry.algorithms.build("fedavg") if algorithm is None else algorithm),
        Attack.build(attack),
        Defense.build("mean"),
        place.task.task,
        None,
        monitors,
    )
    index = jnp.asarray(np.arange(CLIENTS * CAPACITY).reshape(CLIENTS, CAPACITY), jnp.int32)
    counts = jnp.asarray([9, 7, 8, 4], jnp.int32)
    malicious = jnp.arange(CLIENTS) == 1
    test = TestSet(place.pool.x[20:], place.pool.y[20:])
    probes = []
    for monitor in monitors:
        memory = () if backdoor is None else backdoor.init(place.setting, place.task)
        at = monitor.positions(place.task, test, backdoor, memory)
        probes.append(None if at is None else jnp.asarray(at, jnp.int32))
    population = Population(index, counts, malicious)
    replica = Replica(jax.random.key(3), components, population, tuple(probes))
    state = init_state(place.problem, place.task, components, place.params(), jax.random.key(4))
    return Rounds(place, replica, state, test)


def run_rounds(rounds: Rounds, count: int = 2) -> tuple[RoundState, list]:
    """The state after so many rounds, and the metrics of each; compiled once."""
    place = rounds.world

    def one(state, replica, pool, test, index):
        task = make_task(place.problem, pool, replica.components.task)
        return run_round(place.problem, task, pool, replica, state, index, True, test)

    step, state, history = jax.jit(one), rounds.state, []
    for index in range(count):
        args = rounds.replica, place.pool, rounds.test, jnp.int32(index)
        state, metrics = step(state, *args)
        history.append(metrics)
    return state, history


@functools.cache
def plain_rounds(kind: str, linear: bool = False) -> tuple[RoundState, list]:
    """Two rounds of a tiny world at which nobody looks."""
    return run_rounds(make_rounds(world(kind, linear)))


def message_of(place: World) -> Message:
    """The message of a tiny world's client after one local step, with a rate of 0.1."""
    client = plain_client(steps=1)
    params = place.params()
    state = client.init(place.task.dim)
    done = client.apply(jax.random.key(1), params, state, place.local_data(4), place.task)
    return Message(done.delta, jnp.float32(4))

"""The round's data: populations, components, replicas, and the state between rounds."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from fedjax_sec import core
from fedjax_sec.core.types import (
    Model,
    State,
    Task,
    to_pixels,
)
from fedjax_sec.ops.client_axis import Layout


class Pool(NamedTuple):
    """The training examples of all clients, on the device once and shared by all replicas."""

    x: UInt8[Array, " T *shape"]
    y: Int[Array, " T"]


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
    probes: Int[Array, " P"] | None = None


class RoundState(NamedTuple):
    """Everything that a round hands to the next. `client` is stacked over all N, or empty.

    `measured` is what a measurement adds up over the rounds, empty where there is none.
    """

    params: Float[Array, " D"]
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
    problem: Problem, task: Task, components: Components, params: Float[Array, " D"]
) -> RoundState:
    """The state before round 0, with these initial parameters; schedules at their first value."""
    components = core.resolve(components, 0)
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

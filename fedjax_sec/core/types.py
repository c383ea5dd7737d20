"""The types that the round hands to components: views, messages, inputs, the space of parameters.

Symbols, here and everywhere: `N` registered clients, `K` clients in a round, `M` examples of a
client after padding, `B` batch size, `D = S + T` parameters of a vector: `S` observed (running
statistics), which come first, and `T` trained ones. Imports nothing of this package.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

#: A pytree of arrays whose structure, shapes and dtypes never change.
State = Any
#: The same keys every round.
Metrics = dict[str, jax.Array]
#: Local parameters minus global parameters, raveled.
Updates = Float[Array, "K D"]


# --- Models and inputs ----------------------------------------------------------------------------


class Model(NamedTuple):
    """A network as two pure functions.

    `init(key) -> variables`; `apply(variables, x [B, ...], *, train, key) -> outputs`, logits
    [B, C] of a classifier. `convolves`: whether most of its work is convolutions, which decides how
    clients are trained. `pools_batch`: a batch's examples change each other's outputs, so `apply`
    takes `mask [B]` too (None: all count). `deep`: compiling it takes long, so that programs hold
    its training step once rather than twice.

    `observe(variables, x, mask, key) -> (outputs, variables)`, where the network keeps running
    statistics in the collection `batch_stats` (else None), is a training step's forward pass and
    moves them. `trainable(name)` says which variables are trained, such as `params/output/kernel`;
    all others but the statistics are frozen: they belong to the program's arguments and to no
    client. `init_frozen() -> variables` gives their values (None: `init` of a fixed key). `parts`
    are pieces that can be run alone, `name -> (variables, h) -> outputs`; `head` is the name of the
    last layer, such as `params/output`.
    """

    init: Callable
    apply: Callable
    convolves: bool = False
    pools_batch: bool = False
    observe: Callable | None = None
    trainable: Callable = lambda name: True
    init_frozen: Callable | None = None
    parts: Mapping[str, Callable] = {}
    head: str = ""
    deep: bool = False


class InputSpec(NamedTuple):
    """One input's kind (`pixels`, `features`, `tokens`), its shape, and how it is stored.

    `decode(stored)` gives what components see: pixels in [0, 1], features in the data set's units
    divided by `scale`, tokens as they are. `normalize` is applied inside, at the model's entry.
    """

    kind: str
    shape: tuple[int, ...]
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    @property
    def low(self) -> float:
        """The smallest value of an input."""
        return 0.0 if self.kind == "pixels" else -np.inf

    @property
    def high(self) -> float:
        """The largest value of an input."""
        return 1.0 if self.kind == "pixels" else np.inf

    def decode(self, stored: Any) -> Array:
        """Stored examples [B, ...] as components see them.

        >>> print(InputSpec("pixels", (2,), 255.0).decode(jnp.array([[0, 255]], jnp.uint8)))
        [[0. 1.]]
        """
        if self.kind == "tokens":
            return jnp.asarray(stored).astype(jnp.int32)
        return jnp.asarray(stored).astype(jnp.float32) * (1.0 / self.scale)

    def normalize(self, x: Any) -> Any:
        """Inputs [B, ...] as the model takes them."""
        if self.kind == "tokens":
            return x
        shape = (1,) * (x.ndim - 1) + (-1,)
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        return (x - mean.reshape(shape)) / std.reshape(shape)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Space:
    """How a model's variables are split: a vector [D] = observed | trained, and frozen leaves.

    `slices` maps a variable's name, such as `params/output/kernel`, to its place in the vector, in
    the vector's order, `shapes` to its shape; `last` is the name of the last layer's kernel.
    `join(vector, frozen) -> variables`, `split(variables) -> (vector, frozen)`.

    In a view it is part of the structure, not a leaf, and it equals itself alone.
    """

    dim: int
    observed: slice
    trained: slice
    slices: Mapping[str, slice]
    join: Callable
    split: Callable
    last: str
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    def group(self, prefix: str) -> slice:
        """The place of all variables below a name, such as `params/output`."""
        ours = [s for name, s in self.slices.items() if f"{name}/".startswith(f"{prefix}/")]
        return slice(min(s.start for s in ours), max(s.stop for s in ours))


class Auxiliary(NamedTuple):
    """Examples that the adversary holds beside the training set, as stored, and their true labels.

    They are of a data set that an attack on data names in `auxiliary`.
    """

    x_train: Array
    y_train: Int[Array, " A"]
    x_test: Array
    y_test: Int[Array, " P"]


def _no_auxiliary(dataset, label=None):
    raise LookupError(f"the data set {dataset.registered_name!r} is not on the device")


class BoundTask(NamedTuple):
    """The task on flat parameters, shared by clients, adversary, server and evaluation.

    `outputs(params [D], x [B, ...], *, train=False, key=None, mask=None)` are the model's outputs
    for inputs as `inputs.decode` gives them. `outputs_and_observed(params, x, mask, key)` is the
    forward pass of a training step: the outputs and the statistics [S] as that step moves them.
    `losses(outputs, y) -> (total [B], units [B])` are the task's, which an algorithm may replace.
    `example(i) -> (x, y)` is training example `i` of the source's own order. `run(part, params, h)`
    runs a piece of the model alone. `frozen` are the model's frozen leaves.
    `auxiliary(dataset, label) -> Auxiliary` are the examples that an attack on data brings along.
    `first_step_apart` says that a client's first local step is worth compiling by itself.
    """

    task: Any
    outputs: Callable
    outputs_and_observed: Callable
    losses: Callable
    space: Space
    inputs: InputSpec
    num_classes: int
    example: Callable
    run: Callable
    head: str = ""
    frozen: Any = ()
    auxiliary: Callable = _no_auxiliary
    first_step_apart: bool = False

    @property
    def dim(self) -> int:
        """D."""
        return self.space.dim

    def unravel(self, params: Float[Array, " D"]) -> Any:
        """Flat parameters as the model's own tree."""
        return self.space.join(params, self.frozen)

    def mean_loss(self, outputs, y, mask: Bool[Array, " B"]) -> Float[Array, ""]:
        """sum(total) / sum(units) over the masked examples."""
        total, units = self.losses(outputs, y)
        count = jnp.sum(jnp.where(mask, units, 0.0))
        return jnp.sum(jnp.where(mask, total, 0.0)) / jnp.maximum(count, 1)

    def loss(self, params, x, y, mask, *, train: bool = False, key=None) -> Float[Array, ""]:
        """The mean loss of parameters [D] over the masked examples of a batch."""
        return self.mean_loss(self.outputs(params, x, train=train, key=key, mask=mask), y, mask)

    def loss_and_observed(self, params, x, y, mask, *, key=None) -> tuple[Any, Any]:
        """(the training loss, the statistics [S] as the step moves them), one forward pass."""
        outputs, observed = self.outputs_and_observed(params, x, mask, key)
        return self.mean_loss(outputs, y, mask), jax.lax.stop_gradient(observed)


class LocalData(NamedTuple):
    """One client's data inside the round.

    `fetch(positions [B]) -> (x [B, ...], y [B])` gathers its examples, `0 <= position < count`,
    decoded, and poisoned where the client is malicious and the attack poisons data. `capacity` is
    M, the same Python integer for every client; `reported` is the number of examples that the
    client tells the server.
    """

    count: Int[Array, ""]
    capacity: int
    round: Int[Array, ""]
    fetch: Callable
    reported: Float[Array, ""] | None = None


# --- Messages and views ---------------------------------------------------------------------------


class Message(NamedTuple):
    """A client's message; stacked over the round's clients, every leaf has a leading axis K.

    Attacks rewrite it, defences combine the vectors. `vector` has the length D of the model unless
    the algorithm says otherwise. `weight` is the number of examples as the client reports it.
    `extra` is what an algorithm sends beside: control variates, step counts, logits, features.
    """

    vector: Float[Array, "*K D"]
    weight: Float[Array, "*K"]
    extra: Any = ()


class ServerData(NamedTuple):
    """The functions of a server with a root data set in a round.

    `update() -> [D]` trains the global model on them as a client would. `loss(params [D])` is the
    mean loss of any parameters on all of them. A function that nobody calls is not computed.
    """

    update: Callable
    loss: Callable


class ClientView(NamedTuple):
    """The knowledge of a stage of a defence in local training.

    The client's `data`, the component `client` that trains it, the `task`, and the parameters [D]
    that the client got.
    """

    task: BoundTask
    data: LocalData
    client: Any
    params: Any = None


class ServerView(NamedTuple):
    """The knowledge of an honest server. The true malicious mask is deliberately absent.

    A stage that merges rows returns `weights`, `valid` and `members` of the new rows; `client_ids`
    stays that of the clients. `space` says where the model's tensors lie in the vector, None where
    that is unknown: `core.tensors` and `core.last_layer` then take the vector for one tensor.
    `rate` is the learning rate of a server that takes plain gradient steps, else None; None outside
    an experiment, too, where it is 1.
    """

    params: Float[Array, " D"]
    weights: Float[Array, " K"]  # example counts as the clients report them
    client_ids: Int[Array, " K"]  # indexes histories of size [N, ...]
    valid: Bool[Array, " K"]  # False: NaN or infinity, nothing was sent, or a stage excluded it
    round: Int[Array, ""]
    root: ServerData | None = None  # only where `server.root` gives the server examples
    members: Float[Array, "rows K"] | None = None  # which clients a row is made of: 0 or 1
    space: Space | None = None
    rate: Float[Array, ""] | None = None

    def included(self) -> Bool[Array, " K"]:
        """The clients of which a valid row holds something."""
        if self.members is None:
            return self.valid
        return (jnp.where(self.valid[:, None], self.members, 0.0)).sum(axis=0) > 0


class AttackerView(NamedTuple):
    """The adversary's knowledge: the threat model itself.

    Rows of the stack outside `visible` are zero when an attack receives it, and its output is
    merged into the rows `malicious` only. A row that holds NaN, infinity or numbers beyond 1e18 is
    never visible, so the adversary is protected as the server is; a malicious client with such a
    row still sends what the attack crafts. `adversary` are all of the adversary's clients, where
    `malicious` are only those that send this attack (None: the same). `sample(key, num) -> (x, y)`
    draws training examples of the visible clients; it and `task` are None outside an experiment.

    `defend(updates [K, D], guess=None) -> [D]` is the server's rule, which the adversary knows. An
    adversary that sees all knows its state, the clients' weights and `server_update() -> [D]`, what
    the server learns from its own examples, too. Otherwise `server_update` is None, and the rule
    starts from its initial state, with equal weights, and takes `guess` for the server's update.

    `weights [K]` are the clients' numbers of examples; of a client that it does not see the mean of
    its own clients' stands for it. `server_rate` is the learning rate of a server that takes plain
    gradient steps, else None. Both are None outside an experiment: equal weights, and a rate of 1.

    `memory(attack) -> state` is the state of an attack on data nested in this one. `space` is as in
    `ServerView`.
    """

    malicious: Bool[Array, " K"]
    visible: Bool[Array, " K"]
    params: Float[Array, " D"]
    client_ids: Int[Array, " K"]
    round: Int[Array, ""]
    task: BoundTask | None = None
    sample: Callable | None = None
    defend: Callable | None = None
    server_update: Callable | None = None
    ranks: Int[Array, " K"] | None = None  # 0 to m - 1 among all malicious clients; None: by row
    adversary: Bool[Array, " K"] | None = None
    weights: Float[Array, " K"] | None = None
    server_rate: Float[Array, ""] | None = None
    memory: Callable = lambda attack: ()
    space: Space | None = None

    @property
    def corrupted(self) -> Bool[Array, " K"]:
        """The updates of the adversary's clients that it can use."""
        return self.visible & (self.malicious if self.adversary is None else self.adversary)

    @property
    def honest(self) -> Bool[Array, " K"]:
        """The updates of all other clients that it can use: none with `corrupted` knowledge."""
        return self.visible & ~(self.malicious if self.adversary is None else self.adversary)


# --- Looking at a round ---------------------------------------------------------------------------


class TestSet(NamedTuple):
    """Held-out examples as stored, and their targets."""

    __test__ = False  # not a test case, whatever pytest thinks of the name

    x: Array
    y: Int[Array, " T *shape"]


class RoundTrace(NamedTuple):
    """All of one round, for monitors. XLA removes the parts that no monitor reads.

    `before` and `after` are the global parameters [D] around the server's step; `honest` the
    messages before the attack, `sent` those after it; `present` the clients that took part;
    `aggregates` the aggregate [D] and what each stage behind the aggregator made of it. `explain()`
    runs the defence again and gives its metrics, with `kept [K]`; `attack` are the attack's
    metrics. `data(k)` is the `LocalData` of the round's client k. `adversary` is (attack, state),
    `backdoor` (attack on data, state) of the backdoor whose success is measured, None without one.
    `sampled`: only some clients take part in a round; `redrawn`: each round has malicious clients
    of its own; `client` is how the clients train.
    `drawn(k, step)` are the positions of the examples in a local step of the round's client k, and
    their mask, as `Client.drawn` gives them.
    `test` are the test examples, and `probes` the positions among them that the monitor asked for.
    """

    round: Int[Array, ""]
    ids: Int[Array, " K"]
    malicious: Bool[Array, " K"]
    present: Bool[Array, " K"]
    before: Float[Array, " D"]
    after: Float[Array, " D"]
    honest: Message
    sent: Message
    aggregates: tuple
    attack: Metrics
    explain: Callable
    data: Callable
    adversary: tuple
    backdoor: tuple | None = None
    sampled: bool = False
    redrawn: bool = False
    client: Any = None
    test: TestSet | None = None
    probes: Int[Array, " P"] | None = None
    drawn: Callable | None = None


class Known(NamedTuple):
    """A server's knowledge of a client's training beside the message: the protocol's numbers.

    `rate` is the learning rate of a client that takes plain gradient steps (None: unknown), `steps`
    their number, `batch` the examples in each, `classes` the number of classes. `examples` are the
    examples behind the message (None: one batch), `labels` their classes where they are known, `l2`
    the factor of the penalty on the parameters. `clients`: the message is the mean of so many
    clients' updates, each of an equal share of the examples. `batch_statistics`: the clients'
    network normalises by the statistics of each batch.
    """

    rate: Float[Array, ""] | None
    steps: int | None
    batch: int
    classes: int
    examples: int | None = None
    labels: Int[Array, " n"] | None = None
    l2: Any = 0.0
    clients: int = 1
    batch_statistics: bool = False

    @property
    def count(self) -> int:
        """n, the examples to reconstruct.

        >>> Known(None, 1, 8, 10).count, Known(None, 5, 8, 10, examples=40).count
        (8, 40)
        """
        return self.clients * self.batch if self.examples is None else self.examples


class Guess(NamedTuple):
    """A reconstruction of n examples: inputs (None: labels alone) and labels, in any order.

    `loss` is what the attack minimised, NaN where it minimises nothing; `trail [S, n, ...]` are its
    inputs on the way, None where there are none.
    """

    x: Float[Array, " n *shape"] | None
    y: Int[Array, " n"]
    loss: Float[Array, ""] | float = float("nan")
    trail: Float[Array, " S n *shape"] | None = None

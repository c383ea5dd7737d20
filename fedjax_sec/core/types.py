"""Core types: aliases, views and protocols. Imports nothing of this package.

Symbols, here and everywhere: `N` registered clients, `K` clients in a round, `M` examples of a
client after padding, `B` batch size, `D` parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

State = Any  # a pytree of arrays whose structure, shapes and dtypes never change
Metrics = dict[str, jax.Array]  # the same keys every round
Updates = Float[Array, "K D"]  # local parameters minus global parameters, raveled


def to_pixels(x: Array, scale: float) -> Float[Array, "..."]:
    """Stored integers as pixels in [0, 1]."""
    return x.astype(jnp.float32) * (1.0 / scale)


class Model(NamedTuple):
    """A network as two pure functions.

    `init(key) -> variables`; `apply(variables, x [B, ...], *, train, key) -> logits [B, C]`.
    `convolves`: whether most of its work is convolutions, which decides how clients are trained.
    `pools_batch`: a batch's examples change each other's logits, so `apply` takes `mask [B]` too
    (None: all count). `observe(variables, x, mask) -> variables`, where the network keeps running
    statistics in the collection `batch_stats` (else None), moves them as a training step does.
    """

    init: Callable
    apply: Callable
    convolves: bool = False
    pools_batch: bool = False
    observe: Callable | None = None


class Task(NamedTuple):
    """What is learned, on flat parameters: shared by clients, adversary and evaluation.

    `logits(params [D], x [B, ...], train=False, key=None) -> [B, C]` takes images in pixel units
    in [0, 1]; the data set's normalisation is applied inside, at the model's entry.
    `loss(params, x, y [B], mask [B], train=False, key=None)` is the mean cross-entropy over the
    masked examples. `example(i) -> (x, y)` is training example `i` of the source's own order.
    `statistics [D]` tells which parameters are running statistics, which no gradient moves but
    `observe(params, x, mask) -> params`; both are None in most networks.
    """

    logits: Callable
    loss: Callable
    example: Callable
    unravel: Callable
    dim: int
    num_classes: int
    statistics: Bool[Array, " D"] | None = None
    observe: Callable | None = None


class ServerData(NamedTuple):
    """What a server with examples of its own, its root data set, can compute in a round.

    `update() -> [D]` trains the global model on them as a client would. `loss(params [D])` is the
    mean cross-entropy of any parameters on all of them. What nobody calls is not computed.
    """

    update: Callable
    loss: Callable


class ServerView(NamedTuple):
    """What an honest server may use. The true malicious mask is deliberately absent.

    A stage that merges rows returns `weights`, `valid` and `members` of the new rows; `client_ids`
    stays that of the clients.
    """

    params: Float[Array, " D"]
    weights: Float[Array, " K"]  # example counts as the clients report them
    client_ids: Int[Array, " K"]  # indexes histories of size [N, ...]
    valid: Bool[Array, " K"]  # False: NaN or infinity, nothing was sent, or a stage excluded it
    round: Int[Array, ""]
    with_kept: bool = True  # False: nobody reads `kept`, so a rule may leave it out (None)
    root: ServerData | None = None  # only where `server.root` gives the server examples
    members: Float[Array, "rows K"] | None = None  # which clients a row is made of: 0 or 1


class AttackerView(NamedTuple):
    """What the adversary sees: the threat model itself.

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
    """

    malicious: Bool[Array, " K"]
    visible: Bool[Array, " K"]
    params: Float[Array, " D"]
    client_ids: Int[Array, " K"]
    round: Int[Array, ""]
    task: Task | None = None
    sample: Callable | None = None
    defend: Callable | None = None
    server_update: Callable | None = None
    ranks: Int[Array, " K"] | None = None  # 0 to m - 1 among all malicious clients; None: by row
    adversary: Bool[Array, " K"] | None = None
    weights: Float[Array, " K"] | None = None
    server_rate: Float[Array, ""] | None = None

    @property
    def own(self) -> Bool[Array, " K"]:
        """The updates of the adversary's clients that it can use."""
        return self.visible & (self.malicious if self.adversary is None else self.adversary)

    @property
    def honest(self) -> Bool[Array, " K"]:
        """The updates of all other clients that it can use: none with `corrupted` knowledge."""
        return self.visible & ~(self.malicious if self.adversary is None else self.adversary)


class LocalData(NamedTuple):
    """One client's data inside the round.

    `fetch(positions [B]) -> (x [B, ...], y [B])` gathers its examples, `0 <= position < count`, in
    pixel units and poisoned where the client is malicious and the attack poisons data. `capacity`
    is M, the same Python integer for every client.
    """

    count: Int[Array, ""]
    capacity: int
    round: Int[Array, ""]
    fetch: Callable


class ClientUpdate(Protocol):
    """Local training of one client; the round vmaps it over the client axis.

    `apply` is called with unbatched `params`, so work done before the first local step ends is
    shared by all clients. `keeps_state` says whether `state` outlives the round. `shortened(steps)`
    is the same work for at most so many local steps, to measure ways to compute it.
    """

    keeps_state: bool

    def shortened(self, steps: int) -> "ClientUpdate": ...

    def init(self, dim: int) -> State: ...

    def apply(
        self,
        key: PRNGKeyArray,
        params: Float[Array, " D"],
        state: State,
        local: LocalData,
        task: Task,
    ) -> tuple[Float[Array, " D"], State, Metrics]: ...


class Aggregator(Protocol):
    """`stage = "aggregate"`: [K, D] -> [D]. Metrics hold `kept [K]`, each client's share in [0, 1].

    `kept` says how much of a client's update took part: 1 for every client under the mean, one-hot
    under Krum, the share of coordinates under a trimmed mean. `keeps_scale = False` tells that the
    result is not in units of the updates, as of rules that use signs only.

    Here and in every other stage `init` gets N, the registered clients, whoever takes part in a
    round: histories have one row a client and are indexed by `view.client_ids`.
    """

    stage: str

    def init(self, num_clients: int, dim: int) -> State: ...

    def apply(
        self, key: PRNGKeyArray, updates: Updates, state: State, view: ServerView
    ) -> tuple[Float[Array, " D"], State, Metrics]: ...


class BeforeAggregation(Protocol):
    """`stage = "before"`: reshapes the stack; may change the number of rows, weights or `valid`.

    A stage that changes the number of rows says so in `after(setting) -> Setting`, and returns a
    view whose `weights`, `valid` and `members` are of the new rows.
    """

    stage: str

    def init(self, num_clients: int, dim: int) -> State: ...

    def apply(
        self, key: PRNGKeyArray, updates: Updates, state: State, view: ServerView
    ) -> tuple[Updates, ServerView, State, Metrics]: ...


class AfterAggregation(Protocol):
    """`stage = "after"`: changes the aggregate; sees the stack that was aggregated."""

    stage: str

    def init(self, num_clients: int, dim: int) -> State: ...

    def apply(
        self,
        key: PRNGKeyArray,
        aggregate: Float[Array, " D"],
        updates: Updates,
        state: State,
        view: ServerView,
    ) -> tuple[Float[Array, " D"], State, Metrics]: ...


class UpdateAttack(Protocol):
    """`stage = "update"`: rewrites the adversary's rows of the stack; `init` gets N.

    An attack that gives its clients to others nested in it says which in `shares(ranks) ->
    {field: mask}`, so that those which poison data do so at the right clients.
    """

    stage: str

    def init(self, num_clients: int, dim: int) -> State: ...

    def apply(
        self, key: PRNGKeyArray, updates: Updates, state: State, view: AttackerView
    ) -> tuple[Updates, State, Metrics]: ...


class DataAttack(Protocol):
    """`stage = "data"`: poisons a malicious client's examples, and defines the backdoor's success.

    `base` is the only class that the backdoor acts on, None: all of them. `choose` says which of
    a client's examples are poisoned, from the labels of all of them (`held` is false where the
    row is padding); its key is the client's own, the same in every round. `poison` is what
    becomes of a batch; the round keeps it where an example was chosen. `rank` counts the
    adversary's clients, 0 to m - 1, so that they can share the work. `examples` are what an
    attacker trains a backdoor on, `probes` what success is measured on: `(x, target, include)`,
    inputs, the attacker's labels and which of them count. Probes made of the test images keep
    their number and order, so that `y` are their true labels.
    """

    stage: str
    base: int | None

    def choose(
        self, key: PRNGKeyArray, labels: Int[Array, " M"], held: Bool[Array, " M"]
    ) -> Bool[Array, " M"]: ...

    def poison(
        self, key: PRNGKeyArray, x: Array, y: Array, position: Array, rank: Array, task: Task
    ) -> tuple[Array, Array]: ...

    def examples(self, key: PRNGKeyArray, view: AttackerView) -> tuple[Array, Array]: ...

    def probes(self, x: Array, y: Array, task: Task) -> tuple[Array, Array, Array]: ...


BoundTask = Task
InputSpec = Message = Any

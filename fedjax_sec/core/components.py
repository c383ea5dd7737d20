"""Components: one base class for each kind, and the walk over nested components.

A component is a frozen dataclass whose class a registry knows. Its base class holds the defaults of
its kind; methods of a base are either defaults that say "nothing" or abstract, so a component never
overrides working code. A class that is registered without a base gets its kind's defaults from
`register`, which refuses a class that leaves an abstract method undefined.
"""

import dataclasses
import inspect
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sec.core.advice import shown, suggestion
from fedjax_sec.core.fields import ConfigError
from fedjax_sec.core.random import exact_share
from fedjax_sec.core.schedule import every_value
from fedjax_sec.core.types import (
    BoundTask,
    ClientView,
    InputSpec,
    Message,
    Metrics,
    Space,
    State,
)

#: Kinds of inputs: pixels in [0, 1], features of any scale, tokens numbered from 0.
INPUTS = frozenset({"pixels", "features", "tokens"})
#: Kinds of messages of an algorithm's clients. Components that read updates say so in `accepts`.
SENDS = frozenset({"update", "predictions", "features"})
_UPDATES = frozenset({"update"})
#: Needs of a component beside its arguments: a model and data; the server's own examples; the
#: server's rule; the learning rate of a server that takes plain gradient steps; another model; for
#: its state, where the model's tensors lie in the vector.
NEEDS = frozenset({"task", "root", "rule", "rate", "surrogate", "space"})


class Setting(NamedTuple):
    """The facts known before anything compiles, for the components' `check(path, setting)`.

    `num_clients` K in a round; `num_malicious` m among the registered clients (None: unknown);
    `sampled`: only some registered clients take part in a round; `capacity` M, `example_shape` of
    one input, `num_classes`, the names of the model's `layers`, D `num_parameters` and the number
    of training `examples` (None: unknown). `merged`: an earlier stage makes one row of several
    clients, so rows have no history. `knowledge`: which updates the adversary sees, as
    `threat.knowledge` (None: unknown). `malicious_per_round`: how many malicious clients every
    attacked round has (None: unknown). `inputs` is the kind of input (None: unknown), `labelled`
    whether an example has one class, `sends` what the algorithm's clients send, and `registered` N.
    `client` is the component that trains the clients (None: unknown); its numbers are one
    replica's, so that nothing but checks reads them.
    `auxiliary` maps what attacks on data name in `auxiliary` to an `Auxiliary` (None: unknown).
    """

    num_clients: int
    num_malicious: int | None = None
    sampled: bool = False
    capacity: int | None = None
    example_shape: tuple[int, ...] | None = None
    num_classes: int | None = None
    layers: tuple[str, ...] | None = None
    num_parameters: int | None = None
    examples: int | None = None
    merged: bool = False
    knowledge: str | None = None
    malicious_per_round: int | None = None
    inputs: str | None = None
    labelled: bool = True
    sends: str = "update"
    registered: int | None = None
    client: Any = None
    auxiliary: Mapping | None = None


class Component:
    """The defaults of every component.

    `needs` is a subset of `NEEDS`, and may be a property where it depends on a field. `inputs` are
    the kinds of inputs that the component works on, `accepts` what clients may send to it.
    `on_host`: it calls Python code of the user's, so `aggregate` and `attack` do not compile it.
    `from_python`: it holds an object that a configuration names and does not bring back.
    """

    registered_name: ClassVar[str] = ""
    stage: ClassVar[str] = ""
    needs: frozenset[str] = frozenset()
    inputs: ClassVar[frozenset[str]] = INPUTS
    accepts: ClassVar[frozenset[str]] = SENDS
    needs_labels: ClassVar[bool] = False
    stands_alone: ClassVar[bool] = True  # False: it needs an object or a file of the user's
    on_host: ClassVar[bool] = False
    from_python: ClassVar[bool] = False

    def __init__(self, *values, **fields):
        """Only of a class that is not decorated yet; `pytree` and `register` make another."""
        if values or fields:
            raise ConfigError(
                f"{type(self).__name__} takes no values as it is; decorate the class with "
                f"fedjax_sec.core.pytree, which makes arguments of its fields."
            )

    def check(self, path: str, setting: Setting) -> None:
        """Raises `ConfigError` for a combination that the fields' ranges cannot express."""

    def idle(self, setting: Setting) -> str | None:
        """Why the component is certain to do nothing; None where it is not."""
        return None

    def after(self, setting: Setting) -> Setting:
        """The setting that the next component of a list meets, such as fewer rows."""
        return setting

    def inside(self, setting: Setting) -> Setting:
        """The setting that components nested in this one meet."""
        return setting

    def resolve_auto(self) -> "Component":
        """The component with static fields filled that were left open."""
        return self

    def shaped(self, tree: Any) -> "Component":
        """The component for `aggregate` and `attack` where clients send pytrees like this one."""
        return self


# --- Attacks --------------------------------------------------------------------------------------


class UpdateAttack(Component):
    """`stage = "update"`: rewrites the adversary's rows of the stack.

    `rewrites = "message"` calls `tamper`, which sees and returns whole messages, with the weights
    that clients report and their extra; else `apply` rewrites the vectors [K, D]. One with both may
    stand inside an attack on vectors, which calls `apply`. `copies`: clients train on poisoned
    copies beside their own examples, by the attack on data nested in this one. `warm_up` counts the
    first rounds in which a malicious client still sends what it is given. `separable`, which may be
    a property: a malicious row depends on no other row and no other client's data, so that clients
    that are apart, as on a network, can carry the attack out each for itself.
    """

    stage: ClassVar[str] = "update"
    accepts: ClassVar[frozenset[str]] = _UPDATES
    rewrites: ClassVar[str] = "vector"
    copies: bool = False
    warm_up: int = 0
    separable: bool = False

    def init(self, num_clients: int, dim: int) -> State:
        """The state before round 0; `num_clients` is N."""
        return ()

    def shares(self, ranks) -> dict[str, Any]:
        """field -> mask of the malicious clients (by rank) that run the attack nested in it."""
        return {}

    @abstractmethod
    def apply(self, key, updates, state: State, view) -> tuple[Any, State, Metrics]:
        """(updates [K, D], state, metrics); `view` is an `AttackerView`."""
        raise NotImplementedError

    @abstractmethod
    def tamper(self, key, message: Message, state: State, view) -> tuple[Message, State, Metrics]:
        """(stacked messages, state, metrics); only malicious rows of each leaf are kept."""
        raise NotImplementedError

    def remember(self, state: State, message: Message, rows, view) -> State:
        """The state at the end of a round, from the messages as they were before any attack.

        It is called in every round, also where nobody is malicious, after `apply` or `tamper`.
        `rows` [K] are the messages that were sent and can be used. A client knows what it did
        itself, malicious or not, and of others it learns nothing here: the memory of a row may
        change later rows of that client only. An attack that holds others hands the call on.
        """
        return state


class DataAttack(Component):
    """`stage = "data"`: poisons a malicious client's examples, and defines the backdoor's success.

    `base` is the only class that the backdoor acts on (None: all). `choose` says which of a
    client's examples are poisoned, from the labels of all of them (`held` is false where the row is
    padding); its key is the client's own, the same in every round. `poison` is what becomes of a
    batch; the round keeps it where an example was chosen. `rank` counts the adversary's clients, 0
    to m - 1, so that they can share the work. `examples` are what an attacker trains a backdoor on,
    `probes` what success is measured on: `(x, target, include)`. Probes made of the test examples
    keep their number and order, so that `y` are their true labels.

    `auxiliary` is (data set, class) of examples that the attack brings along (class None: all of
    them), or None. They are loaded with the experiment's data, `task.auxiliary(*auxiliary)` gives
    them, and those that were taken out of the training part are withheld from clients and server.
    `probes_are_tests` is false where the probes are not made of the test examples.

    An attack with memory returns its state from `init`; `prepare` renews it at the beginning of a
    round, before anybody trains, from what the adversary sees. `local_test`: the clients' own test
    examples (`data.local_test`) are poisoned as well, in the evaluation on these.
    """

    stage: ClassVar[str] = "data"
    base: int | None = None
    local_test: bool = False
    auxiliary: tuple[Any, int | None] | None = None
    probes_are_tests: ClassVar[bool] = True

    @property
    def bases(self) -> tuple[int, ...] | None:
        """The classes that the backdoor acts on; None: all. An attack on several overrides it."""
        return None if self.base is None else (self.base,)

    def init(self, setting: Setting, task: BoundTask) -> State:
        """The state before round 0."""
        return ()

    def prepare(self, key, state: State, view) -> State:
        """The state of this round; `view` is an `AttackerView` without updates."""
        return state

    @abstractmethod
    def choose(self, key, labels, held):
        """Which of the examples [M] are poisoned."""
        raise NotImplementedError

    @abstractmethod
    def poison(self, key, state: State, x, y, rank, task: BoundTask) -> tuple[Any, Any]:
        """The batch poisoned: (x [B, ...], y [B])."""
        raise NotImplementedError

    @abstractmethod
    def examples(self, key, state: State, view) -> tuple[Any, Any]:
        """The attacker's training examples: (x [n, ...], the attacker's labels [n])."""
        raise NotImplementedError

    @abstractmethod
    def probes(self, state: State, x, y, task: BoundTask) -> tuple[Any, Any, Any]:
        """(x [P, ...], the attacker's labels [P], which count [P])."""
        raise NotImplementedError


class Trigger(DataAttack):
    """An attack on data that stamps a trigger on examples, to be read as class `target`.

    `trigger` and `target` are all that such an attack defines; examples are chosen among those of
    class `base` (None: all), a share `fraction` of a client's without replacement, and success is
    measured on the test examples of that class with the trigger.
    """

    needs_labels: ClassVar[bool] = True
    target: int = 0
    fraction: Any = 1.0
    num_images: int = 1000

    @abstractmethod
    def trigger(self, state: State, x, rank=None, task=None):
        """The inputs with the trigger; with `rank`, that malicious client's part of it."""
        raise NotImplementedError

    def _is_base(self, y):
        return jnp.ones_like(y, bool) if self.base is None else y == self.base

    def choose(self, key, labels, held):
        return exact_share(key, held & self._is_base(labels), self.fraction)

    def poison(self, key, state, x, y, rank, task):
        return self.trigger(state, x, rank, task), jnp.full_like(y, self.target)

    def examples(self, key, state, view):
        x, y = view.sample(key, self.num_images)
        chosen = self._is_base(y)
        stamped = self.trigger(state, x, None, view.task)
        if self.base is not None:
            stamped = jnp.where(chosen.reshape(-1, *[1] * (x.ndim - 1)), stamped, x)
        return stamped, jnp.where(chosen, self.target, y)

    def probes(self, state, x, y, task):
        stamped = self.trigger(state, x, None, task)
        return stamped, jnp.full_like(y, self.target), self._is_base(y)


class Evasion(Component):
    """Moves inputs: `apply(key, outputs, x, y, surrogate=None) -> x'`."""

    inputs: ClassVar[frozenset[str]] = frozenset({"pixels", "features"})

    @abstractmethod
    def apply(self, key, outputs: Callable, x, y, surrogate: Callable | None = None):
        """The inputs moved [B, ...]; `outputs(x) -> [B, C]`."""
        raise NotImplementedError


class PrivacyAttack(Component):
    """Reconstructs clients' examples from a message, as an honest but curious observer could.

    `known` is a `fedjax_sec.core.types.Known`: the numbers of the protocol, no more. One that
    `tampers` is a malicious server's: it changes the model that it sends before it looks.
    """

    accepts: ClassVar[frozenset[str]] = _UPDATES
    tampers: ClassVar[bool] = False

    def insert(self, network: Any) -> Any:
        """The network that a malicious server sends in place of the honest one."""
        return network

    def plant(self, key, params, task: BoundTask):
        """The parameters [D] of `insert`'s network as a malicious server sends them.

        What the honest network has in `params` is the global model's; what was inserted is random.
        """
        return params

    @abstractmethod
    def reconstruct(self, key, message: Message, params, task: BoundTask, known) -> tuple:
        """A `fedjax_sec.core.types.Guess`, or (x [n, ...], y [n]), of `known.count` examples."""
        raise NotImplementedError


# --- Local steps ----------------------------------------------------------------------------------


class Hooks(NamedTuple):
    """Changes of a client's local steps, on the trained part [T] of the vector.

    Algorithms add it, and defences in local training. `correct(gradient [T], delta [T]) ->
    gradient` acts after clipping and L2, before the optimizer. `after_step(key, delta [T],
    gradient [T], memory) -> (delta, memory)` acts after the optimizer; `memory` begins as given and
    is dropped at the end of the round. `send(key, delta [T]) -> delta` acts once, behind all steps,
    on the update that the client sends. `mean_gradient` asks for `Trained.gradient`.
    """

    correct: Callable | None = None
    after_step: Callable | None = None
    memory: State = ()
    mean_gradient: bool = False
    send: Callable | None = None

    def then(self, other: "Hooks") -> "Hooks":
        """Both, the other one behind this one.

        >>> halved = Hooks(correct=lambda gradient, delta: gradient / 2)
        >>> pulled = Hooks(correct=lambda gradient, delta: gradient + delta)
        >>> halved.then(pulled).correct(4.0, 1.0), pulled.then(halved).correct(4.0, 1.0)
        (3.0, 2.5)
        """
        if self.after_step is None or other.after_step is None:
            only = other if self.after_step is None else self
            after_step, memory = only.after_step, only.memory
        else:
            after_step = _both_steps(self.after_step, other.after_step)
            memory = (self.memory, other.memory)
        correct = self.correct or other.correct
        if self.correct is not None and other.correct is not None:
            correct = _both_corrections(self.correct, other.correct)
        send = self.send or other.send
        if self.send is not None and other.send is not None:
            send = _both_sendings(self.send, other.send)
        return Hooks(correct, after_step, memory, self.mean_gradient or other.mean_gradient, send)

    def where(self, acts) -> "Hooks":
        """These hooks where `acts` (traced) is true, else none."""
        correct, after_step, send = self.correct, self.after_step, self.send

        def corrected(gradient, delta):
            return jnp.where(acts, correct(gradient, delta), gradient)  # pyright: ignore

        def moved(key, delta, gradient, memory):
            new, memory = after_step(key, delta, gradient, memory)  # pyright: ignore
            return jnp.where(acts, new, delta), memory

        def sent(key, delta):
            return jnp.where(acts, send(key, delta), delta)  # pyright: ignore

        return self._replace(
            correct=correct and corrected, after_step=after_step and moved, send=send and sent
        )


#: The hooks that change nothing.
NO_HOOKS = Hooks()


def _both_corrections(first: Callable, second: Callable) -> Callable:
    return lambda gradient, delta: second(first(gradient, delta), delta)


def _both_sendings(first: Callable, second: Callable) -> Callable:
    def send(key, delta):
        return second(jax.random.fold_in(key, 1), first(jax.random.fold_in(key, 0), delta))

    return send


def _both_steps(first: Callable, second: Callable) -> Callable:
    def after_step(key, delta, gradient, memory):
        delta, kept = first(jax.random.fold_in(key, 0), delta, gradient, memory[0])
        delta, also_kept = second(jax.random.fold_in(key, 1), delta, gradient, memory[1])
        return delta, (kept, also_kept)

    return after_step


# --- Defences -------------------------------------------------------------------------------------


class Stage(Component):
    """A stage of a defence; `init` gets N, the registered clients, whoever takes part in a round.

    `stage` says where it stands: in the training of each `client`, `before` aggregation (reshapes
    the stack, may merge rows), `aggregate` ([rows, D] -> [D], exactly one) or `after` it (changes
    the aggregate). `keeps_scale = False` tells that the result is not in units of the updates,
    `symmetric = False` that it depends on the order of the clients, `noisy = True` that an
    aggregator adds noise.

    A rule whose state depends on the model's tensors has "space" among its `needs`; its `init` then
    gets a third argument, the `Space` or None. `view.space` holds it for every rule.

    A stage `client` defines `hooks`, all others `apply`. It has no state, and `malicious_follow`,
    which may be a field, says whether malicious clients follow it, too.
    """

    stage: ClassVar[str]
    accepts: ClassVar[frozenset[str]] = _UPDATES
    keeps_scale: bool = True
    symmetric: bool = True
    noisy: bool = False
    malicious_follow: bool = False

    def init(self, num_clients: int, dim: int, *space: Space | None) -> State:
        """The state before round 0: histories have one row a registered client."""
        return ()

    @abstractmethod
    def hooks(self, view: ClientView) -> Hooks:
        """`client`: what is added to each local step of a client; `view` is a `ClientView`."""
        raise NotImplementedError

    @abstractmethod
    def apply(self, key, *args) -> tuple:
        """`before`: (updates, state, view) -> (updates, view, state, metrics).

        `aggregate`: (updates, state, view) -> (aggregate [D], state, metrics), where
        `metrics["kept"]` [rows] is each row's share in [0, 1]. `after`: (aggregate, updates, state,
        view) -> (aggregate, state, metrics).
        """
        raise NotImplementedError

    def select_sequence(self, updates, view, at_most: int, count):
        """The rows [rows] that `count` (traced, <= `at_most`) successive applications pick.

        Each application sees the rows that earlier ones left. None where a rule has no faster way
        than to be applied again and again.
        """
        return None


def init_stage(stage, num_clients: int, dim: int, space: Space | None) -> State:
    """The state of a stage, or of a rule inside another, before round 0."""
    given = (space,) if "space" in stage.needs else ()
    return stage.init(num_clients, dim, *given)


# --- Learning -------------------------------------------------------------------------------------


class Trained(NamedTuple):
    """The result of local training: the update [D], the client's state, and its statistics.

    `steps` were taken, not planned. `gradient` [T] is the mean over them of the uncorrected
    gradients, where `Hooks.mean_gradient` asks for it.
    """

    delta: Any
    state: State
    steps: Any
    gradient: Any
    metrics: Metrics


class Client(Component):
    """How one client trains; the round maps it over the clients.

    `keeps_state` says whether `state` outlives the round. `shortened(steps)` is the same work for
    at most so many local steps, to measure ways to compute it.
    """

    keeps_state: bool = False

    def shortened(self, steps: int) -> "Client":
        """The same work for at most `steps` local steps."""
        return self

    def gradients(self, capacity: int | None) -> int | None:
        """Gradients of an example that a client computes in a round, at most; None: unknown.

        `capacity` are the examples of the largest client. It says how long a run will train.
        """
        return None

    def init(self, dim: int) -> State:
        """The state before round 0."""
        return ()

    def drawn(self, key, data, step) -> tuple[Any, Any] | None:
        """(positions [B], mask [B]) of the client's examples in a step; None: not told.

        `key` is that of `apply`. For those who look at a round with the truth at hand.
        """
        return None

    def privacy(self, counts, rounds: int) -> dict | None:
        """What the training guarantees to clients with so many examples [N], for the summary."""
        return None

    @abstractmethod
    def apply(self, key, params, state: State, data, task, hooks: Hooks = NO_HOOKS) -> Trained:
        """Trains from `params` [D] on `data`, a `LocalData`."""
        raise NotImplementedError


class Augmentation(Component):
    """Changes a client's training inputs at random; nothing else is augmented.

    It sees each fetched batch, poisoned where the client is malicious, before adversarial examples
    are made of it. Targets stay.
    """

    @abstractmethod
    def apply(self, key, x, inputs: InputSpec):
        """The inputs [B, ...] changed, each example by draws of its own.

        `inputs` is their specification: range, shape and normalisation.
        """
        raise NotImplementedError


class Algorithm(Component):
    """The messages of clients, and the server's step.

    `sends` is "update", "predictions" or "features". An algorithm with the fields `client` and
    `optimizer`, declared as `given`, gets the experiment's client and server optimizer in them.
    `personalizes`: clients have models of their own, `personal`, that local evaluation measures.
    """

    sends: ClassVar[str] = "update"
    client: Any = None
    optimizer: Any = None
    personalizes: ClassVar[bool] = False

    @abstractmethod
    def init(self, key, params, setting: Setting, task: BoundTask) -> State:
        """The server's state before round 0, with these initial parameters [D]."""
        raise NotImplementedError

    def init_client(self, params, setting: Setting, task: BoundTask) -> State:
        """One client's state from round to round; () keeps nothing."""
        return ()

    def message(self, setting: Setting, task: BoundTask) -> Message | None:
        """The shapes of one client's message; None: `train` is traced to see them."""
        return None

    @property
    def rate(self):
        """The learning rate of a server that takes plain gradient steps, else None."""
        return None

    def download(self, server: State, client) -> Any:
        """The download of client number `client`; leaves that ignore `client` stay unbatched."""
        return server

    def received(self, download: Any):
        """The global parameters [D] in a download."""
        return self.params(download)

    @abstractmethod
    def train(
        self, key, download, state, data, task: BoundTask, hooks: Hooks = NO_HOOKS
    ) -> tuple[Message, State, Metrics]:
        """One client's round: (its message, what it keeps, metrics with `train_loss`).

        `hooks` are those of a defence in local training. An algorithm hands them to the client's
        training behind its own, `own.then(hooks)`; one without this argument is refused beside such
        a defence.
        """
        raise NotImplementedError

    @abstractmethod
    def step(self, key, server, aggregate, messages, view, task) -> tuple[State, Metrics]:
        """The server's step; `view` is the one behind the defence, with `included() [K]`."""
        raise NotImplementedError

    @abstractmethod
    def params(self, server: State):
        """The global parameters [D], which are evaluated."""
        raise NotImplementedError

    def personal(self, server: State, state: State, task: BoundTask):
        """One client's own parameters [D]."""
        return self.params(server)


class Task(Component):
    """A learning task: pure functions of a model's outputs and the targets.

    `headline` is the metric that sweeps, figures and "best" read.
    """

    headline: ClassVar[str]

    @abstractmethod
    def losses(self, outputs, y) -> tuple[Any, Any]:
        """(total [B], units [B]): a batch's loss is sum(total) / sum(units)."""
        raise NotImplementedError

    @abstractmethod
    def sums(self, outputs, y, mask) -> dict[str, tuple[Any, Any]]:
        """metric -> (numerator, denominator), over the examples of `mask` [B]."""
        raise NotImplementedError

    @abstractmethod
    def right(self, outputs, y):
        """Whether each target is what the model answers: booleans of the shape of `y`."""
        raise NotImplementedError

    def labels_of(self, y):
        """The class of each example, [...]; None where an example has no class."""
        return None


class Network(Component):
    """A network: `make(input_shape, num_classes)` returns a `fedjax_sec.core.types.Model`.

    `shortened()` is a network of the same layers, but fewer, to measure ways to compute it.
    """

    def shortened(self) -> "Network":
        """The same network with as few equal layers as it can have."""
        return self

    @abstractmethod
    def make(self, input_shape: tuple[int, ...], num_classes: int):
        """The network as pure functions for such inputs and outputs."""
        raise NotImplementedError


class Dataset(Component):
    """A data set: `load(data_dir, download)` returns a `fedjax_sec.data.Source`."""

    @abstractmethod
    def load(self, data_dir: str | None = None, download: bool = True):
        """The arrays on the host."""
        raise NotImplementedError


class Partitioner(Component):
    """Deals training examples to clients: `split(rng, labels, num_clients, users)`."""

    @abstractmethod
    def split(self, rng, labels, num_clients: int, users=None):
        """A `fedjax_sec.data.packing.Partition`."""
        raise NotImplementedError


# --- Looking --------------------------------------------------------------------------------------


class Monitor(Component):
    """Looks at a round: it may read the truth, and hands back its own state and metrics only.

    `when` is "every" round or the "last" one before an evaluation, and may be a static field. Its
    metrics are named `PREFIX/NAME`, PREFIX being `prefix` or the registered name.
    """

    when: str = "every"
    prefix: ClassVar[str | None] = None

    def positions(self, task: BoundTask, test, backdoor, state: State):
        """The test examples that `observe` looks at, by position; None where it needs none.

        `test` is a `TestSet` on the host, `backdoor` the attack on data whose success is measured
        (None without one), and `state` its state before round 0.
        """
        return None

    def init(self, setting: Setting, task: BoundTask, message: Message) -> State:
        """The state before round 0; `message` holds the shapes of one client's."""
        return ()

    @abstractmethod
    def observe(self, key, state: State, trace, task: BoundTask) -> tuple[State, Metrics]:
        """(state, metrics); `trace` is a `fedjax_sec.core.types.RoundTrace`."""
        raise NotImplementedError


class Evaluator(Component):
    """Measures a model between rounds; its metrics are named as a monitor's."""

    prefix: ClassVar[str | None] = None

    @abstractmethod
    def measure(self, key, params, x, y, task: BoundTask, adversary) -> Metrics:
        """Metrics of the parameters [D] on the test examples (x as stored, y).

        `adversary` is (the backdoor whose success is measured, its state by then), or None.
        """
        raise NotImplementedError


#: kind -> the base class whose defaults a registered class without one gets; attacks by `stage`.
BASES: dict[str, Any] = {
    "attack": {"update": UpdateAttack, "data": DataAttack},
    "defense": Stage,
    "evasion": Evasion,
    "privacy_attack": PrivacyAttack,
    "client": Client,
    "augmentation": Augmentation,
    "algorithm": Algorithm,
    "task": Task,
    "model": Network,
    "dataset": Dataset,
    "partition": Partitioner,
    "monitor": Monitor,
    "evaluator": Evaluator,
}


#: kind -> the stages that its components name.
STAGES = {"attack": ("update", "data"), "defense": ("client", "before", "aggregate", "after")}
#: The method of an attack on updates that nothing calls, by what it `rewrites`.
_NOT_CALLED = {"vector": "tamper", "message": "apply"}


def with_defaults(cls: type, kind: str) -> type:
    """The class with every default of its kind that it does not define itself.

    Raises `TypeError` where the class leaves a method undefined that is abstract in its kind, or
    names a `stage` that the kind does not have.

    >>> with_defaults(type("Mine", (), {"stage": "after", "aply": None}), "defense")
    Traceback (most recent call last):
    TypeError: Mine: a defense must define apply(self, key, *args) -> tuple. Did you mean 'aply'?
    """
    base = BASES.get(kind, Component)
    if kind in STAGES:
        _check_one_of(cls, "stage", STAGES[kind])
    if isinstance(base, Mapping):
        base = base[cls.stage]  # pyright: ignore[reportAttributeAccessIssue]
    written = [name for name in vars(cls) if not name.startswith("__")]
    if not issubclass(cls, base):
        for one in base.__mro__[:-1]:  # the most derived first
            for name, value in vars(one).items():
                if not name.startswith("__") and not hasattr(cls, name):
                    setattr(cls, name, value)
    not_called = _not_called(cls, base)
    for name in dir(cls):
        method = inspect.getattr_static(cls, name)
        if getattr(method, "__isabstractmethod__", False) and name != not_called:
            article = "an" if kind[0] in "aeiou" else "a"
            raise TypeError(
                f"{cls.__name__}: {article} {kind} must define {name}{inspect.signature(method)}."
                f"{suggestion(name, [other for other in written if not hasattr(base, other)])}"
            )
    return cls


def _not_called(cls: Any, base: type) -> str | None:
    """The abstract method of its kind that nothing calls of this class."""
    if issubclass(base, UpdateAttack):
        _check_one_of(cls, "rewrites", tuple(_NOT_CALLED))
        return _NOT_CALLED[cls.rewrites]
    if issubclass(base, Stage):
        return "apply" if cls.stage == "client" else "hooks"
    return None


def _check_one_of(cls: type, name: str, allowed: Collection[str]) -> None:
    value = getattr(cls, name, None)
    if value not in allowed:
        raise TypeError(
            f"{cls.__name__}: `{name}` must be one of {', '.join(allowed)}, got {shown(value)}."
            f"{suggestion(value, allowed)}"
        )


# --- Nested components ----------------------------------------------------------------------------


def walk(part, path: str = "", setting=None) -> Iterator[tuple[str, Any, Any]]:
    """(path, component, setting) of the component and of every nested one, outermost first.

    Needs, backdoors and checks are looked up by it, so no wrapper can forget one. A nested list
    threads `after`: each component is met with the setting that those before it leave.

    >>> from fedjax_sec.core import component, numeric, pytree
    >>> @pytree
    ... class Inner(Component):
    ...     scale: float = numeric(1.0, "A factor.")
    >>> @pytree
    ... class Outer(Component):
    ...     first: Any = component("attack", None, "A component.")
    >>> [path for path, _, _ in walk(Outer(Outer(Inner())), "attack")]
    ['attack', 'attack.first', 'attack.first.first']
    """
    yield path, part, setting
    below = None if setting is None else part.inside(setting)
    for field in dataclasses.fields(part):
        if "kind" not in field.metadata:
            continue
        value, at = getattr(part, field.name), f"{path}.{field.name}" if path else field.name
        items: tuple[Any, ...] = value if isinstance(value, tuple) else (value,)
        running = below
        for i, item in enumerate(items):
            if dataclasses.is_dataclass(type(item)):
                yield from walk(item, f"{at}[{i}]" if len(items) > 1 else at, running)
                running = item.after(running) if running else running


def needing(parts: Iterable, need: str) -> list[str]:
    """Names of the components, nested ones too, that need what `need` (of `NEEDS`) names."""
    everything = (one for part in parts for _, one, _ in walk(part))
    return [one.registered_name for one in everything if need in one.needs]


def paths_of(items: Sequence, path: str) -> list[str]:
    """The path of each component of a list; that of the list where there is one only."""
    return [path] if len(items) == 1 else [f"{path}[{i}]" for i in range(len(items))]


def check_components(components, path: str, setting: Setting) -> None:
    """Runs every component's `check`, nested ones too; raises what the first failing one raises.

    A component whose fields follow schedules is checked with each of their values. One that would
    do nothing with any of them is refused: its `idle(setting)` says why, or None. A component that
    does not work on the inputs, on what the clients send, or without labels is refused as well, and
    so is one that rewrites messages alone inside one that hands on vectors.
    """
    for part, place in zip(components, paths_of(components, path), strict=True):
        for at, nested, met in walk(part, place, setting):
            _check_applies(nested, at, met)
            _check_handed_on(part, nested, at)
            reasons = []
            for one in every_value(nested):
                one.check(at, met)
                reasons.append(one.idle(met))
            if all(reasons):
                raise ConfigError(f"{at}: {reasons[0]}")
        setting = part.after(setting)


def refuse_warm_up(stages: Sequence, path: str, rounds: int) -> None:
    """Raises where an attack on updates, nested ones too, still warms up in all of the rounds.

    `rounds` ends with the last round that is attacked.
    """
    for stage, place in zip(stages, paths_of(stages, path), strict=True):
        for at, one, _ in walk(stage, place):
            if one.stage == "update" and one.warm_up >= rounds:
                raise ConfigError(
                    f"{at}: {one.registered_name!r} would do nothing: it begins in round "
                    f"{one.warm_up + 1}, and round {rounds} is the last that is attacked; run it "
                    f"in an experiment with more rounds."
                )


def refuse_unread(part, path: str, names: Sequence[str], where: str) -> None:
    """Raises for a field among `names` that is not at its default, since `where` nothing reads it.

    >>> Mine = type("Mine", (), {"__annotations__": {"bound": float}, "bound": 1.0})
    >>> refuse_unread(dataclasses.dataclass(Mine)(2.0), "attack", ["bound"], "with mode 'plain'")
    Traceback (most recent call last):
    fedjax_sec.core.fields.ConfigError: attack.bound is not read with mode 'plain', got 2.0; leave
    it at 1.0.
    """
    for field in dataclasses.fields(part):
        given = getattr(part, field.name)
        if field.name in names and given != field.default:
            raise ConfigError(
                f"{path}.{field.name} is not read {where}, got {shown(given)}; leave it at "
                f"{shown(field.default)}."
            )


def _check_applies(part, path: str, setting: Setting) -> None:
    name = part.registered_name or type(part).__name__
    if setting.inputs is not None and setting.inputs not in part.inputs:
        raise ConfigError(
            f"{path}: {name!r} works on {_or(part.inputs)}, and the data set's inputs are "
            f"{setting.inputs}."
        )
    if setting.sends not in part.accepts:
        raise ConfigError(
            f"{path}: {name!r} works where clients send {_or(part.accepts)}s, and the algorithm's "
            f"clients send {setting.sends}."
        )
    if part.needs_labels and not setting.labelled:
        raise ConfigError(
            f"{path}: {name!r} needs one class for each example, which this task's do not have."
        )


def _check_handed_on(outer, nested, path: str) -> None:
    """Raises where `nested` needs whole messages, of which the attack around it has the vectors."""
    if outer.stage != "update" or nested.stage != "update":
        return
    on_vectors = not getattr(type(nested).apply, "__isabstractmethod__", False)
    if (outer.rewrites, nested.rewrites) == ("vector", "message") and not on_vectors:
        raise ConfigError(
            f"{path}: {nested.registered_name!r} rewrites whole messages, and "
            f"{outer.registered_name!r} around it only vectors; give both in a list instead, one "
            f"after the other."
        )


def _or(names) -> str:
    return " or ".join(sorted(names))


def fill_defaults(part, context: Mapping[str, Any]):
    """The component with every field filled that was left open and says `default_from`.

    `context` maps what a field may name to its value, None where it is unknown. Nested components
    take an outer's field of that name first.

    >>> from fedjax_sec.core import component, numeric, pytree
    >>> @pytree
    ... class Rule(Component):
    ...     f: int | None = numeric(None, "A bound.", default_from="num_malicious")
    ...     inner: Any = component("defense", None, "A rule.")
    >>> fill_defaults(Rule(inner=Rule()), {"num_malicious": 3})
    Rule(f=3, inner=Rule(f=3, inner=None))
    """
    changes, inner = {}, dict(context)
    for field in dataclasses.fields(part):
        if (source := field.metadata.get("default_from")) is not None:
            value = getattr(part, field.name)
            if value is None and (value := context.get(source)) is not None:
                changes[field.name] = value
            if value is not None:
                inner[source] = value
    for field in dataclasses.fields(part):
        if "kind" in field.metadata and field.name not in changes:
            value = getattr(part, field.name)
            if isinstance(value, tuple):
                changes[field.name] = tuple(fill_defaults(one, inner) for one in value)
            elif dataclasses.is_dataclass(value):
                changes[field.name] = fill_defaults(value, inner)
    return dataclasses.replace(part, **changes) if changes else part


def value_of(part, name: str):
    """A component's field of that name; None where it has no such field."""
    return next((getattr(part, f.name) for f in dataclasses.fields(part) if f.name == name), None)

"""Classes written for FedML's interface, as a rule or an attack of ours."""

import contextlib
import copy
import dataclasses
import inspect
import random
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from fedjax_sec.core import (
    ConfigError,
    Stage,
    UpdateAttack,
    in_vector_order,
    one_line,
    pytree,
    shown,
    static,
    suggestion,
)

#: The hooks of a server's round, in FedML's order, and its older one that stands for all three.
BEFORE, ON, AFTER, RUN = (
    "defend_before_aggregation",
    "defend_on_aggregation",
    "defend_after_aggregation",
    "run",
)
#: An attack on models: the paper's name, and that of the code.
ATTACKS = ("poison_model", "attack_model")
#: Hooks that act where there are neither models nor a server.
ELSEWHERE = {
    "poison_data": "poisons data, which `aggregate` and `attack` do not see; write an attack on "
    "data (fedjax_sec.core.DataAttack)",
    "reconstruct_data": "reconstructs data and changes no model; write an attack on privacy "
    "(fedjax_sec.core.PrivacyAttack)",
}
#: FedML's base classes, whose hooks are empty.
_BASES = ("BaseDefenseMethod", "BaseAttackMethod")

MEMORIES = ("fresh", "kept")


def wrap(instance: Any, *, memory: str = "fresh") -> Any:
    """An object with FedML's hooks as a rule for `aggregate`, or as an attack for `attack`.

    Args:
      instance: of a class with one or more of `defend_before_aggregation`, `defend_on_aggregation`
        and `defend_after_aggregation` (or `run`, FedML's older hook for all three), or with
        `poison_model` (in FedML's code `attack_model`).
      memory: `fresh`: every call works on a copy of the instance as it is now, so equal arguments
        give equal results. `kept`: the instance itself is called, and remembers from call to call,
        as in a run of FedML, for rules such as FoolsGold.

    The hooks get what FedML gives them, in NumPy: `raw_client_grad_list` is a list of (number of
    examples, model), a model an `OrderedDict` of arrays (the global model plus the client's
    update), and `extra_auxiliary_info` the global model. Names are those of the clients' pytrees,
    of nested ones with a dot between, in the order in which the first client holds them; where
    clients are vectors [D], a model has the one array `model`. `base_aggregation_func` is FedML's
    average by numbers of examples, and what a class without `defend_on_aggregation` gets. Hooks may
    change what they are given. Arguments are passed by FedML's names or, to the paper's signature
    `(local_models, auxiliary_info)`, by position. NumPy's and Python's generators are seeded by
    `key` for the call, and put back.

    A rule gets the models of the clients whose updates are finite. Its `kept` is 1 for the clients
    whose models the hook before aggregation returns, where it returns some of those that it was
    given; where it makes new ones it is 1 for all. An attack gets the malicious clients' models, of
    an omniscient adversary all clients'; changes of others are dropped, with a warning. In
    experiments (`fedjax_sec.run`) wrapped objects are refused, since a configuration cannot name
    them.

    Raises: `ConfigError` for an object without such hooks, or with those of both sides, and, when
    it is called, for what a hook raises or returns in place of models.

    >>> import fedjax_sec
    >>> class Nearest:  # keeps the two models that are nearest to the global one
    ...     def defend_before_aggregation(self, raw_client_grad_list, extra_auxiliary_info=None):
    ...         def length(client):
    ...             return sum(np.sum((client[1][k] - v) ** 2) for k, v in center.items())
    ...         center = extra_auxiliary_info
    ...         return sorted(raw_client_grad_list, key=length)[:2]
    >>> print(fedjax_sec.aggregate([[1.0], [3.0], [90.0]], wrap(Nearest())))
    [2.]
    >>> class Zero:
    ...     def poison_model(self, local_models, auxiliary_info):
    ...         return [(n, {k: 0 * v for k, v in model.items()}) for n, model in local_models]
    >>> bad = [True, False]
    >>> sent = fedjax_sec.attack([[1.0], [3.0]], wrap(Zero()), malicious=bad, params=[5.0])
    >>> print(sent[:, 0])
    [-5.  3.]
    """
    if memory not in MEMORIES:
        raise ConfigError(
            f"memory must be one of {MEMORIES}, got {shown(memory)}."
            f"{suggestion(memory, MEMORIES) if isinstance(memory, str) else ''}"
        )
    if isinstance(instance, type):
        raise ConfigError(
            f"wrap takes an object, got the class {instance.__name__}; write "
            f"wrap({instance.__name__}(...))."
        )
    defends = [name for name in (BEFORE, ON, AFTER, RUN) if _hook(instance, name)]
    attacks = [name for name in ATTACKS if _hook(instance, name)]
    of = type(instance).__name__
    if defends and attacks:
        raise ConfigError(
            f"{of} has hooks of a defence, {', '.join(defends)}, and of an attack, "
            f"{', '.join(attacks)}; wrap two objects."
        )
    if RUN in defends and len(defends) > 1:
        raise ConfigError(
            f"{of} has `run` beside {', '.join(defends[:-1])}, and FedML calls either the one or "
            f"the others; leave `run` out."
        )
    if not defends and not attacks:
        raise ConfigError(_no_hooks(instance))
    held = _Held(instance, memory)
    return FedmlAttack(held) if attacks else FedmlDefense(held)


def _no_hooks(instance) -> str:
    of = type(instance).__name__
    for name, why in ELSEWHERE.items():
        if _hook(instance, name):
            return f"{of}.{name} {why}."
    wanted = (BEFORE, ON, AFTER, *ATTACKS)
    near = [suggestion(name, wanted) for name in dir(instance) if not name.startswith("__")]
    return f"{of} has none of FedML's hooks {', '.join(wanted)}.{next(filter(None, near), '')}"


def _hook(instance, name: str) -> Callable | None:
    """The bound method, None where there is none or only the empty one of FedML's base class."""
    for cls in type(instance).__mro__:
        if name in vars(cls):
            method = getattr(instance, name)
            return method if callable(method) and cls.__name__ not in _BASES else None
    method = getattr(instance, name, None)  # set on the object
    return method if callable(method) else None


class _Held:
    """An instance as a component's field, which is equal to itself alone."""

    def __init__(self, instance, memory: str):
        self.instance, self.memory = instance, memory
        self.of = type(instance).__name__
        if memory == "fresh":
            self.instance = self._copied()

    def _copied(self):
        try:
            return copy.deepcopy(self.instance)
        except Exception as error:  # the object's own
            raise ConfigError(
                f"{self.of} cannot be copied ({type(error).__name__}: {one_line(error, 200)}), so "
                f"that every call would begin from it; write wrap(..., memory='kept')."
            ) from error

    def calls(self) -> "_Calls":
        """The hooks of one call, all of one object."""
        return _Calls(self.of, self._copied() if self.memory == "fresh" else self.instance)


class _Calls(NamedTuple):
    """Calls of one object's hooks, with their errors in our words."""

    of: str
    instance: Any

    def has(self, name: str) -> bool:
        return _hook(self.instance, name) is not None

    def __call__(self, name: str, given: Mapping[str, Any]) -> Any:
        """The hook's return value; `given` are FedML's arguments by name, in order."""
        method = _hook(self.instance, name)
        positions, names = _arguments(method, given)
        try:
            output = method(*positions, **names)
        except ConfigError:
            raise
        except Exception as error:  # the object's own
            raise ConfigError(
                f"{self.of}.{name} fails ({type(error).__name__}: {one_line(error, 200)})."
            ) from error
        if output is None:
            raise ConfigError(f"{self.of}.{name} returns None; it must return what it made.")
        return output


def _arguments(method: Callable, given: Mapping[str, Any]) -> tuple[list, dict]:
    """The arguments by position and by name, as far as the method takes them.

    By FedML's names where it has them. Otherwise by position: the models first and the global model
    last, and between them the average, where there is room for three.
    """
    try:
        parameters = inspect.signature(method).parameters.values()
    except (TypeError, ValueError):
        return list(given.values()), {}
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    open_names = any(p.kind == p.VAR_KEYWORD for p in parameters)
    first = next(iter(given))
    if first in names or (open_names and not names):
        return [], {k: v for k, v in given.items() if k in names or open_names}
    values = list(given.values())
    if len(names) < len(values) and len(values) > 2:
        values = [values[0], values[-1]]
    return values[: len(names)], {}


# --- Models ---------------------------------------------------------------------------------------


class Form(NamedTuple):
    """How a vector [D] is cut into named arrays.

    `names` and `shapes` are in the vector's order, `order` are their numbers as their owner holds
    them, since JAX sorts the keys of a dict.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]

    def cut(self, vector: np.ndarray) -> OrderedDict:
        """Arrays of its own, which a hook may change."""
        sizes = [int(np.prod(shape)) for shape in self.shapes]
        parts = np.split(np.array(vector), np.cumsum(sizes)[:-1])
        arrays = [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]
        return OrderedDict((self.names[i], arrays[i]) for i in self.order)

    def join(self, model: Any, whose: str) -> np.ndarray:
        """The vector of a model that a hook returns."""
        if not isinstance(model, Mapping):
            raise ConfigError(f"{whose} must be a mapping of arrays by name, got {shown(model)}.")
        parts = []
        for name, shape in zip(self.names, self.shapes, strict=True):
            if name not in model:
                raise ConfigError(
                    f"{whose} lacks {name!r}.{suggestion(name, model)} It must hold "
                    f"{', '.join(self.names)}."
                )
            array = np.asarray(model[name])
            if array.shape != shape or array.dtype.kind not in "fiub":
                raise ConfigError(
                    f"{whose}[{name!r}] must hold numbers of shape {shape}, got {array.dtype} with "
                    f"shape {array.shape}."
                )
            parts.append(array.ravel())
        return np.concatenate(parts)


def form_of(tree: Any) -> Form:
    """The form of a client's pytree.

    >>> form_of({"w": np.ones((2, 3)), "b": np.ones(3)})
    Form(names=('b', 'w'), shapes=((3,), (2, 3)), order=(1, 0))
    """
    leaves = in_vector_order(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    made = [".".join(path) for path in _paths(tree)]
    order = range(len(names))
    if sorted(made) == sorted(names) and len(set(names)) == len(names):
        order = map(names.index, made)
    return Form(tuple(names), tuple(np.shape(leaf) for _, leaf in leaves), tuple(order))


def _paths(tree, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of the leaves in the order in which mappings hold them."""
    if isinstance(tree, Mapping):
        for key in tree:
            yield from _paths(tree[key], (*path, str(key)))
    elif isinstance(tree, Sequence) and not isinstance(tree, str):
        for i, part in enumerate(tree):
            yield from _paths(part, (*path, str(i)))
    else:
        yield path


def _counted(weight) -> int | float:
    """A number of examples as FedML has it."""
    number = float(weight)
    return int(number) if number.is_integer() else number


def _clients(output: Any, form: Form, what: str) -> list[tuple[float, np.ndarray]]:
    """(number, vector [D]) of each client that a hook returns."""
    if not isinstance(output, Iterable) or isinstance(output, (str, Mapping)):
        raise ConfigError(
            f"{what} must return a list of (number of examples, model), got {shown(output)}."
        )
    clients = []
    for i, client in enumerate(output):
        if not isinstance(client, (tuple, list)) or len(client) != 2:
            raise ConfigError(
                f"{what} must return pairs (number of examples, model), got {shown(client)} at "
                f"position {i}."
            )
        number, model = client
        try:
            count = float(number)
        except (TypeError, ValueError):
            count = np.nan
        if not 0 <= count < np.inf:
            raise ConfigError(
                f"{what} must return numbers of examples >= 0, got {shown(number)} at position {i}."
            )
        clients.append((count, form.join(model, f"model {i} of {what}")))
    return clients


def average(args: Any = None, raw_grad_list: Any = None) -> OrderedDict:
    """FedML's `FedMLAggOperator.agg` for FedAvg: the mean of models by numbers of examples.

    >>> average(None, [(1, {"w": np.array(2.0)}), (3, {"w": np.array(6.0)})])["w"].item()
    5.0
    """
    clients = list(args if raw_grad_list is None else raw_grad_list)
    total = sum(number for number, _ in clients)
    if not clients or not total:
        raise ConfigError("the average is of no models, or of models without examples.")
    first = clients[0][1]
    return OrderedDict(
        (name, sum((number / total) * np.asarray(model[name]) for number, model in clients))
        for name in first
    )


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """NumPy's and Python's global generators begin from the seed, and are as they were after."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _on_host(held: _Held, function: Callable, shapes: Any, key, *arrays) -> Any:
    """Calls `function(calls, *arrays)` with NumPy arrays, also inside a compiled program.

    Under `vmap` it is called for one after the other. Where the object remembers, calls keep their
    order, and a batch of them, which has none, is an error of JAX's. With arrays, as from
    `aggregate`, it is called at once, and its errors come through as they are.
    """

    def call(seed, *given):
        with _seeded(int(seed)):
            output = function(held.calls(), *(np.asarray(one) for one in given))
        return jax.tree.map(lambda one, shape: np.asarray(one, shape.dtype), output, shapes)

    seed = jax.random.bits(key, (), jnp.uint32)
    if not any(isinstance(one, jax.core.Tracer) for one in (seed, *arrays)):
        return jax.tree.map(jnp.asarray, call(seed, *arrays))
    if held.memory == "kept":
        return io_callback(call, shapes, seed, *arrays, ordered=True)
    return jax.pure_callback(call, shapes, seed, *arrays, vmap_method="sequential")


# --- Components -----------------------------------------------------------------------------------


class _Foreign:
    """Shared by both: the object, the form of models, and where they may be used."""

    on_host = True
    stands_alone = False

    def dump_spec(self) -> dict:
        """A configuration cannot hold it."""
        raise ConfigError(
            f"{self.held.of} is an object of Python's, wrapped for fedjax_sec.aggregate and "
            f"fedjax_sec.attack; an experiment takes components that a configuration can name, see "
            f"CONTRIBUTING.md."
        )

    def check(self, path, setting):
        if not isinstance(self.held, _Held):
            raise ConfigError(f"{path}: make it with fedjax_sec.fedml.wrap(instance).")

    def shaped(self, tree):
        return dataclasses.replace(self, form=form_of(tree))

    def _form(self, dim: int) -> Form:
        return Form(("model",), ((dim,),), (0,)) if self.form is None else self.form


@pytree
class FedmlDefense(_Foreign, Stage):
    """An object with FedML's hooks of a defence as an aggregator; see `wrap`."""

    registered_name = "fedml_defense"
    stage = "aggregate"
    held: Any = static(None, "The object.")
    form: Any = static(None, "How a model is cut into arrays (null: one array).")

    def apply(self, key, updates, state, view):
        rows, dim = updates.shape
        form, dtype = self._form(dim), updates.dtype
        shapes = jax.ShapeDtypeStruct((dim,), dtype), jax.ShapeDtypeStruct((rows,), dtype)

        def call(calls, updates, valid, weights, params):
            chosen = np.flatnonzero(valid)
            kept = np.zeros(rows)
            if not len(chosen):
                return np.zeros(dim), kept
            output, kept[chosen] = _defended(calls, form, updates[chosen], weights[chosen], params)
            return output - params, kept

        given = (jnp.where(view.valid[:, None], updates, 0.0), view.valid, view.weights)
        aggregate, kept = _on_host(self.held, call, shapes, key, *given, view.params)
        return aggregate, state, {"kept": kept}


def _defended(calls: _Calls, form: Form, updates, weights, params):
    """(the new global model [D], each client's share) by FedML's order of hooks.

    `server_aggregator.py`: before, on or the average, after.
    """

    def center():
        return form.cut(params)

    clients = [(_counted(w), form.cut(u + params)) for w, u in zip(weights, updates, strict=True)]
    given = {id(model): i for i, (_, model) in enumerate(clients)}
    shares = np.ones(len(clients))
    if calls.has(BEFORE):
        arguments = {"raw_client_grad_list": list(clients), "extra_auxiliary_info": center()}
        output = calls(BEFORE, arguments)
        if isinstance(output, Iterable) and not isinstance(output, (str, Mapping)):
            output = list(output)  # FedML's residual reweighting returns a zip
        _clients(output, form, f"{calls.of}.{BEFORE}")
        left = {given.get(id(model)) for _, model in output}
        if None not in left:
            shares = np.array([float(i in left) for i in range(len(clients))])
        clients = [(number, model) for number, model in output]
    name = next((one for one in (ON, RUN) if calls.has(one)), None)
    if name is None:
        if not clients:
            raise ConfigError(f"{calls.of}.{BEFORE} left no model to average.")
        model = average(None, clients)
    else:
        arguments = {
            "raw_client_grad_list": clients,
            "base_aggregation_func": average,
            "extra_auxiliary_info": center(),
        }
        model = calls(name, arguments)
        form.join(model, f"the model of {calls.of}.{name}")
    if calls.has(AFTER):
        name = AFTER
        model = calls(AFTER, {"global_model": model})
    whose = f"the model of {calls.of}.{name or BEFORE}"
    vector = form.join(model, whose)
    if not np.isfinite(vector).all():
        raise ConfigError(f"{whose} holds NaN or infinity, which it was not given.")
    return vector, shares


@pytree
class FedmlAttack(_Foreign, UpdateAttack):
    """An object with FedML's hook of an attack on models; see `wrap`."""

    registered_name = "fedml_attack"
    held: Any = static(None, "The object.")
    form: Any = static(None, "How a model is cut into arrays (null: one array).")

    def apply(self, key, updates, state, view):
        form, dim = self._form(updates.shape[1]), updates.shape[1]
        shapes = jax.ShapeDtypeStruct(updates.shape, updates.dtype)

        def call(calls, updates, malicious, visible, weights, params):
            chosen = np.flatnonzero(malicious | visible)
            sent = updates.copy()
            if malicious.any():
                poisoned = _poisoned(calls, form, updates[chosen], weights[chosen], params)
                sent[chosen] = poisoned - params
                _warn_of_honest(calls.of, updates, sent, ~malicious)
            return sent

        weights = jnp.ones(updates.shape[0]) if view.weights is None else view.weights
        params = view.params[:dim]
        given = (updates, view.malicious, view.visible, weights, params)
        return _on_host(self.held, call, shapes, key, *given), state, {}


def _poisoned(calls: _Calls, form: Form, updates, weights, params) -> np.ndarray:
    """The models [n, D] that the clients send in place of theirs."""
    name = next(one for one in ATTACKS if calls.has(one))
    clients = [(_counted(w), form.cut(u + params)) for w, u in zip(weights, updates, strict=True)]
    arguments = {"raw_client_grad_list": clients, "extra_auxiliary_info": form.cut(params)}
    sent = _clients(calls(name, arguments), form, f"{calls.of}.{name}")
    if len(sent) != len(updates):
        raise ConfigError(
            f"{calls.of}.{name} must return a model for each of the {len(updates)} clients that it "
            f"is given, got {len(sent)}."
        )
    return np.stack([vector for _, vector in sent])


def _warn_of_honest(of: str, before, after, honest) -> None:
    scale = 1e-6 * (1 + np.abs(before))
    moved = np.flatnonzero(honest & np.any(np.abs(after - before) > scale, axis=1))
    if len(moved):
        warnings.warn(
            f"{of} changed the models of clients {', '.join(map(str, moved[:5]))}, which are not "
            f"malicious; these changes are dropped",
            stacklevel=2,
        )

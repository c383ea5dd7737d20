"""A strategy for any Flower app: the server's aggregation is a pipeline of our defences."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedjax_sec import core
from fedjax_sec.core import ConfigError, Setting, check_components, tree_space
from fedjax_sec.core.types import ServerData, ServerView
from fedjax_sec.flower import wire
from fedjax_sec.flower.network import one_line
from fedjax_sec.round.pipeline import Defense

_log = logging.getLogger(__name__)


class _Model:
    """The global model: names, shapes and dtypes of its arrays, and where they lie in a vector."""

    def __init__(self, record: ArrayRecord):
        arrays = {name: array.numpy() for name, array in record.items()}
        self.order = tuple(arrays)
        self.wanted = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in arrays.items()}
        # A pytree's leaves are sorted by name; the space knows which tensor was made last, and
        # which ones are running statistics.
        self.space = tree_space(dict(sorted(arrays.items())), arrays)
        self.vector = self.flat(arrays)

    def flat(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """Arrays as a vector [D] of float64, in which differences keep all digits of float32."""
        return np.concatenate([np.ravel(arrays[name]).astype(float) for name in self.space.slices])

    def record(self, vector: np.ndarray) -> ArrayRecord:
        """A vector [D] as arrays with the model's names, shapes and dtypes, in its order."""
        arrays = {}
        for name, place in self.space.slices.items():
            shape, dtype = self.wanted[name].shape, self.wanted[name].dtype
            part = vector[place].reshape(shape)
            arrays[name] = (np.rint(part) if dtype.kind in "iu" else part).astype(dtype)
        return ArrayRecord({name: Array(np.asarray(arrays[name])) for name in self.order})


class _Answer(NamedTuple):
    """A node's answer that can be used: its place among the N, its update [D], what it reports."""

    place: int
    update: np.ndarray
    metrics: dict[str, float]


class Defended(FedAvg):
    r"""Federated averaging whose mean is replaced by a defence, which keeps its state.

    Clients answer with their models, as those of `FedAvg`; from the differences to the global
    model, u_k [D], the server takes the step

    .. math:: w \leftarrow w + rate \cdot \mathrm{agg}(u_1, \dots, u_K)

    Every stage works as in a simulation: rows with NaN or infinity are left out, reported numbers
    of examples are the weights of rules that weigh, and histories are by node, in the order in
    which nodes first answered. An answer with an error, of other names, shapes or dtypes, or with
    more bytes than the model, is left out unread, and named in the log; the round goes on with the
    others, where the defence's bound allows it, and otherwise keeps the model.

    Args:
      defense: a name, a mapping with `name` and fields, a function of the stack, or a list of them.
      num_clients: N, how many nodes there can be, for rules with histories (None: as many as the
        first round has).
      rate: the server's learning rate.
      seed: of defences that draw any randomness.
      server_update: a function of the global model's arrays (name -> array) that returns what the
        server learned from its own examples, like one client's model, for rules such as `fltrust`.
      **options: those of Flower's `FedAvg`, such as `fraction_train`.

    Raises: `ConfigError` for unknown names and fields, a defence in local training, a bound that
    fails for the nodes of a round.

    Source: the message API of Flower 1.42 (`flwr.serverapp.strategy`).

    Example:
        >>> strategy = Defended({"name": "krum", "num_byzantine": 1}, fraction_evaluate=0.0)
        >>> [stage.registered_name for stage in strategy.defense.stages]
        ['krum']
    """

    def __init__(
        self,
        defense: Any,
        *,
        num_clients: int | None = None,
        rate: float = 1.0,
        seed: int = 0,
        server_update: Callable | None = None,
        **options,
    ):
        super().__init__(**options)
        self.defense = Defense.build(defense)
        if self.defense.client_stages:
            raise ConfigError(
                f"defense: {self.defense.client_stages[0].registered_name!r} acts in the clients' "
                f"local training, which is your app's; leave it out."
            )
        self._check_root(server_update)
        if not rate > 0:
            raise ConfigError(f"rate must be > 0, got {rate}.")
        self.num_clients, self.rate, self.server_update = num_clients, rate, server_update
        self._key = jax.random.key(seed)
        self._places: dict[int, int] = {}
        self._state: Any = None
        self._most: int | None = None  # nodes that the state has room for
        self._model: _Model | None = None
        self._asked = 0
        self._apply = jax.jit(self._defend)

    def _check_root(self, server_update: Callable | None) -> None:
        needing = core.needing(self.defense.stages, "root")
        if needing and server_update is None:
            raise ConfigError(
                f"server_update is missing: {needing[0]!r} compares clients with what the server "
                f"learned from its own examples."
            )
        if server_update is not None and not needing:
            raise ConfigError("server_update would be ignored: the defence does not read it.")

    def summary(self) -> None:
        """Logs the defence before Flower's options."""
        _log.info("Defence: %s", self.defense.dump_spec())
        super().summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Remembers the global model and asks the round's nodes."""
        self._model = _Model(arrays)
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self._asked = len(messages)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The global model after the defence's step, and metrics; (None, None) keeps the model.

        The metrics are the clients' weighted means, `aggregate-norm`, `absent`, the nodes without
        an answer that can be used, `excluded`, those whose answer holds NaN or infinity, and
        `kept`, the sum of the nodes' shares, where the rule keeps some of them.
        """
        if self._model is None:
            raise ConfigError("aggregate_train is called before configure_train.")
        if self._state is None:
            registered = self.num_clients or max(self._asked, 1)
            dim, space = self._model.vector.size, self._model.space
            self._state = self.defense.init(registered, dim, space)
            self._most = registered if jax.tree.leaves(self._state) else None
        answers = self._usable(list(replies))
        count = max(self._asked, len(answers))
        try:
            if not answers:
                raise ConfigError("no answer can be used.")
            check_components(self.defense.server_stages, "defense", Setting(len(answers)))
        except ConfigError as error:
            _log.error("Round %d keeps the model: %s", server_round, error)
            return None, None
        key = jax.random.fold_in(self._key, server_round)
        stack = self._stack(answers, count)
        params = np.float32(self._model.vector)
        aggregate, self._state, metrics = self._apply(
            key, *stack, self._state, params, self._learned(), np.int32(server_round - 1)
        )
        step = self.rate * np.asarray(aggregate, float)
        values = self._means(answers) | {
            "aggregate-norm": float(np.linalg.norm(aggregate)),
            "absent": count - len(answers),
            "excluded": int(metrics["excluded"].sum()),
        }
        if "kept" in metrics:
            values["kept"] = float(metrics["kept"].sum())
        return self._model.record(self._model.vector + step), MetricRecord(values)

    # --- Answers --------------------------------------------------------------------------------

    def _usable(self, replies: Sequence[Message]) -> list[_Answer]:
        """The answers that can be used; the others are named in the log."""
        answers = []
        for reply in replies:
            node = reply.metadata.src_node_id
            try:
                if reply.has_error():
                    raise wire.Refused(f"it failed: {one_line(reply.error.reason)}")
                answers.append(self._read(node, reply.content))
            except wire.Refused as error:
                _log.warning("The answer of node %d is left out: %s", node, error)
        return answers

    def _read(self, node: int, content: RecordDict) -> _Answer:
        model, record = self._model, content.get(self.arrayrecord_key)
        records = list(content.metric_records.values())
        if model is None or not isinstance(record, ArrayRecord):
            raise wire.Refused(f"it holds no arrays under {self.arrayrecord_key!r}")
        if len(records) != 1:
            raise wire.Refused(f"it holds {len(records)} records of metrics, not one")
        metrics = {
            name: float(value)
            for name, value in records[0].items()
            if isinstance(value, (int, float))
        }
        weight = metrics.get(self.weighted_by_key, math.nan)
        if not (math.isfinite(weight) and weight >= 0):
            raise wire.Refused(f"its {self.weighted_by_key!r} is no number of examples: {weight}")
        if sorted(record) != sorted(model.wanted):
            raise wire.Refused(f"its arrays are not the model's: {sorted(record)[:5]}")
        arrays = {
            name: wire.read_array(record[name], want.shape, want.dtype, name)
            for name, want in model.wanted.items()
        }
        place = self._places.setdefault(node, len(self._places))
        if self._most is not None and place >= self._most:
            del self._places[node]
            raise wire.Refused(f"the rule has histories of {self._most} nodes; raise num_clients")
        return _Answer(place, model.flat(arrays) - model.vector, metrics)

    def _stack(self, answers: Sequence[_Answer], count: int):
        """(updates [K, D], weights [K], ids [K], which arrived [K]) of K nodes that were asked."""
        absent = count - len(answers)
        rows = [np.float32(answer.update) for answer in answers]
        stack = np.pad(np.stack(rows), ((0, absent), (0, 0)))
        weights = [answer.metrics[self.weighted_by_key] for answer in answers] + [0.0] * absent
        places = [answer.place for answer in answers]
        free = [i for i in range(count + len(places)) if i not in places]
        arrived = np.arange(count) < len(answers)
        return stack, np.float32(weights), np.int32(places + free[:absent]), arrived

    def _means(self, answers: Sequence[_Answer]) -> dict[str, float]:
        """The weighted means of the metrics that all clients report."""
        common = set.intersection(*(set(answer.metrics) for answer in answers))
        if sum(answer.metrics[self.weighted_by_key] for answer in answers) == 0:
            return {}
        content = [
            RecordDict({"metrics": MetricRecord({n: answer.metrics[n] for n in sorted(common)})})
            for answer in answers
        ]
        return dict(self.train_metrics_aggr_fn(content, self.weighted_by_key))

    # --- The defence ----------------------------------------------------------------------------

    def _learned(self) -> np.ndarray | None:
        """What the server learned from its own examples [D]."""
        model = self._model
        if self.server_update is None or model is None:
            return None
        arrays = {n: array.numpy() for n, array in model.record(model.vector).items()}
        learned = {name: np.asarray(array) for name, array in self.server_update(arrays).items()}
        if {n: a.shape for n, a in learned.items()} != {
            n: w.shape for n, w in model.wanted.items()
        }:
            raise ConfigError("server_update must return arrays with the model's names and shapes.")
        return np.float32(model.flat(learned) - model.vector)

    def _defend(self, key, stack, weights, ids, arrived, state, params, learned, index):
        view = ServerView(
            params=params,
            weights=weights,
            client_ids=ids,
            valid=arrived,
            round=index,
            root=None if learned is None else ServerData(lambda: learned, _no_loss),
            space=self._model.space if self._model else None,
            rate=jnp.float32(self.rate),
        )
        defended = self.defense.apply(key, stack, state, view)
        return defended.aggregate, defended.state, defended.metrics


def _no_loss(params):
    raise ConfigError(
        "defense: it evaluates clients on the server's own examples, and a strategy has no loss; "
        "choose a rule that compares updates, such as 'fltrust'."
    )

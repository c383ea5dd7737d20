"""Attack and defence pipelines: how a list of components acts as one.

An attack is any number of data stages and update stages; a defence is stages in local training and
before aggregation, exactly one aggregator, and stages after it. Both are pytrees, so their numeric
fields are traced.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sec import core
from fedjax_sec.core import NO_HOOKS, ConfigError, Hooks, Setting, fill_defaults, paths_of, registry
from fedjax_sec.core.components import STAGES
from fedjax_sec.core.types import (
    AttackerView,
    ClientView,
    Message,
    Metrics,
    ServerView,
    Space,
)
from fedjax_sec.ops.moments import finite_rows, usable_rows


def _as_list(spec) -> list:
    if spec is None:
        return []
    if isinstance(spec, (Attack, Defense)):
        return list(spec.stages)
    return list(spec) if isinstance(spec, (list, tuple)) else [spec]


def _dump(stages):
    specs = [core.dump(stage) for stage in stages]
    return specs[0] if len(specs) == 1 else specs or None


class Defended(NamedTuple):
    """The result of a defence on a stack.

    `view` is the one behind its stages: which rows are valid, and who is in them. `aggregates` are
    the aggregator's result and what each stage behind it made of that, in order.
    """

    aggregate: Any
    state: Any
    metrics: Metrics
    view: ServerView
    aggregates: tuple


@core.pytree
class Defense:
    """Stages in local training and before aggregation, one aggregator, stages after it.

    Stages in local training only give `hooks`. All else is of the others, `server_stages`, whose
    states and randomness they do not shift.

    Rows that hold a NaN or an infinity are marked invalid before any stage runs and never reach
    the aggregate; `excluded` [K] marks them, of those that the view calls valid. When no row is
    left the aggregate is zero; `moved` says whether the aggregator's result is not. A stage that
    merges rows gives each row its `members`; `kept` [K] is of clients all the same.
    """

    stages: tuple[Any, ...]

    @classmethod
    def build(cls, spec, path: str = "defense") -> "Defense":
        """From a name, a mapping or a list of them; `ConfigError` unless one is an aggregator."""
        items = _as_list(spec)
        parts = tuple(
            fill_defaults(registry.defenses.build(item, at), {})
            for item, at in zip(items, paths_of(items, path), strict=True)
        )
        order = [part.stage for part in parts]
        if order.count("aggregate") != 1:
            raise ConfigError(
                f"{path}: a pipeline needs exactly one aggregator, got {order.count('aggregate')} "
                f"in {[part.registered_name for part in parts]}."
            )
        ranks = [STAGES["defense"].index(stage) for stage in order]
        if ranks != sorted(ranks):
            named = [f"{part.registered_name} ({part.stage})" for part in parts]
            raise ConfigError(
                f"{path}: stages must stand in the order {', '.join(STAGES['defense'])}; got "
                f"{named}."
            )
        return cls(parts)

    def dump_spec(self):
        return _dump(self.stages)

    @property
    def client_stages(self) -> tuple:
        """The stages in the clients' local training."""
        return tuple(stage for stage in self.stages if stage.stage == "client")

    @property
    def server_stages(self) -> tuple:
        """All other stages."""
        return tuple(stage for stage in self.stages if stage.stage != "client")

    def hooks(self, view: ClientView, honest) -> Hooks:
        """The additions of the stages in local training to a client's local steps.

        `honest` is a traced boolean: malicious clients follow those stages only that say so.
        """
        hooks = NO_HOOKS
        for stage in self.client_stages:
            added = stage.hooks(view)
            hooks = hooks.then(added if stage.malicious_follow else added.where(honest))
        return hooks

    def init(self, num_clients: int, dim: int, space: Space | None = None):
        stages = self.server_stages
        return tuple(core.init_stage(stage, num_clients, dim, space) for stage in stages)

    def apply(self, key, updates, state, view: ServerView) -> Defended:
        """Aggregates the stack [K, D]."""
        finite, clients = finite_rows(updates), updates.shape[0]
        metrics: Metrics = {"excluded": view.valid & ~finite}
        view = view._replace(valid=view.valid & finite)
        if view.members is None:
            view = view._replace(members=jnp.eye(clients, dtype=updates.dtype))
        new_state, aggregates = [], []
        for i, stage in enumerate(self.server_stages):
            stage_key = jax.random.fold_in(key, i)
            if stage.stage == "before":
                before = updates.shape[0]
                updates, view, new, extra = stage.apply(stage_key, updates, state[i], view)
                _check_rows(stage, before, updates.shape[0], clients, view)
            elif stage.stage == "aggregate":
                aggregate, new, extra = stage.apply(stage_key, updates, state[i], view)
                aggregates.append(aggregate)
                metrics["moved"] = jnp.any(aggregate != 0)
                if updates.shape[0] != clients and extra.get("kept") is not None:
                    extra = extra | {"kept": _of_clients(extra["kept"], view.members)}
            else:
                aggregate, new, extra = stage.apply(
                    stage_key, aggregates[-1], updates, state[i], view
                )
                aggregates.append(aggregate)
            new_state.append(new)
            for name, value in extra.items():
                metrics[name if name == "kept" else f"{stage.registered_name}/{name}"] = value
        return Defended(aggregates[-1], tuple(new_state), metrics, view, tuple(aggregates))


def _check_rows(stage, before: int, rows: int, clients: int, view: ServerView) -> None:
    """Raises where a stage changes the number of rows but not all that belongs to them."""
    if rows != before and stage.after(Setting(before)) == Setting(before):
        raise ConfigError(
            f"defense: {stage.registered_name!r} makes {rows} rows of {before}, so the bounds of "
            f"later stages are unknown; give it after(setting), which returns the setting with "
            f"num_clients rows and merged=True."
        )
    wanted = {"valid": (rows,), "weights": (rows,), "members": (rows, clients)}
    for name, shape in wanted.items():
        if jnp.shape(getattr(view, name)) != shape:
            raise ConfigError(
                f"defense: {stage.registered_name!r} returns {rows} rows of {clients} clients, so "
                f"view.{name} must be {list(shape)}, got {list(jnp.shape(getattr(view, name)))}."
            )


def _of_clients(kept, members):
    """[K]: each client's share, the mean over the rows [rows, K] that it is a member of."""
    return kept @ members / jnp.maximum(members.sum(axis=0), 1e-12)


class Poisoning(NamedTuple):
    """An attack on data, whether it poisons copies that it adds, and the clients [N] who run it."""

    stage: Any
    copies: bool
    clients: Any


def _poisonings_in(stage, malicious) -> Iterator[Poisoning]:
    """The poisonings by an attack on updates, and by those nested in it, of the clients [N]."""
    shares = {}
    if malicious is not None:
        ranks = jnp.cumsum(malicious) - 1
        shares = {name: malicious & mask for name, mask in stage.shares(ranks).items()}
    for field in dataclasses.fields(stage):
        part = getattr(stage, field.name)
        if field.metadata.get("kind") != "attack" or part is None:
            continue
        clients = shares.get(field.name, malicious)
        if part.stage == "update":
            yield from _poisonings_in(part, clients)
        elif field.metadata["poisons"]:
            yield Poisoning(part, stage.copies, clients)


class AttackState(NamedTuple):
    """The states of all attacks on data, in the order of `Attack.backdoors`, and on updates."""

    data: tuple
    update: tuple


@core.pytree
class Attack:
    """Data stages and update stages; an empty pipeline is no attack."""

    stages: tuple[Any, ...]

    @classmethod
    def build(cls, spec, path: str = "attack") -> "Attack":
        """From null, a name, a mapping or a list of them."""
        items = _as_list(spec)
        attack = cls(
            tuple(
                registry.attacks.build(item, at)
                for item, at in zip(items, paths_of(items, path), strict=True)
            )
        )
        if sum(one.copies for one in attack.poisonings()) > 1:
            raise ConfigError(f"{path}: only one attack of a pipeline can add poisoned copies.")
        return attack

    def dump_spec(self):
        return _dump(self.stages)

    def poisonings(self, malicious=None) -> list[Poisoning]:
        """Each attack on data and the clients [N] who run it; those in update stages come last."""
        data = [stage for stage in self.stages if stage.stage == "data"]
        direct = [Poisoning(stage, False, malicious) for stage in data]
        inner = [one for stage in self.update_stages for one in _poisonings_in(stage, malicious)]
        return direct + inner

    def poisoned_by(self, malicious):
        """[P, N]: which clients carry out each attack on data, of the malicious ones [N]."""
        return jnp.stack([one.clients for one in self.poisonings(malicious)])

    @property
    def data_stages(self) -> tuple:
        """The attacks on the clients' data, those inside update stages last."""
        return tuple(one.stage for one in self.poisonings())

    @property
    def adds_copies(self) -> bool:
        """Whether malicious clients train on more examples than they hold."""
        return any(one.copies for one in self.poisonings())

    @property
    def update_stages(self) -> tuple:
        """The attacks on updates."""
        return tuple(stage for stage in self.stages if stage.stage == "update")

    @property
    def backdoors(self) -> tuple:
        """All attacks on data, wherever they are nested; evaluation measures the first."""
        everything = (one for stage in self.stages for _, one, _ in core.walk(stage))
        return tuple(one for one in everything if one.stage == "data")

    @property
    def backdoor(self):
        """The component whose success evaluation measures, or None."""
        return next(iter(self.backdoors), None)

    def poison_tests(self, key, state: AttackState, x, y, held, who, ranks, task):
        """One client's own test examples [T, ...] as the attacks leave them that poison these.

        `held` [T] is false where a row is padding; `who` and `ranks` [P] as in `poison`.
        """
        memory, labels = self.memory(state), task.task.labels_of(y)
        for i, (stage, _, _) in enumerate(self.poisonings()):
            if not stage.local_test:
                continue
            choose_key, stage_key = jax.random.split(jax.random.fold_in(key, i))
            mine = stage.choose(choose_key, labels, held) & who[i]
            poisoned_x, poisoned_y = stage.poison(stage_key, memory(stage), x, y, ranks[i], task)
            x, y = where_rows(mine, poisoned_x, x), where_rows(mine, poisoned_y, y)
        return x, y

    def init(self, num_clients: int, dim: int, setting=None, task=None) -> AttackState:
        """The states before round 0; those of attacks on data need an experiment's task."""
        data = () if task is None else tuple(b.init(setting, task) for b in self.backdoors)
        return AttackState(data, tuple(s.init(num_clients, dim) for s in self.update_stages))

    def memory(self, state: AttackState) -> Callable:
        """attack on data -> its state."""
        pairs = list(zip(self.backdoors, state.data, strict=True)) if state.data else []

        def of(attack):
            return next((memory for one, memory in pairs if one is attack), ())

        return of

    def prepare(self, key, state: AttackState, view: AttackerView) -> AttackState:
        """The states of this round, before anybody trains."""
        if not jax.tree.leaves(state.data):
            return state
        data = [
            attack.prepare(jax.random.fold_in(key, i), memory, view)
            for i, (attack, memory) in enumerate(zip(self.backdoors, state.data, strict=True))
        ]
        return state._replace(data=tuple(data))

    def choose(self, key, labels, held):
        """Which of a malicious client's examples each data stage poisons: a [M] mask for each."""
        return tuple(
            stage.choose(jax.random.fold_in(key, i), labels, held)
            for i, stage in enumerate(self.data_stages)
        )

    def copied(self, chosen, who):
        """Which examples [M] the client copies to be poisoned, of what `choose` chose."""
        poisonings = zip(chosen, self.poisonings(), who, strict=True)
        masks = [mask & does for mask, one, does in poisonings if one.copies]
        return masks[0] if masks else jnp.zeros_like(chosen[0])

    def poison(self, key, state: AttackState, x, y, position, chosen, who, ranks, task, is_copy):
        """Poisons one client's batch with every data stage, one after the other.

        `who [P]` says which of them this client carries out, `ranks [P]` count those who do.
        `is_copy` says which entries are copies, made to be poisoned by the stage that adds them.
        """
        memory = self.memory(state)
        for i, (stage, copies, _) in enumerate(self.poisonings()):
            stage_key = jax.random.fold_in(key, i)
            poisoned_x, poisoned_y = stage.poison(stage_key, memory(stage), x, y, ranks[i], task)
            mine = (is_copy if copies else chosen[i][position]) & who[i]
            x = jnp.where(mine.reshape(-1, *[1] * (x.ndim - 1)), poisoned_x, x)
            y = jnp.where(mine.reshape(-1, *[1] * (y.ndim - 1)), poisoned_y, y)
        return x, y

    def apply(
        self, key, message: Message, state: AttackState, view: AttackerView
    ) -> tuple[Message, AttackState, Metrics]:
        """Every stage sees visible rows only and writes malicious rows only, of every leaf.

        Rows that would spoil a sum of squares (`usable_rows`) are not visible.
        """
        view = view._replace(memory=self.memory(state))
        new_state, metrics = [], {}
        for i, stage in enumerate(self.update_stages):
            stage_key, updates = jax.random.fold_in(key, i), message.vector
            known = view._replace(visible=view.visible & usable_rows(updates))
            # A huge update of its client's own is in no statistic, but may be flipped or scaled.
            rows = known.visible | (view.malicious & finite_rows(updates))
            seen = jnp.where(rows[:, None], updates, 0.0)
            if stage.rewrites == "message":
                rest = jax.tree.map(functools.partial(_visible, rows), message[1:])
                crafted, new, extra = stage.tamper(
                    stage_key, Message(seen, *rest), state.update[i], known
                )
                message = jax.tree.map(
                    functools.partial(where_rows, view.malicious), crafted, message
                )
            else:
                vector, new, extra = stage.apply(stage_key, seen, state.update[i], known)
                message = message._replace(
                    vector=jnp.where(view.malicious[:, None], vector, updates)
                )
            new_state.append(new)
            metrics |= {f"{stage.registered_name}/{name}": v for name, v in extra.items()}
        return message, state._replace(update=tuple(new_state)), metrics

    def remember(self, state: AttackState, message: Message, rows, view) -> AttackState:
        """The states at the end of a round, from the messages before the attack."""
        if not self.update_stages:
            return state
        rows = rows & usable_rows(message.vector)
        pairs = zip(self.update_stages, state.update, strict=True)
        update = tuple(stage.remember(one, message, rows, view) for stage, one in pairs)
        return state._replace(update=update)


def where_rows(rows, chosen, other):
    """`jnp.where` of the rows [K] of a leaf [K, ...]."""
    return jnp.where(rows.reshape(-1, *[1] * (chosen.ndim - 1)), chosen, other)


def _visible(rows, leaf):
    return where_rows(rows, leaf, jnp.zeros_like(leaf))


registry.BUILDERS |= {"attack pipeline": Attack.build, "defense pipeline": Defense.build}

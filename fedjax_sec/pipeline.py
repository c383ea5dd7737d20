"""Attack and defence pipelines: how a list of components acts as one.

An attack is any number of data stages and update stages; a defence is stages before aggregation,
exactly one aggregator, and stages after it. Both are pytrees, so their numeric fields are traced.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sec import registry, schema
from fedjax_sec.ops.moments import finite_rows
from fedjax_sec.ops.precision import wide
from fedjax_sec.schema import ConfigError
from fedjax_sec.types import AttackerView, Metrics, ServerView


class Setting(NamedTuple):
    """What is known before anything compiles, for the components' `check(path, setting)`.

    `num_clients` K in a round; `num_malicious` m among the registered clients (None: unknown);
    `sampled`: only some registered clients take part in a round; `capacity` M, `example_shape` of
    one input, `num_classes` and the names of the model's `layers` (None: unknown); `knowledge`,
    which updates the adversary sees, as `threat.knowledge` (None: unknown).
    """

    num_clients: int
    num_malicious: int | None = None
    sampled: bool = False
    capacity: int | None = None
    example_shape: tuple[int, ...] | None = None
    num_classes: int | None = None
    layers: tuple[str, ...] | None = None
    knowledge: str | None = None


def _as_list(spec) -> list:
    if spec is None:
        return []
    return list(spec) if isinstance(spec, (list, tuple)) else [spec]


def _dump(stages):
    specs = [schema.dump(stage) for stage in stages]
    return specs[0] if len(specs) == 1 else specs or None


def _paths(items: Sequence, path: str) -> list[str]:
    return [path] if len(items) == 1 else [f"{path}[{i}]" for i in range(len(items))]


def check_components(components, path: str, setting: Setting) -> None:
    """Runs every component's own `check`; raises what the first failing one raises.

    A component whose fields follow schedules is checked with each of their values. One that would
    do nothing with any of them, nested ones too, is refused: its `idle(setting)` says why, or None.
    """
    for part, place in zip(components, _paths(components, path), strict=True):
        if hasattr(part, "check"):
            for one in schema.every_value(part):
                one.check(place, setting)
        for at, nested in walk(part, place):
            if hasattr(nested, "idle"):
                reasons = [one.idle(setting) for one in schema.every_value(nested)]
                if all(reasons):
                    raise ConfigError(f"{at}: {reasons[0]}")


def walk(part, path: str):
    """The component and all components inside it, each with its path."""
    yield path, part
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if dataclasses.is_dataclass(value) and hasattr(value, "registered_name"):
            yield from walk(value, f"{path}.{field.name}")


def fill_num_byzantine(part, num_malicious: int | None):
    """Sets f where it was left open: to `num_malicious`, in nested components to the outer's f."""
    changes = {}
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if field.name == "num_byzantine" and value is None and num_malicious is not None:
            changes[field.name] = num_malicious
        elif dataclasses.is_dataclass(value) and hasattr(value, "registered_name"):
            inner = changes.get("num_byzantine", getattr(part, "num_byzantine", num_malicious))
            changes[field.name] = fill_num_byzantine(value, inner)
    return dataclasses.replace(part, **changes) if changes else part


@schema.pytree
class Defense:
    """Stages before aggregation, one aggregator, stages after it.

    Rows that hold a NaN or an infinity are marked invalid before any stage runs and never reach
    the aggregate; `excluded` counts them. When no row is left the aggregate is zero.
    `flipped` [D], where a stage follows the aggregator, says which coordinates these stages
    negated: it is seen in their results, so it holds for any stage, whatever its name.
    """

    stages: tuple[Any, ...]

    @classmethod
    def build(cls, spec, path: str = "defense") -> "Defense":
        """From a name, a mapping or a list of them; `ConfigError` unless one is an aggregator."""
        if isinstance(spec, cls):
            return spec
        items = _as_list(spec)
        parts = tuple(
            fill_num_byzantine(registry.defenses.build(item, at), None)
            for item, at in zip(items, _paths(items, path), strict=True)
        )
        order = [part.stage for part in parts]
        if order.count("aggregate") != 1:
            raise ConfigError(
                f"{path}: a pipeline needs exactly one aggregator, got {order.count('aggregate')} "
                f"in {[part.registered_name for part in parts]}."
            )
        ranks = [("before", "aggregate", "after").index(stage) for stage in order]
        if ranks != sorted(ranks):
            named = [f"{part.registered_name} ({part.stage})" for part in parts]
            raise ConfigError(
                f"{path}: stages must stand in the order before, aggregate, after; got {named}."
            )
        return cls(parts)

    def dump_spec(self):
        return _dump(self.stages)

    def init(self, num_clients: int, dim: int):
        return tuple(stage.init(num_clients, dim) for stage in self.stages)

    def apply(self, key, updates, state, view: ServerView) -> tuple[Any, Any, Metrics]:
        """[K, D] -> ([D], state, metrics)."""
        finite = finite_rows(updates)
        view = view._replace(valid=view.valid & finite)
        metrics: Metrics = {"excluded": (~finite).sum()}
        new_state, aggregate, flipped = [], None, None
        for i, stage in enumerate(self.stages):
            stage_key = jax.random.fold_in(key, i)
            if stage.stage == "before":
                updates, view, new, extra = stage.apply(stage_key, updates, state[i], view)
            elif stage.stage == "aggregate":
                aggregate, new, extra = stage.apply(stage_key, updates, state[i], view)
            else:
                before = aggregate
                aggregate, new, extra = stage.apply(stage_key, before, updates, state[i], view)
                turned = _turned(before, aggregate)
                flipped = turned if flipped is None else flipped ^ turned
            new_state.append(new)
            for name, value in extra.items():
                metrics[name if name == "kept" else f"{stage.registered_name}/{name}"] = value
        if flipped is not None:
            metrics["flipped"] = flipped
        return aggregate, tuple(new_state), metrics


def _turned(before, after):
    """[D]: coordinates that became minus themselves, up to rounding; zeros did not.

    What noise or clipping does to a coordinate is no such thing, even where its sign changes.
    """
    return (before != 0) & (jnp.abs(after + before) <= 1e-6 * jnp.abs(before))


def _usable(updates):
    """[K]: rows whose squares are finite, with room for a sum over all rows.

    One client with NaN, infinity or numbers beyond 1e18 would otherwise spoil every statistic that
    an attack is made from, and the server would leave out what it sends.
    """
    dtype = wide(updates.dtype)
    squares = jnp.sum(jnp.square(updates.astype(dtype)), axis=1)
    return squares < jnp.finfo(dtype).max / (4 * updates.shape[0])


@schema.pytree
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
                for item, at in zip(items, _paths(items, path), strict=True)
            )
        )
        if sum(copies for _, copies in attack._poisoning) > 1:
            raise ConfigError(f"{path}: only one attack of a pipeline can add poisoned copies.")
        return attack

    def dump_spec(self):
        return _dump(self.stages)

    @property
    def _poisoning(self) -> list[tuple[Any, bool]]:
        """Each attack on the clients' data, and whether it poisons copies that it adds."""
        found = [(stage, False) for stage in self.stages if stage.stage == "data"]
        others = [stage for stage in self.stages if getattr(stage, "poisons", False)]
        return found + [(stage.backdoor, stage.copies) for stage in others]

    @property
    def data_stages(self) -> tuple:
        """The attacks on the clients' data, those inside update stages last."""
        return tuple(stage for stage, _ in self._poisoning)

    @property
    def adds_copies(self) -> bool:
        """Whether malicious clients train on more examples than they hold."""
        return any(copies for _, copies in self._poisoning)

    @property
    def update_stages(self) -> tuple:
        return tuple(stage for stage in self.stages if stage.stage == "update")

    @property
    def backdoor(self):
        """The component whose success evaluation measures, or None."""
        for stage in self.stages:
            found = stage if stage.stage == "data" else getattr(stage, "backdoor", None)
            if found is not None:
                return found
        return None

    def init(self, num_clients: int, dim: int):
        return tuple(stage.init(num_clients, dim) for stage in self.update_stages)

    def choose(self, key, labels, held):
        """Which of a malicious client's examples each data stage poisons: a [M] mask for each."""
        return tuple(
            stage.choose(jax.random.fold_in(key, i), labels, held)
            for i, stage in enumerate(self.data_stages)
        )

    def copied(self, chosen):
        """Which examples [M] are copied to be poisoned, of what `choose` chose."""
        masks = [mask for mask, (_, copies) in zip(chosen, self._poisoning, strict=True) if copies]
        return masks[0] if masks else jnp.zeros_like(chosen[0])

    def poison(self, key, x, y, position, chosen, rank, task, is_copy):
        """Poisons one malicious client's batch with every data stage, one after the other.

        `is_copy` says which entries are copies, made to be poisoned by the stage that adds them.
        """
        for i, (stage, copies) in enumerate(self._poisoning):
            own = jax.random.fold_in(key, i)
            poisoned_x, poisoned_y = stage.poison(own, x, y, position, rank, task)
            mine = is_copy if copies else chosen[i][position]
            x = jnp.where(mine.reshape(-1, *[1] * (x.ndim - 1)), poisoned_x, x)
            y = jnp.where(mine, poisoned_y, y)
        return x, y

    def apply(self, key, updates, state, view: AttackerView) -> tuple[Any, Any, Metrics]:
        """[K, D] -> [K, D]: every stage sees visible rows only and writes malicious rows only.

        Rows without a use are not visible (`_usable`): the server leaves most of them out as well.
        """
        new_state, metrics = [], {}
        for i, stage in enumerate(self.update_stages):
            known = view._replace(visible=view.visible & _usable(updates))
            seen = jnp.where(known.visible[:, None], updates, 0.0)
            crafted, new, extra = stage.apply(jax.random.fold_in(key, i), seen, state[i], known)
            updates = jnp.where(view.malicious[:, None], crafted, updates)
            new_state.append(new)
            metrics |= {f"{stage.registered_name}/{name}": v for name, v in extra.items()}
        return updates, tuple(new_state), metrics

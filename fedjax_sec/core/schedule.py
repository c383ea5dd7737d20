"""Schedules: numeric fields that change from round to round."""

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sec.core.advice import shown, suggestion
from fedjax_sec.core.fields import COUNT, ConfigError, pytree
from fedjax_sec.core.values import admit, dump, plain

#: Kind of a schedule -> its values between the rounds that it names.
SCHEDULES = {
    "steps": "each value from its round on",
    "linear": "straight lines between the points, constant outside them",
    "exponential": "a constant factor a round between the points, constant outside them",
}
_BETWEEN = ("linear", "exponential")  # their values lie between those of the points


@pytree
class Schedule:
    """A numeric field that changes from round to round: `values[i]` is its value at `rounds[i]`.

    Points and values are leaves, so schedules of one kind with equally many points share a
    compiled program. `round.py` replaces every schedule by its value before a component sees it.
    """

    kind: str = dataclasses.field(metadata={"static": True})
    rounds: tuple[Any, ...]
    values: tuple[Any, ...]

    def at(self, index) -> Any:
        """The value in round number `index`, counted from 0; everything may be traced.

        >>> Schedule("steps", (0, 100), (0.0, 4.0)).at(jnp.arange(99, 101)).tolist()
        [0.0, 4.0]
        >>> Schedule("linear", (10, 20), (1.0, 2.0)).at(jnp.array([0, 15, 20, 90])).tolist()
        [1.0, 1.5, 2.0, 2.0]
        >>> Schedule("exponential", (0, 2), (1.0, 0.25)).at(jnp.arange(4)).tolist()
        [1.0, 0.5, 0.25, 0.25]
        """
        value = self.values[0]
        for i in range(1, len(self.rounds)):
            begin, end, new = self.rounds[i - 1], self.rounds[i], self.values[i]
            if self.kind in _BETWEEN:
                share = jnp.clip((index - begin) / (end - begin), 0.0, 1.0)
                old = self.values[i - 1]
                # As a weighted sum, or a product of powers, it is exact at both ends.
                if self.kind == "linear":
                    new = old * (1.0 - share) + new * share
                else:
                    new = old ** (1.0 - share) * new**share
                value = jnp.where(index > begin, new, value)
            else:
                value = jnp.where(index >= end, new, value)
        return value

    def number_at(self, index: int) -> float | int:
        """As `at`, of Python numbers alone."""
        if self.kind == "linear":
            return float(np.interp(index, self.rounds, self.values))
        if self.kind == "exponential":
            return float(np.exp(np.interp(index, self.rounds, np.log(self.values))))
        return [v for r, v in zip(self.rounds, self.values, strict=True) if r <= index][-1]

    def dump_spec(self) -> dict:
        """The mapping from which `build_schedule` makes an equal schedule."""
        plain = [[dump(item) for item in part] for part in (self.rounds, self.values)]
        return {"schedule": self.kind, "values": dict(zip(*plain, strict=True))}


def build_schedule(spec, hint, path: str, metadata: Mapping) -> Schedule:
    """A schedule from `{schedule: KIND, values: {round: value}}`, every value checked.

    >>> build_schedule({"schedule": "steps", "values": {0: 0, 9: 4}}, float, "x", {}).values
    (0.0, 4.0)
    """
    spec = dict(spec.dump_spec() if isinstance(spec, Schedule) else spec)
    if "schedule" not in spec:
        raise ConfigError(
            f"{path}: expected a number, or a schedule such as "
            f"{{schedule: steps, values: {{0: 0.1, 100: 0.01}}}}, got {shown(spec)}."
        )
    for key in spec:
        if key not in ("schedule", "values"):
            raise ConfigError(
                f"{path}: a schedule has no key {shown(key)}."
                f"{suggestion(key, ('schedule', 'values'))} "
                f"Known keys: schedule, values."
            )
    kind, points = spec["schedule"], spec.get("values")
    if not isinstance(kind, str) or kind not in SCHEDULES:
        known = ", ".join(f"{name} ({doc})" for name, doc in SCHEDULES.items())
        raise ConfigError(
            f"{path}.schedule: unknown {shown(kind)}.{suggestion(kind, SCHEDULES)} Known: {known}."
        )
    if not isinstance(points, Mapping) or not points:
        raise ConfigError(
            f"{path}.values must map rounds to values, such as {{0: 0.1, 100: 0.01}}, "
            f"got {shown(points)}."
        )
    args = [a for a in typing.get_args(hint) or (hint,) if a is not type(None)]
    by_round = {}
    for key, value in points.items():
        number = plain(key)
        if isinstance(number, str) and number.isascii() and number.isdigit() and len(number) < 11:
            number = int(number)
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= COUNT:
            most = f" and <= {COUNT}" if isinstance(number, int) and number > COUNT else ""
            raise ConfigError(
                f"{path}.values: a round must be an integer >= 0{most}, got {shown(key)}."
            )
        if number in by_round:
            raise ConfigError(f"{path}.values: round {number} is given twice.")
        by_round[number] = admit(value, args[0], metadata, f"{path}.values.{number}")
    if kind == "steps" and 0 not in by_round:
        raise ConfigError(
            f"{path}.values: steps need a value for round 0, the first is for round "
            f"{min(by_round)}."
        )
    article = "an" if kind[0] in "aeiou" else "a"
    if kind in _BETWEEN and len(by_round) < 2:
        raise ConfigError(f"{path}.values: {article} {kind} schedule needs at least two rounds.")
    if kind in _BETWEEN and args[0] is int:
        raise ConfigError(
            f"{path} is an integer, which {article} {kind} schedule would leave; use steps."
        )
    if kind == "exponential" and (low := [v for v in by_round.values() if v <= 0]):
        raise ConfigError(
            f"{path}.values: an exponential schedule needs values > 0, got {low[0]}; use linear."
        )
    return Schedule(kind, tuple(sorted(by_round)), tuple(by_round[key] for key in sorted(by_round)))


def _is_schedule(node) -> bool:
    return isinstance(node, Schedule)


def _map_schedules(function, tree):
    return jax.tree.map(
        lambda leaf: function(leaf) if _is_schedule(leaf) else leaf, tree, is_leaf=_is_schedule
    )


def resolve(tree, index):
    """The tree of components with every schedule replaced by its value in round `index`."""
    return _map_schedules(lambda schedule: schedule.at(index), tree)


def has_schedules(tree) -> bool:
    """Whether a field anywhere in the tree of components follows a schedule."""
    return any(map(_is_schedule, jax.tree.leaves(tree, is_leaf=_is_schedule)))


def every_value(component) -> Iterator[Any]:
    """The component as it is in each round where one of its schedules has a point.

    Python numbers throughout, for checks; a component without schedules alone.
    """
    leaves = jax.tree.leaves(component, is_leaf=_is_schedule)
    rounds = {number for leaf in leaves if _is_schedule(leaf) for number in leaf.rounds}
    if not rounds:
        yield component
    for number in sorted(rounds):
        yield _map_schedules(lambda schedule, at=number: schedule.number_at(at), component)

"""Loggers: the rows of `metrics.jsonl`, written for other programs while a run goes on.

`metrics.jsonl` stays the truth: a logger gets the rows that are in it, in their order, also those
of before an interruption, and nothing else.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from fedjax_sec.core.advice import shown, suggestion
from fedjax_sec.core.fields import ConfigError
from fedjax_sec.core.values import plain

#: Name -> the package that it needs.
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


class Run(NamedTuple):
    """What a logger knows of a run before its first row.

    `path` is its folder below the sweep's, empty of a single run; `name` and `group` are for
    people, `axes` maps the axes of the grid to its labels, and `config` is resolved.
    """

    path: str
    name: str
    group: str | None
    axes: Mapping[str, str]
    seed: int
    config: Mapping[str, Any]

    @property
    def settings(self) -> dict[str, str | float]:
        """The labels of the axes, as numbers where they are some, and the seed."""
        return {axis: number_of(label) for axis, label in self.axes.items()} | {"seed": self.seed}


class Logger(Protocol):
    """Writes the rows of one run, each at once; what it raises stops no run."""

    #: Its folder in the run's or the sweep's.
    below: str

    def __init__(self, run: Run, folder: Path, goes_on: bool):
        """Begins anew in the folder; with `goes_on` it then gets the rows of before again."""
        ...

    def log(self, row: Mapping[str, Any]) -> None:
        """Writes a row of `metrics.jsonl`."""
        ...

    def close(self, finished: bool) -> None:
        """Ends; `finished` says whether the run has reached its last round."""
        ...


def names_of(given: Any, path: str = "logging") -> tuple[str, ...]:
    """Names of loggers, each once, from null, names separated by commas, or a list of them.

    >>> names_of("wandb"), names_of(None), names_of(["tensorboard,wandb", "wandb"])
    (('wandb',), (), ('tensorboard', 'wandb'))
    """
    given, known = plain(given), ", ".join(PACKAGES)
    given = [] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(given, (list, tuple)):
        raise ConfigError(f"{path} must be a list of {known}, got {shown(given)}.")
    names = []
    for one in given:
        names += [part.strip() for part in one.split(",")] if isinstance(one, str) else [one]
    for name in names:
        if not isinstance(name, str) or name not in PACKAGES:
            raise ConfigError(
                f"{path}: unknown logger {shown(name)}.{suggestion(name, PACKAGES)} Known: {known}."
            )
    return tuple(dict.fromkeys(names))


def with_more(spec: Mapping[str, Any], more: Any, path: str = "logging") -> dict[str, Any]:
    """The mapping of an experiment or a sweep with more loggers beside its own.

    >>> with_more({"logging": "wandb"}, ["tensorboard"])
    {'logging': ['wandb', 'tensorboard']}
    """
    if not (names := names_of(more, path)):
        return dict(spec)
    return {**spec, "logging": list(dict.fromkeys([*names_of(spec.get("logging")), *names]))}


def number_of(label: str) -> str | float:
    """A label as a number, where it is one that is finite.

    >>> number_of("0.1"), number_of("krum")
    (0.1, 'krum')
    """
    try:
        number = float(label)
    except ValueError:
        return label
    return number if math.isfinite(number) else label


def points(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row of metrics but its round; null is NaN, and lists are left out.

    >>> points({"round": 5, "loss": None, "accuracy": 0.5, "kept": [1.0, 0.0]})
    {'loss': nan, 'accuracy': 0.5}
    """
    return {
        name: math.nan if value is None else float(value)
        for name, value in row.items()
        if name != "round" and not isinstance(value, (list, dict))
    }

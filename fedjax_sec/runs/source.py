"""An experiment's data on the host, and its network: what needs no population."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from fedjax_sec.core import ConfigError, value_of
from fedjax_sec.core.space import make_space
from fedjax_sec.core.types import Auxiliary, Model, Space
from fedjax_sec.data import Source, checked, take
from fedjax_sec.runs.config import Experiment
from fedjax_sec.runs.tuning import Choice, candidates


@functools.lru_cache(maxsize=4)
def _load(dataset, data_dir, download, max_train, max_test):
    source = checked(dataset.load(data_dir, download), dataset.registered_name)
    return take(source, max_train, max_test)


def load_source(experiment: Experiment) -> Source:
    """The data set of an experiment, read once in a process, normalised as the experiment says."""
    data = experiment.data
    # The component is the key, not its name: a data set that is registered again is read again.
    source = _load(data.dataset(), data.data_dir, data.download, data.max_train, data.max_test)
    if data.mean is None:
        return source
    for name in ("mean", "std"):
        given, channels = getattr(data, name), len(getattr(source, name))
        if len(given) != channels:
            raise ConfigError(
                f"data.{name} must hold {channels} numbers, one for each channel of "
                f"{source.label}, got {list(given)}."
            )
    return source._replace(mean=data.mean, std=data.std)


def _brought(experiment: Experiment) -> Iterator[tuple[Any, int | None, Source]]:
    """(data set, class, source) of the examples that attacks on data bring along, each once."""
    data, given = experiment.data, experiment.evaluation.backdoor
    attacks = (*experiment.attack.backdoors, *([] if given is None else [given]))
    for dataset, label in dict.fromkeys(one.auxiliary for one in attacks if one.auxiliary):
        yield dataset, label, _load(dataset, data.data_dir, data.download, None, None)


def load_auxiliary(experiment: Experiment, source: Source) -> dict:
    """(data set, class) -> the examples that attacks bring along, stored as those of `source`.

    Raises `ConfigError` where they are no inputs of the experiment's network.
    """
    return {
        (dataset, label): _stored_as(source, given, label)
        for dataset, label, given in _brought(experiment)
    }


def _stored_as(source: Source, given: Source, label: int | None) -> Auxiliary:
    ours, theirs = source.x_train, given.x_train
    if ours.shape[1:] != theirs.shape[1:] or source.input_kind != given.input_kind:
        raise ConfigError(
            f"attack: the examples of {given.name!r} are {given.input_kind} of shape "
            f"{list(theirs.shape[1:])}, and those of {source.name!r} are {source.input_kind} of "
            f"shape {list(ours.shape[1:])}; name another data set in the attack."
        )
    arrays = {}
    for part in ("train", "test"):
        x, y = getattr(given, f"x_{part}"), getattr(given, f"y_{part}")
        kept = np.ones(len(y), bool) if label is None else y == label
        if not kept.any():
            raise ConfigError(
                f"attack: {given.name!r} has no {part} example of class {label}; it has "
                f"{', '.join(map(str, np.unique(y)[:20]))}."
            )
        x = x[kept]
        if given.scale != source.scale or x.dtype != ours.dtype:
            x = x * (source.scale / given.scale)
            x = (np.rint(x) if ours.dtype == np.uint8 else x).astype(ours.dtype)
        arrays |= {f"x_{part}": x, f"y_{part}": y[kept]}
    return Auxiliary(**arrays)


def withheld(experiment: Experiment, source: Source) -> np.ndarray:
    """Positions in the training part that nobody may hold, since attacks use these examples.

    They are known by their numbers. Raises `ConfigError` where the data set has none.
    """
    ids = [np.empty(0, np.int32)]
    for _, _, given in _brought(experiment):
        if given.taken_from == source.name:
            ids += [one for one in (given.ids_train, given.ids_test) if one is not None]
            if source.ids_train is None:
                raise ConfigError(
                    f"attack: the examples of {given.name!r} are to be withheld from all clients, "
                    f"and {source.label} does not number its examples; prepare it anew."
                )
    if source.ids_train is None:
        return np.empty(0, np.int64)
    return np.flatnonzero(np.isin(source.ids_train, np.concatenate(ids)))


class Network(NamedTuple):
    """A model and the space of its parameters."""

    model: Model
    space: Space


def network_of(experiment: Experiment, source: Source, choice: Choice | None = None) -> Network:
    """The experiment's network, its convolutions computed as chosen (None: as the rule says)."""
    component = experiment.model
    convolution = value_of(component, "convolution")
    if convolution is not None:
        if choice is None or choice.convolution is None:
            choice = candidates("vmap", None, convolution, 1)[0]
        component = dataclasses.replace(component, convolution=choice.convolution)
    return make_network(component, source.x_train.shape[1:], source.num_classes)


@functools.lru_cache(maxsize=16)
def make_network(component, shape: tuple, classes: int) -> Network:
    """A model for inputs of a shape, and its space, which traces the drawing of parameters.

    Made once in a process, for all seeds and groups of a sweep.
    """
    model = component.make(shape, classes)
    return Network(model, make_space(model))

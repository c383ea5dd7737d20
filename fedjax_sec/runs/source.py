"""An experiment's data on the host, and its network: what needs no population."""

import dataclasses
import functools
from typing import NamedTuple

from fedjax_sec.core import ConfigError, value_of
from fedjax_sec.core.space import make_space
from fedjax_sec.core.types import Model, Space
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
    model = component.make(source.x_train.shape[1:], source.num_classes)
    return Network(model, make_space(model))

"""Checks on an experiment's data: whatever stops it, or makes it silently do nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sec import core
from fedjax_sec.core import ConfigError, Setting, value_of
from fedjax_sec.core.random import Stream, stream
from fedjax_sec.core.types import BoundTask
from fedjax_sec.data import Source
from fedjax_sec.ops.layers import layer_sizes
from fedjax_sec.round import Population
from fedjax_sec.runs.config import Experiment
from fedjax_sec.runs.memory import check_stack, device_memory


def setting_on_data(
    experiment: Experiment, source: Source, task, shapes, dim: int, capacity: int, auxiliary: dict
):
    """The setting with what only the data tells; components are checked against it."""
    return experiment.setting(
        capacity=capacity,
        example_shape=tuple(source.x_train.shape[1:]),
        num_classes=source.num_classes,
        layers=tuple(layer_sizes(shapes)),
        num_parameters=dim,
        examples=len(source.y_train),
        inputs=source.input_kind,
        labelled=has_labels(task, source),
        auxiliary=auxiliary,
    )


def refuse_unsharded(experiment: Experiment, processes: int) -> None:
    """Raises where several processes could not compute a round of the experiment together."""
    if experiment.execution.clients != "sharded":
        raise ConfigError(
            f"execution.clients must be 'sharded' where {processes} processes compute a round "
            f"together, got {experiment.execution.clients!r}."
        )
    if experiment.clients_per_round < processes:
        raise ConfigError(
            f"{processes} processes compute a round together, and it has "
            f"{experiment.clients_per_round} client(s): each process needs at least one. Ask for "
            f"fewer processes."
        )


def refuse_objects(experiment: Experiment) -> None:
    """Raises for objects that were given from Python, which no other process has."""
    if names := experiment.in_no_file:
        raise ConfigError(
            f"together: other processes compute the run, and {names[0]} is an object given from "
            f"Python, which is in this one alone. Leave together out, or name a component or a "
            f"file."
        )


def has_labels(task, source: Source) -> bool:
    """Whether an example has one class."""
    return task.labels_of(np.asarray(source.y_train[:1])) is not None


def check_on_data(experiment: Experiment, source: Source, setting: Setting) -> None:
    """`Experiment.check` with what only the data tells, and the numbers that must fit it."""
    check_stack(experiment.clients_per_round, setting.num_parameters, device_memory())
    known = {name: getattr(setting, name) for name in FROM_DATA}
    experiment.check(**known)
    images = experiment.evaluation.evasion_images
    if images is not None and images > len(source.y_test):
        raise ConfigError(
            f"evaluation.evasion_images must be <= {len(source.y_test)}, the test examples of "
            f"{source.label}, got {images}."
        )


#: The fields of a setting that only the data tells.
FROM_DATA = (
    "capacity",
    "example_shape",
    "num_classes",
    "layers",
    "num_parameters",
    "examples",
    "inputs",
    "labelled",
    "auxiliary",
)


def check_bases(experiment: Experiment, source, population: Population, task) -> None:
    """Raises where an attack on data would poison nothing, or nothing could be measured."""
    bases = None if experiment.backdoor is None else experiment.backdoor.bases
    if bases is not None and not np.isin(bases, source.y_test).any():
        raise ConfigError(
            f"attack: {source.label} has no test example of {_classes(bases)}, so the backdoor's "
            f"success cannot be measured; choose a base that is among "
            f"{', '.join(map(str, np.unique(source.y_test)[:20]))}."
        )
    malicious, held = _held_by_malicious(experiment, source, population)
    counts = population.counts[malicious]
    for stage in experiment.attack.data_stages:
        if stage.bases is not None and not np.isin(stage.bases, held).any():
            raise ConfigError(
                f"attack: no malicious client holds an example of {_classes(stage.bases)}, so "
                f"{stage.registered_name!r} would do nothing; choose another base, or change the "
                f"seed, data.partition or threat.num_malicious."
            )
    poisons = _poisons(experiment, source, population._replace(malicious=malicious), task)
    for stage, something in zip(experiment.attack.data_stages, poisons, strict=True):
        if not something:
            raise ConfigError(
                f"attack: {stage.registered_name!r} would poison nothing: no example of a "
                f"malicious client falls into its share, and none of them has more than "
                f"{counts.max()}; raise its fraction, or give clients more data."
            )


def _classes(bases) -> str:
    return f"base class{'es' if len(bases) > 1 else ''} {', '.join(map(str, bases))}"


def _held_by_malicious(experiment: Experiment, source, population: Population):
    """The clients [N] that are ever malicious, and the labels of their training examples."""
    malicious = population.malicious
    if experiment.threat.redraw:  # it is every client's turn
        malicious = np.ones_like(malicious)
    index, counts = population.index[malicious], population.counts[malicious]
    return malicious, np.asarray(source.y_train)[index[np.arange(index.shape[1]) < counts[:, None]]]


def _lacking(attack, labels) -> list[int]:
    """The base classes of an attack on data that are not among the labels."""
    bases = () if attack is None or attack.bases is None else attack.bases
    return [base for base in bases if not np.any(np.asarray(labels) == base)]


def missing_bases(experiment: Experiment, source, population: Population) -> list[str]:
    """Sentences about the base classes of attacks on data of which there are no examples."""
    missing, held = [], _held_by_malicious(experiment, source, population)[1]
    for stage in experiment.attack.data_stages:
        if lacking := _lacking(stage, held):
            missing.append(
                f"no malicious client holds an example of {_classes(lacking)}, which "
                f"{stage.registered_name!r} would poison"
            )
    if lacking := _lacking(experiment.backdoor, source.y_test):
        missing.append(f"success is not measured on {_classes(lacking)}: no test example is of it")
    return missing


def _poisons(experiment: Experiment, source, population: Population, task) -> list[bool]:
    """Whether each attack on data ever poisons an example, by its own choice of them."""
    if not experiment.attack.data_stages:
        return []
    key = stream(jax.random.key(experiment.seed), Stream.POISON)
    clients = np.flatnonzero(population.malicious)
    labels = task.labels_of(jnp.asarray(np.asarray(source.y_train)[population.index[clients]]))
    held = np.arange(population.index.shape[1]) < population.counts[clients][:, None]

    def choose(attack):
        keys = jax.vmap(lambda client: jax.random.fold_in(key, client))(clients)
        masks = jax.vmap(attack.choose)(keys, labels, held)
        return np.array([bool(mask.any()) for mask in masks])

    return list(np.any([choose(one) for one in core.every_value(experiment.attack)], axis=0))


@functools.lru_cache(maxsize=16)
def _seen_pixels(model, input_shape, num_classes) -> np.ndarray:
    """Which pixels [H, W] move a logit: strides and poolings may drop what is near an edge.

    By the gradient on random images at initial weights, where a pixel without a path has exactly 0.
    """
    # XLA's own convolutions compile fastest, and are run only once here.
    network = dataclasses.replace(model, convolution="xla").make(input_shape, num_classes)

    @jax.jit
    def seen(key):
        variables = network.init(key)
        images = jax.random.uniform(jax.random.fold_in(key, 1), (8, *input_shape))
        mixture = jax.random.normal(jax.random.fold_in(key, 2), (num_classes,))
        slope = jax.grad(lambda x: jnp.sum(network.apply(variables, x) @ mixture))(images)
        return jnp.any(slope != 0, axis=(0, 3))

    return np.asarray(seen(jax.random.key(0)))


def trigger_pixels(
    experiment: Experiment, source: Source, task: BoundTask, setting: Setting
) -> tuple[int, int] | None:
    """How many pixels the trigger changes that the network sees, and how many in all.

    None where there is no trigger of pixels, or the network has no convolutions.
    """
    backdoor, shape = core.resolve(experiment.backdoor, 0), source.x_train.shape[1:]
    convolves = value_of(experiment.model, "convolution") is not None
    if not isinstance(backdoor, core.Trigger) or not convolves or len(shape) != 3:
        return None
    images = jax.random.uniform(jax.random.key(0), (8, *shape))
    state = backdoor.init(setting, task)
    stamped = backdoor.trigger(state, images, None, task)
    changed = np.asarray(jnp.any(stamped != images, axis=(0, 3)))
    if not changed.any():  # a trigger with memory has learned nothing yet
        return None
    seen = changed & _seen_pixels(experiment.model, shape, source.num_classes)
    return int(seen.sum()), int(changed.sum())


def check_trigger(experiment: Experiment, pixels: tuple[int, int] | None) -> None:
    """Raises where the network sees nothing of the trigger: no model could learn the backdoor."""
    if pixels is not None and pixels[0] == 0:
        raise ConfigError(
            f"attack: {experiment.model.registered_name!r} sees none of the {pixels[1]} pixels of "
            f"{experiment.backdoor.registered_name!r}, since strides or poolings drop them, so the "
            f"backdoor could not be learned; {_away_from_edges(experiment.backdoor)}."
        )


def _away_from_edges(backdoor) -> str:
    if "place" in {field.name for field in dataclasses.fields(backdoor)}:
        return "set attack.place (with size), or attack.pixels, further inside"
    return "take a larger attack.size, or 'trojan', which has a place"

"""Finished runs' models, read back: parameters, networks, and surrogates of attacks on inputs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sec.core import ConfigError
from fedjax_sec.core.host import undisturbed
from fedjax_sec.evaluation.robustness import surrogates_of
from fedjax_sec.runs import results
from fedjax_sec.runs.checkpoints import Checkpoints
from fedjax_sec.runs.config import Experiment
from fedjax_sec.runs.source import Network, load_source, network_of


class Trained(NamedTuple):
    """A finished run: its configuration, and its final parameters [D]."""

    experiment: Experiment
    flat: np.ndarray


def read_trained(folder: str | Path, at: str = "") -> Trained:
    """A finished run's configuration and final parameters; `at` begins the message of an error.

    The parameters are from `params.npy` where `checkpoint.keep_params` has kept it, else from the
    last checkpoint, which a run of its own has; a sweep's cells have none.

    Raises: `ConfigError` for a folder without a finished run, that keeps no parameters, or in which
    a file is damaged.
    """
    folder = results.RunFolder(folder)
    if not folder.finished:
        raise ConfigError(f"{at}Folder {str(folder.path)!r} holds no finished run.")
    experiment = folder.experiment()
    flat = folder.params()
    if flat is None:
        states = Checkpoints(folder.path / results.CHECKPOINTS, [experiment.to_dict()])
        stacked = states.params(experiment.rounds)
        flat = None if stacked is None else stacked[0]
    if flat is None:
        raise ConfigError(
            f"{at}Folder {str(folder.path)!r} keeps no parameters; cells of a sweep do so with "
            f"checkpoint.keep_params: true."
        )
    return Trained(experiment, flat)


@undisturbed
def final_params(folder: str | Path) -> Any:
    """The final parameters of a finished run, as the model's tree, from its folder.

    Reads the data set for its shapes. Raises: `ConfigError`, as `read_trained`.
    """
    experiment, flat = read_trained(folder)
    network = network_of(experiment, load_source(experiment))
    return network.space.join(jnp.asarray(flat), frozen_of(network))


def frozen_of(network: Network) -> tuple:
    """The leaves of a model's variables that no client trains: the same for all seeds."""
    model = network.model
    if model.init_frozen is not None:
        return network.space.split(model.init_frozen())[1]
    shapes = jax.eval_shape(lambda: network.space.split(model.init(jax.random.key(0)))[1])
    return network.space.split(model.init(jax.random.key(0)))[1] if shapes else ()


def load_start(experiment: Experiment) -> np.ndarray | None:
    """The parameters [D] of `start_from`; None where the experiment starts from initial ones.

    Raises: `ConfigError` for a folder without a finished run, or whose model has other parameters
    or takes other inputs.
    """
    if experiment.start_from is None:
        return None
    at = "start_from: "
    other, flat = read_trained(experiment.start_from, at)
    kinds = []
    for one in (experiment, other):
        source = load_source(one)
        shape, classes = source.x_train.shape[1:], source.num_classes
        variables = jax.eval_shape(one.model.make(shape, classes).init, jax.random.key(0))
        kinds.append((one.model.registered_name, shape, classes, variables))
    (name, shape, classes, variables), (name_of, shape_of, classes_of, variables_of) = kinds
    what = f"{at}the run in {experiment.start_from!r}"
    if (shape, classes) != (shape_of, classes_of):
        raise ConfigError(
            f"{what} takes inputs of shape {shape_of} in {classes_of} classes, this experiment's "
            f"are {shape} in {classes}. Choose a run on such data."
        )
    if name != name_of or _shapes(variables) != _shapes(variables_of):
        sizes = [sum(leaf.size for leaf in jax.tree.leaves(v)) for v in (variables_of, variables)]
        raise ConfigError(
            f"{what} has another network: {name_of!r} of {sizes[0]} parameters, this experiment's "
            f"is {name!r} of {sizes[1]}. Give model as in that run's {results.CONFIG}."
        )
    return flat


def _shapes(variables) -> dict:
    paths, _ = jax.tree.flatten_with_path(variables)
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in paths}


def logits_of(experiment: Experiment) -> Callable:
    """The experiment's network: (parameters as the model's tree, images in [0, 1]) -> logits.

    Normalises as in training; without dropout. With `Result.params` or `final_params`.
    """
    source = load_source(experiment)
    model, inputs = network_of(experiment, source).model, source.inputs
    return lambda params, x: model.apply(params, inputs.normalize(x), train=False, key=None)


def load_surrogates(experiment: Experiment) -> dict[str, tuple[Callable, Any]]:
    """label -> (logits, parameters) of the models on which `evaluation.evasions` are made.

    Raises `ConfigError` for a folder without a finished run, or whose data has another shape.
    """
    at, surrogates = "evaluation.evasions", {}
    for label, folder in surrogates_of(experiment.evaluation.evasions, at).items():
        if not results.RunFolder(folder).finished:
            raise ConfigError(f"{at}.surrogate: {folder!r} holds no finished run.")
        other = results.RunFolder(folder).experiment()
        shapes = [load_source(one).x_test.shape[1:] for one in (experiment, other)]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f"{at}.surrogate: {folder!r} takes inputs of shape {shapes[1]}, this experiment's "
                f"are {shapes[0]}."
            )
        surrogates[label] = logits_of(other), final_params(folder)
    return surrogates

"""Finished runs' models, read back: parameters, networks, and surrogates of attacks on inputs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from fedjax_sec import config as config_lib
from fedjax_sec import results
from fedjax_sec.checkpoints import Checkpoints
from fedjax_sec.config import Experiment
from fedjax_sec.evaluation.robustness import surrogates_of
from fedjax_sec.host import undisturbed
from fedjax_sec.preparation import components_of, load_source, simple_problem, state_before
from fedjax_sec.round import Pool, make_task
from fedjax_sec.schema import ConfigError

#: The folder, in a run's own, with the newest state.
CHECKPOINTS = "checkpoints"


@undisturbed
def final_params(folder: str | Path) -> Any:
    """The final parameters of a finished run, as the model's tree, from its folder.

    From `params.npy` where `checkpoint.keep_params` has kept it, else from the last checkpoint,
    which a run of its own has; a sweep's cells have none. Reads the data set for its shapes.

    Raises: `ConfigError` for a folder without a finished run, or that keeps no parameters.
    """
    folder = results.RunFolder(folder)
    if not folder.finished:
        raise ConfigError(f"Folder {str(folder.path)!r} holds no finished run.")
    experiment = config_lib.load(folder.path / results.CONFIG)
    source = load_source(experiment)
    problem = simple_problem(experiment, source)
    task = make_task(problem, Pool(source.x_train, source.y_train))
    flat, checkpoints = folder.params(), folder.path / CHECKPOINTS
    if flat is None and checkpoints.is_dir():
        one = jax.eval_shape(
            lambda params: state_before(
                experiment, problem, task, components_of(experiment), params
            ),
            jax.ShapeDtypeStruct((task.dim,), jnp.float32),
        )
        state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), one)
        state, done, _ = Checkpoints(checkpoints).restore(state)
        flat = state.params[0] if done == experiment.rounds else None
    if flat is None:
        raise ConfigError(
            f"Folder {str(folder.path)!r} keeps no parameters; cells of a sweep do so with "
            f"checkpoint.keep_params: true."
        )
    return task.unravel(jnp.asarray(flat))


def logits_of(experiment: Experiment) -> Callable:
    """The experiment's network: (parameters as the model's tree, images in [0, 1]) -> logits.

    Normalises as in training; without dropout. With `Result.params` or `final_params`.
    """
    source = load_source(experiment)
    problem = simple_problem(experiment, source)
    task = make_task(problem, Pool(source.x_train, source.y_train))
    return lambda params, x: task.logits(ravel_pytree(params)[0], x)


def load_surrogates(experiment: Experiment) -> dict[str, tuple[Callable, Any]]:
    """label -> (logits, parameters) of the models on which `evaluation.evasions` are made.

    Raises `ConfigError` for a folder without a finished run, or whose data has another shape.
    """
    at, found = "evaluation.evasions", {}
    for label, folder in surrogates_of(experiment.evaluation.evasions, at).items():
        path = Path(folder) / results.CONFIG
        if not path.is_file():
            raise ConfigError(f"{at}.surrogate: {folder!r} holds no finished run.")
        other = config_lib.load(path)
        shapes = [load_source(one).x_test.shape[1:] for one in (experiment, other)]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f"{at}.surrogate: {folder!r} takes inputs of shape {shapes[1]}, this experiment's "
                f"are {shapes[0]}."
            )
        found[label] = logits_of(other), final_params(folder)
    return found

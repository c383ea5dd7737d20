"""Shared parts of attacks on models: the global model, and the trained entries of a message."""

import jax.numpy as jnp

from fedjax_sec.core import ConfigError


def global_model(view, dim):
    """[dim]: the global parameters; zeros where an algorithm sends more than a model's update."""
    given = view.params.shape[0]
    if given > dim:
        raise ConfigError(
            f"attack: an attack on models needs messages with all {given} parameters, and the "
            f"algorithm's clients send {dim} numbers."
        )
    return jnp.pad(view.params, (0, dim - given))


def trained(view, dim):
    """[dim]: whether an entry is a trained parameter of the model.

    Not so are running statistics, and what an algorithm sends behind the model's update. Outside an
    experiment nothing is known of the model, and every entry counts as trained.
    """
    if view.task is None:
        return jnp.ones(dim, bool)
    place, space = jnp.arange(dim), view.task.space.trained
    return (place >= space.start) & (place < space.stop)


def check_read(attack, path, choice, readers) -> None:
    """Raises `ConfigError` for a field that the chosen mode does not read.

    `readers` maps a field's name to the values of the field `choice` that read it.
    """
    chosen = getattr(attack, choice)
    for name, modes in readers.items():
        value, default = getattr(attack, name), type(attack).__dataclass_fields__[name].default
        known = isinstance(value, (int, float))  # a tracer has no value to compare
        if chosen not in modes and known and value != default:
            raise ConfigError(
                f"{path}.{name} is read by {choice} {' or '.join(map(repr, modes))} only, got "
                f"{choice}={chosen!r}, {name}={value:g}."
            )

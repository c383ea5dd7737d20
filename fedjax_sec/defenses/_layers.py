"""The parts of updates and models that rules look at."""

import jax.numpy as jnp

from fedjax_sec.core import last_layer, trained_part
from fedjax_sec.ops.precision import wide


def trained_columns(updates, view):
    """The updates without running statistics [K, T], of which norms and distances are taken."""
    return updates[:, trained_part(view.space, updates.shape[1])]


def last_layers(updates, view):
    """(features [K, F], their place): the last layer's kernel of every client's model.

    A model is the global one plus the client's update, in at least float32. Rows that are not valid
    are zero.
    """
    place = last_layer(view.space, updates.shape[1])
    return models(updates, view, place), place


def models(updates, view, place: slice):
    """That part of the clients' models [K, F]; zero for rows that are not valid."""
    dtype = wide(updates.dtype)
    rows = updates[:, place].astype(dtype) + view.params[place].astype(dtype)[None]
    return jnp.where(view.valid[:, None], rows, 0.0)

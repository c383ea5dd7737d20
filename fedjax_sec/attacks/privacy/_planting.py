"""The dense layer that a malicious server puts in front of a network, and its parameters."""

import jax.numpy as jnp

from fedjax_sec.attacks.privacy._first_layer import first_dense_name
from fedjax_sec.core import registry

#: The layer of `inserted_layer` that leads back to the network.
_BACK = "params/inserted_back"


def inserted(network, units: int, connection: str):
    """The network behind a dense layer."""
    spec = {"name": "inserted_layer", "units": units, "connection": connection, "base": network}
    return registry.models.build(spec)


def planted(params, task, kernel, bias, back=None):
    """The parameters [D] with these of the first dense layer, `back` of the one behind it."""
    layer, space = first_dense_name(task), task.space
    values = {f"{layer}/kernel": kernel, f"{layer}/bias": bias}
    if back is not None:
        values |= {f"{_BACK}/kernel": back[0], f"{_BACK}/bias": back[1]}
    for name, value in values.items():
        if name in space.slices:
            shaped = jnp.broadcast_to(value, space.shapes[name]).reshape(-1)
            params = params.at[space.slices[name]].set(shaped)
    return params

"""Layers inside any network: the first dense one's input, and values in place of embedded tokens.

The only importer of flax beside `models`.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedjax_sec.core import ConfigError

_KERNEL, _TABLE = ("params", "kernel"), ("params", "embedding")


def embed(table, tokens):
    """The rows of a table [V, E] of tokens [...], by a layer that can be looked into.

    >>> print(embed(jnp.eye(3), jnp.array([2, 0])))
    [[0. 0. 1.]
     [1. 0. 0.]]
    """
    return nn.Embed(*table.shape).apply({"params": {"embedding": table}}, tokens)


def table_of(task) -> str:
    """The name of the table [V, E] from which the network takes its tokens' values.

    Raises: `ConfigError` for a network without one that is trained.
    """
    for name, shape in task.space.shapes.items():
        trained = task.space.slices[name].start >= task.space.trained.start
        if name.rpartition("/")[2] == "embedding" and len(shape) == 2 and trained:
            return name
    raise ConfigError(
        "attack: tokens are searched by their embedding, and the model has none that is trained; "
        "choose a model such as 'fedml_rnn' or 'char_lstm'."
    )


def outputs_for(params, values, task):
    """The outputs for tokens whose embeddings are `values [n, L, E]`."""
    used = []

    def embed(call, args, kwargs, context):
        module = context.module
        inside = context.method_name == "__call__" and module.has_variable(*_TABLE)
        # A layer above it may be named so too; it holds no array.
        if inside and hasattr(module.get_variable(*_TABLE), "ndim"):
            used.append(module)
            return values
        return call(*args, **kwargs)

    with nn.intercept_methods(embed):
        outputs = task.outputs(params, jnp.zeros(values.shape[:2], jnp.int32))
    if not used:
        raise ConfigError("attack: the model never calls its embedding as a layer.")
    return outputs


def representation(params, x, task):
    """(r [B, R], the name of the kernel [R, U] that takes it) of inputs [B, ...].

    The first dense layer that is called, whatever the network around it.
    """
    seen = []

    def watch(call, args, kwargs, context):
        result, module = call(*args, **kwargs), context.module
        first = not seen and context.method_name == "__call__" and module.has_variable(*_KERNEL)
        if first and module.get_variable(*_KERNEL).ndim == 2 and args[0].ndim == 2:
            seen.append((args[0], "/".join(("params", *module.path, "kernel"))))
        return result

    with nn.intercept_methods(watch):
        task.outputs(params, x)
    if not seen or seen[0][1] not in task.space.slices:
        raise ConfigError(
            "defense: soteria protects the input of the model's first dense layer, and this model "
            "has none that is trained; choose a model such as 'small_cnn' or 'mlp'."
        )
    features, name = seen[0]
    return features.reshape(features.shape[0], -1), name


def sensitivity(params, x, task):
    """(r [R], the norms of its derivatives by the input [R], the kernel's name) of one input."""
    names = []

    def of(one):
        features, name = representation(params, one[None], task)
        names.append(name)
        return features[0]

    features, pull = jax.vjp(of, x)
    rows = jax.vmap(lambda unit: pull(unit)[0])(jnp.eye(features.shape[0]))
    return features, jnp.linalg.norm(rows.reshape(features.shape[0], -1), axis=1), names[0]

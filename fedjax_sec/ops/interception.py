"""Layers inside any network: the first dense one's input, and values in place of embedded tokens.

The only importer of flax beside `models`.
"""

import collections

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from fedjax_sec.core import ConfigError

_KERNEL, _TABLE = ("params", "kernel"), ("params", "embedding")
#: (space, shape of an input, its `directions`) of the last networks: a program is traced often.
_KNOWN: collections.deque = collections.deque(maxlen=8)


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
    """(r [R], the norms of its derivatives by the input [R], the kernel's name) of one input.

    By forward passes along `directions`, or by a backward pass for each entry of r where those are
    fewer.
    """
    names = []

    def of(params, one):
        features, name = representation(params, one[None], task)
        names.append(name)
        return features[0]

    along, units = directions(of, params.shape, x.shape, task), jax.eval_shape(of, params, x).size
    features, push = jax.linearize(lambda one: of(params, one), x)
    if units < along.shape[0]:
        pull = jax.linear_transpose(push, x)
        slopes = jax.vmap(lambda unit: pull(unit)[0])(jnp.eye(units)).reshape(units, -1).T
    else:
        slopes = jax.vmap(push)(jnp.asarray(along))
    return features, jnp.linalg.norm(slopes, axis=0), names[0]


def directions(of, params_shape, x_shape, task) -> np.ndarray:
    """Directions [G, ...] of the input along which every derivative of r is by one entry alone.

    Each is the sum of entries of the input of which no two reach the same entry of r, so that the
    squares of the derivatives along all of them sum to those by all entries. In a convolutional
    network G is the number of pixels that an entry of r sees, not of all pixels. A NaN in an entry
    of the input shows which entries of r it reaches, in a network of random parameters, while the
    program is traced; where the derivatives along the directions are not those by all entries, as
    in a network that hides a NaN, every entry is a direction, and so it is with frozen leaves,
    which the program gets as an argument.
    """
    size = int(np.prod(x_shape))
    each = np.eye(size, dtype=np.float32).reshape(size, *x_shape)
    if jax.tree.leaves(task.frozen):
        return each
    for space, shape, known in _KNOWN:
        if space is task.space and shape == x_shape:
            return known
    with jax.ensure_compile_time_eval():
        rng = np.random.default_rng(0)
        params = jnp.asarray(0.1 * rng.normal(size=params_shape), jnp.float32)
        params = params.at[task.space.observed].set(1.0)
        x = jnp.asarray(rng.uniform(0.1, 0.9, x_shape), jnp.float32)
        reached = np.isnan(_each(lambda one: of(params, one), jnp.where(each > 0, jnp.nan, x)))
        meet = reached.astype(np.float32) @ reached.T.astype(np.float32) > 0
        groups = []
        for entry in range(size):
            group = next((one for one in groups if not meet[entry, one].any()), None)
            if group is None:
                groups.append([entry])
            else:
                group.append(entry)
        sums = np.stack([each[group].sum(axis=0) for group in groups])
        push = jax.linearize(lambda one: of(params, one), x)[1]
        squares = [(_each(push, jnp.asarray(one)) ** 2).sum(axis=0) for one in (sums, each)]
    if not np.allclose(*squares, rtol=1e-3, atol=1e-6 * squares[1].max()):
        sums = each
    _KNOWN.append((task.space, x_shape, sums))
    return sums


def _each(fn, xs) -> np.ndarray:
    """`fn` of every row, a hundred at a time."""
    return np.asarray(jax.jit(lambda xs: jax.lax.map(fn, xs, batch_size=100))(xs))

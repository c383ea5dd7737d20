"""The space of parameters: which of a model's variables are trained, observed and frozen."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from fedjax_sec.core.types import Model, Space

#: The collection of running statistics, which no gradient moves.
STATISTICS = "batch_stats"


def make_space(model: Model) -> Space:
    """The space of a model.

    Observed variables come first in the vector, then trained ones, each in the order of their
    names; frozen ones are in no vector.

    >>> init = lambda key: {"params": {"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)}}
    >>> space = make_space(Model(init, None, trainable=lambda name: name != "params/w"))
    >>> space.dim, dict(space.slices)
    (3, {'params/b': slice(0, 3, None)})
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    leaves, tree = jax.tree.flatten_with_path(shapes)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    kinds = []
    for name in names:
        observed = model.observe is not None and name.startswith(f"{STATISTICS}/")
        kinds.append("observed" if observed else "trained" if model.trainable(name) else "frozen")
    order = [i for kind in ("observed", "trained") for i, k in enumerate(kinds) if k == kind]
    slices, start = {}, 0
    for i in order:
        size = int(np.prod(leaves[i][1].shape))
        slices[names[i]] = slice(start, start + size)
        start += size
    observed = sum(int(np.prod(leaves[i][1].shape)) for i in order if kinds[i] == "observed")
    whole = order == list(range(len(leaves)))  # nothing is frozen, and observed leaves come first

    ends = [slices[names[i]].stop for i in order][:-1]

    def join(vector, frozen=()):
        # One split, whose gradient is one concatenation: that of slices would pad and add [D] for
        # every variable of every client.
        pieces = dict(zip(order, jnp.split(vector, ends), strict=True)) if order else {}
        rest, parts = iter(frozen), []
        for i, (_, leaf) in enumerate(leaves):
            piece = pieces.get(i)
            if piece is None:
                parts.append(next(rest))
            else:
                parts.append(piece.reshape(leaf.shape).astype(leaf.dtype))
        return jax.tree.unflatten(tree, parts)

    def split(variables):
        if whole:
            return ravel_pytree(variables)[0], ()
        values = jax.tree.leaves(variables)
        parts = [jnp.ravel(values[i]).astype(jnp.float32) for i in order]
        frozen = tuple(v for v, kind in zip(values, kinds, strict=True) if kind == "frozen")
        return jnp.concatenate(parts or [jnp.zeros(0)]), frozen

    return Space(start, slice(0, observed), slice(observed, start), slices, join, split)

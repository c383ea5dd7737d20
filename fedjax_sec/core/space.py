"""The space of parameters: which of a model's variables are trained, observed and frozen."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.tree_util import DictKey, SequenceKey
from jaxtyping import Array

from fedjax_sec.core.types import Model, Space

#: The collection of running statistics, which no gradient moves.
STATISTICS = "batch_stats"
#: What PyTorch and Keras call them, the last part of a tensor's name.
_ELSEWHERE = frozenset(
    {"running_mean", "running_var", "num_batches_tracked", "moving_mean", "moving_variance"}
)


def make_space(model: Model) -> Space:
    """The space of a model.

    Observed variables come first in the vector, then trained ones, each in the order of their
    names; frozen ones are in no vector.

    >>> init = lambda key: {"params": {"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)}}
    >>> space = make_space(Model(init, None, trainable=lambda name: name != "params/w"))
    >>> space.dim, dict(space.slices)
    (3, {'params/b': slice(0, 3, None)})
    """
    made = []

    def init(key):
        variables = model.init(key)
        made.extend(_by_making(variables))
        return variables

    leaves, tree = jax.tree.flatten_with_path(jax.eval_shape(init, jax.random.key(0)))
    names = _names(leaves)
    kinds = []
    for name in names:
        observed = model.observe is not None and _is_statistic(name)
        kinds.append("observed" if observed else "trained" if model.trainable(name) else "frozen")
    order = [i for kind in ("observed", "trained") for i, k in enumerate(kinds) if k == kind]
    slices, sizes, start = {}, {}, 0
    for i in order:
        size = int(np.prod(leaves[i][1].shape))
        sizes[names[i]] = leaves[i][1].shape
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

    last = f"{model.head}/kernel"
    if last not in slices:
        trained = [(names[i], len(leaves[i][1].shape)) for i in made if kinds[i] == "trained"]
        last = _last(trained)
    observed, trained = slice(0, observed), slice(observed, start)
    return Space(start, observed, trained, slices, join, split, last, sizes)


def tree_space(tree: Any, made: Any = None) -> Space:
    """The space of a pytree of arrays, such as what one client sends: one slice a leaf.

    Names are the leaves' paths. Running statistics are observed and come first in the vector, see
    `in_vector_order`. Equal trees have one space, so that what is compiled for it serves them all.
    `made` is the same tree as it was made, where `tree` has lost the order in which its mappings
    hold their layers.

    >>> space = tree_space([np.ones((2, 3)), np.ones(3)])
    >>> dict(space.slices), space.last
    ({'0': slice(0, 6, None), '1': slice(6, 9, None)}, '0')
    """
    leaves, form = jax.tree.flatten_with_path(tree)
    names = _names(leaves)
    order = _by_making(tree if made is None else made)
    kept = [i for i in order if not _is_observed(names[i])]
    last = _last([(names[i], np.ndim(leaves[i][1])) for i in kept])
    kinds = tuple(
        (np.shape(leaf), str(jax.dtypes.canonicalize_dtype(leaf.dtype))) for _, leaf in leaves
    )
    try:
        return _space_of(form, kinds, tuple(names), last)
    except TypeError:  # a node of the caller's own that cannot be hashed
        return _space_of.__wrapped__(form, kinds, tuple(names), last)


def in_vector_order(tree: Any) -> list[tuple[Any, Any]]:
    """(path, leaf) of a pytree's leaves, in the order in which they lie in its vector.

    Running statistics come first: what lies below `batch_stats`, and tensors whose names end as
    PyTorch's (`running_mean`, `running_var`, `num_batches_tracked`) or Keras's do. The others
    follow, both in JAX's order.

    >>> state = {"bn.running_mean": 0.0, "bn.bias": 1.0, "fc.weight": 2.0}
    >>> [path[0].key for path, _ in in_vector_order(state)]
    ['bn.running_mean', 'bn.bias', 'fc.weight']
    """
    leaves = jax.tree.leaves_with_path(tree)
    return [leaves[i] for i in _observed_first(_names(leaves))]


def _observed_first(names: Sequence[str]) -> list[int]:
    return sorted(range(len(names)), key=lambda i: not _is_observed(names[i]))


@functools.lru_cache(maxsize=256)
def _space_of(form, kinds, names, last) -> Space:
    order = _observed_first(names)
    slices, shapes, start, observed = {}, {}, 0, 0
    for i in order:
        shapes[names[i]] = kinds[i][0]
        slices[names[i]] = slice(start, start := start + int(np.prod(kinds[i][0])))
        observed = start if _is_observed(names[i]) else observed
    if observed == start:  # there is nothing else to measure
        observed = 0
    unravel = ravel_pytree([jnp.zeros(*kinds[i]) for i in order])[1]
    places = np.argsort(order).tolist()

    def join(vector, frozen=()):
        parts = unravel(vector)
        return jax.tree.unflatten(form, [parts[place] for place in places])

    def split(variables):
        values = jax.tree.leaves(variables)
        return ravel_pytree([values[i] for i in order])[0], ()

    return Space(
        start, slice(0, observed), slice(observed, start), slices, join, split, last, shapes
    )


def _is_statistic(name: str) -> bool:
    return f"{name}/".startswith(f"{STATISTICS}/")


def _is_observed(name: str) -> bool:
    """The same of a caller's pytree, which may hold another library's model."""
    return _is_statistic(name) or re.split(r"[/.]", name)[-1] in _ELSEWHERE


def _names(leaves) -> list[str]:
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def _by_making(tree) -> list[int]:
    """The numbers of the leaves in the order in which mappings hold them, not in that of names.

    A network's layers are in its mappings as they were made, and so, mostly, as they are applied.
    """
    places = []
    for number, (path, _) in enumerate(jax.tree.leaves_with_path(tree)):
        node, place = tree, []
        for key in path:
            if isinstance(key, DictKey) and isinstance(node, Mapping):
                place.append(list(node).index(key.key))
                node = node[key.key]
            elif isinstance(key, SequenceKey) and isinstance(node, Sequence):
                place.append(key.idx)
                node = node[key.idx]
            else:  # JAX's own order
                place.append(number)
                node = None
        places.append(place)
    return sorted(range(len(places)), key=places.__getitem__)


def _last(tensors: list[tuple[str, int]]) -> str:
    """The kernel of the last layer, of (name, axes): the last of two axes, else the last but one.

    >>> _last([("w1", 2), ("b1", 1), ("w2", 2), ("b2", 1)]), _last([("a", 1), ("b", 1), ("c", 1)])
    ('w2', 'b')
    """
    kernels = [name for name, axes in tensors if axes > 1]
    names = kernels[-1:] or [name for name, _ in tensors[-2:]]
    return names[0] if names else ""


# --- Reading it -------------------------------------------------------------------------------


def tensors(space: Space | None, dim: int) -> list[slice]:
    """The places of all tensors in a vector [D], in order; one for all of it without a space.

    The part of a vector behind the model, such as control variates, is one tensor more.

    >>> tensors(None, 5)
    [slice(0, 5, None)]
    """
    places = [] if space is None else list(space.slices.values())
    done = places[-1].stop if places else 0
    return [*places, slice(done, dim)] if done < dim else places


def trained_part(space: Space | None, dim: int) -> slice:
    """The place of all but running statistics in a vector [D]; all of it without a space.

    Norms, distances and cosines of updates are taken over it: statistics move by the scale of the
    data, not of what is learned, and would drown it.

    >>> trained_part(tree_space({"batch_stats": np.ones(2), "params": np.ones(3)}), 5)
    slice(2, 5, None)
    >>> trained_part(None, 5)
    slice(0, 5, None)
    """
    return slice(0 if space is None else space.observed.stop, dim)


def with_statistics(space: Space | None, changed: Array, given: Array) -> Array:
    """`changed` [..., D], but with the running statistics of `given`.

    >>> space = tree_space({"batch_stats": np.ones(2), "params": np.ones(3)})
    >>> with_statistics(space, jnp.zeros(5), jnp.ones(5)).tolist()
    [1.0, 1.0, 0.0, 0.0, 0.0]
    """
    start = trained_part(space, changed.shape[-1]).start
    return jnp.where(jnp.arange(changed.shape[-1]) < start, given, changed) if start else changed


def last_layer(space: Space | None, dim: int) -> slice:
    """The place of the last layer's kernel in a vector [D]; all of it without a space.

    >>> last_layer(None, 5)
    slice(0, 5, None)
    """
    if space is None or space.last not in space.slices:
        return slice(0, dim)
    return space.slices[space.last]

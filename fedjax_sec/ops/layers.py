"""Layers of a network, as its tree of parameters shows them."""

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

#: flax's collection of what no gradient moves.
STATISTICS = "batch_stats"


def _key(part) -> str:
    return str(getattr(part, "key", getattr(part, "idx", getattr(part, "name", part))))


def _layer(path) -> str | None:
    """The name of the layer that a leaf belongs to; None for statistics."""
    names = [_key(part) for part in path]
    if names[0] == STATISTICS:
        return None
    inner = names[1:] if names[0] == "params" else names
    return ".".join(inner[:-1] or inner)


def layer_sizes(tree) -> dict[str, int]:
    """layer -> its number of parameters, in the order of the tree.

    >>> layer_sizes({"params": {"a": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}})
    {'a': 9}
    """
    sizes: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if (name := _layer(path)) is not None:
            sizes[name] = sizes.get(name, 0) + leaf.size
    return sizes


def layer_mask(tree, layer: str | None = None):
    """Which flat parameters [D] are trained, of one layer or (None) of all.

    >>> tree = {"params": {"a": jnp.ones(2), "b": jnp.ones(1)}, "batch_stats": {"c": jnp.ones(1)}}
    >>> layer_mask(tree).tolist(), layer_mask(tree, "b").tolist()
    ([False, True, True, True], [False, False, False, True])
    """

    def mark(path, leaf):
        name = _layer(path)
        return jnp.full(leaf.shape, float(name is not None and layer in (None, name)))

    return ravel_pytree(jax.tree_util.tree_map_with_path(mark, tree))[0] > 0

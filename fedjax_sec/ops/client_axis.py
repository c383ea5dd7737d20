"""How local training runs over the client axis."""

from collections.abc import Callable
from typing import Any

import jax

from fedjax_sec.ops.backend import on_cpu

#: How clients can be trained: all side by side, one after another, or c side by side at a time.
STRATEGIES = ("vmap", "map", "chunked")


def clients_at_once(strategy: str, chunk: int | None, num_clients: int, convolves: bool) -> int:
    """How many clients a strategy trains side by side.

    ``vmap`` is all of them, ``map`` one, ``chunked`` is `chunk`, at most all. ``auto`` is ``map``
    for convolutional networks on CPU, whose patches of one client still fit the cache, and
    ``vmap`` elsewhere; see docs/performance.md for the measurements behind it.

    >>> clients_at_once("vmap", None, 51, False), clients_at_once("chunked", 8, 51, False)
    (51, 8)
    """
    if strategy == "auto":
        strategy = "map" if convolves and on_cpu() else "vmap"
    return {"vmap": num_clients, "map": 1}.get(strategy) or min(chunk or 1, num_clients)


def map_clients(fn: Callable, at_once: int, *stacked: Any) -> Any:
    """`jax.vmap(fn)(*stacked)`, `at_once` clients at a time, in one compiled loop.

    What `fn` does with values that are not stacked (the server's weights) stays unbatched.

    >>> import jax.numpy as jnp
    >>> map_clients(lambda x: 2 * x, 2, jnp.arange(5)).tolist()
    [0, 2, 4, 6, 8]
    """
    size = jax.tree.leaves(stacked)[0].shape[0]
    if at_once >= size:
        return jax.vmap(fn)(*stacked)
    return jax.lax.map(
        lambda args: fn(*args), stacked, batch_size=None if at_once == 1 else at_once
    )

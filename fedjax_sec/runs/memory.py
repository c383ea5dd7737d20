"""How many replicas fit in a device's memory. Imports nothing of ours but the error."""

import os
from collections.abc import Mapping

import jax

from fedjax_sec.core import COUNT, ConfigError

#: Share of the memory that is planned with; the rest is for the allocator and what XLA adds.
USABLE = 0.85


def device_memory() -> int | None:
    """Bytes of memory of the first device; of the machine for a CPU; None if unknown."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
            return None
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return (device.memory_stats() or {}).get("bytes_limit")


def tree_bytes(tree) -> int:
    """Bytes of all arrays (or their shapes) in a pytree.

    >>> import jax.numpy as jnp
    >>> tree_bytes({"a": jnp.zeros((2, 3)), "b": jnp.zeros(4, jnp.int8)})
    28
    """
    return sum(leaf.size * _itemsize(leaf.dtype) for leaf in jax.tree.leaves(tree))


def _itemsize(dtype) -> int:
    return 8 if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize


#: Remedies that make the largest part of a state smaller.
_SAVING = {
    "client": "Set client.keep_optimizer_state to false, or lower data.num_clients: a state of "
    "each registered client is kept.",
    "defense": "Lower data.num_clients, or num_features of 'foolsgold', which keeps a row of each "
    "registered client.",
}


def check_stack(clients: int, dim: int, limit: int | None) -> None:
    """Raises `ConfigError` where a round's updates [K, D] cannot be held, before anything compiles.

    `limit` is the device's memory in bytes, None if unknown.

    >>> check_stack(100, 10**6, limit=8 * 2**30)
    """
    if dim > COUNT:
        raise ConfigError(
            f"model: {dim} parameters are beyond {COUNT}, the largest position in int32; take a "
            f"smaller model."
        )
    size = 4 * clients * dim
    if limit is not None and size > USABLE * limit:
        raise ConfigError(
            f"The updates of a round [K, D] = [{clients}, {dim}] need {size / 2**30:.2f} GiB, of "
            f"which {USABLE * limit / 2**30:.2f} GiB can be used; lower server.clients_per_round "
            f"or take a smaller model."
        )


def check_state(parts: Mapping[str, int], limit: int | None) -> None:
    """Raises `ConfigError` where the state alone exceeds the memory, before it is allocated.

    `parts` maps what the state consists of to bytes; `limit` is None if unknown.

    >>> check_state({"params": 2**30}, limit=8 * 2**30)
    """
    total = sum(parts.values())
    if limit is not None and total > USABLE * limit:
        sizes = ", ".join(f"{size / 2**30:.2f} for {name}" for name, size in parts.items() if size)
        largest = max(parts, key=parts.get)
        raise ConfigError(
            f"The state that is kept from round to round needs {total / 2**30:.2f} GiB, of which "
            f"{USABLE * limit / 2**30:.2f} GiB can be used: {sizes}. "
            f"{_SAVING.get(largest, 'Take a smaller model, or fewer runs at once.')}"
        )


def replicas_that_fit(size: int, working: int, resident: int, limit: int | None) -> int:
    """How many of `size` replicas can run side by side.

    Args:
        size: replicas in all.
        working: bytes that one replica needs while it runs.
        resident: bytes that lie in memory all the time: data, and the state of all replicas.
        limit: bytes of the device; None if unknown, then all of them.

    Raises: `ConfigError` when not even one fits.

    >>> replicas_that_fit(64, working=2 * 2**30, resident=2**30, limit=40 * 2**30)
    16
    """
    if limit is None:
        return size
    free = USABLE * limit - resident
    if free < working:
        need, have = (resident + working) / 2**30, USABLE * limit / 2**30
        raise ConfigError(
            f"A single run needs about {need:.2f} GiB of the device's memory, of which {have:.2f} "
            f"GiB can be used: {resident / 2**30:.2f} for data and states, {working / 2**30:.2f} "
            f"while it trains. Lower server.clients_per_round, client.batch_size or "
            f"execution.chunk (with execution.clients: chunked), or set execution.clients to map."
        )
    return min(size, int(free // working))

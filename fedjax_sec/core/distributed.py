"""Processes that compute one round together: who leads, and what all agree on.

Each process has its own devices; `jax.distributed` joins them. The first one writes results, locks
and checkpoints; what it decides, the others learn by `agree`. Imports nothing of ours but an error.
"""

import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sec.core.fields import ConfigError

#: Seconds without a sign of life after which JAX ends the processes that are left.
HEARTBEAT = 30


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    gpus: Sequence[int] | None = None,
) -> None:
    """Joins this process with the others; before anything else uses JAX.

    Args:
      coordinator: `HOST:PORT` of the first process (None, as the other two: as SLURM or another
        cluster that JAX knows says).
      processes: how many there are.
      process: this one's number, from 0.
      gpus: the numbers of its GPUs among those that it sees (None: all, or its own as SLURM says).

    Raises: `ConfigError` where the three are not given together, or say nothing that can be.
    """
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise ConfigError(
            f"coordinator, processes and process are given together; {', '.join(missing)} is "
            f"missing."
        )
    if processes is not None and process is not None and not 0 <= process < processes:
        raise ConfigError(f"process must be between 0 and {processes - 1}, got {process}.")
    # Has no effect on other devices than CPUs.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            local_device_ids=gpus,
            heartbeat_timeout_seconds=HEARTBEAT,
        )
    except (RuntimeError, ValueError) as error:
        hint = "" if coordinator else " (srun tells each process that it starts how to join.)"
        raise ConfigError(f"The processes could not be joined: {error}{hint}") from error


def together() -> bool:
    """Whether several processes compute together."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def leads() -> bool:
    """Whether this process writes results: the first one, or the only one."""
    return not together() or jax.process_index() == 0


def agree(content: Any = None) -> Any:
    """The first process's content, plain values as JSON has them, in every process."""
    if not together():
        return content
    return json.loads(agree_bytes(json.dumps(content).encode()))


def agree_bytes(data: bytes) -> bytes:
    """The first process's bytes in every process."""
    if not together():
        return data
    from jax.experimental import multihost_utils

    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    sent = np.zeros(size, np.uint8)
    if leads():
        sent[:] = np.frombuffer(data, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(sent)).tobytes()


def agree_arrays(tree: Any) -> Any:
    """The first process's arrays, to the bit, in every process; shapes and types are alike."""
    if not together():
        return tree
    leaves, structure = jax.tree.flatten(tree)
    arrays = [np.asarray(_plain(leaf)) for leaf in leaves]
    data, place, agreed = agree_bytes(b"".join(map(_bytes, arrays))), 0, []
    for leaf, array in zip(leaves, arrays, strict=True):
        part = np.frombuffer(data, array.dtype, array.size, place).reshape(array.shape)
        place += array.nbytes
        agreed.append(_like(leaf, part))
    return jax.tree.unflatten(structure, agreed)


def _bytes(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def _is_key(leaf) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(leaf):
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _like(leaf, array):
    """The array as a key, where the leaf is one."""
    if _is_key(leaf):
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf))
    return array


def local(tree: Any) -> Any:
    """Arrays that all processes hold alike, as this process's own."""
    if not together():
        return tree

    def of(leaf):
        remote = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        return leaf.addressable_data(0) if remote else leaf

    return jax.tree.map(of, tree)


def placed(tree: Any, sharding) -> Any:
    """Values that every process holds alike, on all devices of all of them."""
    if not together():
        return jax.device_put(tree, sharding)

    def place(leaf):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return leaf  # it lies there already
        host = np.asarray(_plain(leaf))
        return _like(leaf, jax.make_array_from_callback(host.shape, sharding, lambda at: host[at]))

    return jax.tree.map(place, tree)

"""How local training runs over the client axis."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fedjax_sec.ops.backend import on_cpu

#: All clients side by side, one after another, c at a time, or dealt to all devices.
STRATEGIES = ("vmap", "map", "chunked", "sharded")


class Layout(NamedTuple):
    """`at_once` clients are trained side by side on each of `devices` devices."""

    at_once: int
    devices: int = 1

    def mesh(self) -> Mesh:
        """The devices that share the work."""
        return Mesh(jax.local_devices()[: self.devices], ("clients",))

    def replicated(self) -> NamedSharding | None:
        """Where values lie that every device needs; None when there is one device only."""
        return NamedSharding(self.mesh(), PartitionSpec()) if self.devices > 1 else None


def rule_strategy(convolves: bool) -> str:
    """What `auto` means where nothing is measured.

    `map` for convolutional networks on CPU, whose patches of one client still fit the cache, and
    `vmap` elsewhere; see docs/performance.md for the measurements behind it.
    """
    return "map" if convolves and on_cpu() else "vmap"


def layout(strategy: str, chunk: int | None, num_clients: int, convolves: bool) -> Layout:
    """The layout of a strategy for the clients of a round.

    ``vmap`` trains all clients side by side, ``map`` one after another, ``chunked`` `chunk` at a
    time; ``sharded`` deals them to all local devices, each of which follows `rule_strategy`, as
    does ``auto``.

    >>> layout("vmap", None, 51, False), layout("chunked", 8, 51, False)
    (Layout(at_once=51, devices=1), Layout(at_once=8, devices=1))
    """
    devices = min(jax.local_device_count(), num_clients) if strategy == "sharded" else 1
    if strategy in ("auto", "sharded"):
        strategy = rule_strategy(convolves)
    share = -(-num_clients // devices)
    return Layout({"vmap": share, "map": 1}.get(strategy) or min(chunk or 1, share), devices)


def map_clients(fn: Callable, how: Layout, *stacked: Any) -> Any:
    """`jax.vmap(fn)(*stacked)`, laid out as told, inside one compiled program.

    What `fn` does with values that are not stacked (the server's weights) stays unbatched; with
    several devices they are copied to each, and the results to all.

    >>> map_clients(lambda x: 2 * x, Layout(at_once=2), jnp.arange(5)).tolist()
    [0, 2, 4, 6, 8]
    """
    size = jax.tree.leaves(stacked)[0].shape[0]
    if how.devices > 1:
        return _over_devices(fn, how, size, stacked)
    if how.at_once >= size:
        return jax.vmap(fn)(*stacked)
    batch_size = None if how.at_once == 1 else how.at_once
    return jax.lax.map(lambda args: fn(*args), stacked, batch_size=batch_size)


def _over_devices(fn, how, size, stacked):
    spare = -size % how.devices  # the last clients are trained twice where it does not divide
    filled = jax.tree.map(
        lambda leaf: jnp.concatenate([leaf, leaf[size - spare :]]) if spare else leaf, stacked
    )
    split = PartitionSpec("clients")
    trained = jax.shard_map(
        lambda args: map_clients(fn, how._replace(devices=1), *args),
        mesh=how.mesh(),
        in_specs=split,
        out_specs=split,
        check_vma=False,
    )(filled)
    trained = jax.lax.with_sharding_constraint(trained, how.replicated())
    return jax.tree.map(lambda leaf: leaf[:size], trained)

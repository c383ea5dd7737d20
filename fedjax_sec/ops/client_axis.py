"""How local training runs over the client axis, and where the stack of updates lies."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fedjax_sec.core import ConfigError
from fedjax_sec.ops.backend import on_cpu

#: All clients side by side, one after another, c at a time, or dealt to all devices.
STRATEGIES = ("vmap", "map", "chunked", "sharded")


#: The devices among which the columns of stacks are dealt while a round is traced; None: one.
_spread: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("spread", default=None)


class Layout(NamedTuple):
    """`at_once` clients are trained side by side on each of `devices` devices."""

    at_once: int
    devices: int = 1

    def mesh(self) -> Mesh:
        """The devices that share the work, those of all processes."""
        return Mesh(jax.devices()[: self.devices], ("clients",))

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
    time; ``sharded`` deals them to all devices of all processes, each of which follows
    `rule_strategy`, as does ``auto``.

    >>> layout("vmap", None, 51, False), layout("chunked", 8, 51, False)
    (Layout(at_once=51, devices=1), Layout(at_once=8, devices=1))
    """
    devices = min(jax.device_count(), num_clients) if strategy == "sharded" else 1
    if strategy == "sharded" and devices < jax.device_count() and jax.process_count() > 1:
        raise ConfigError(
            f"execution.clients = 'sharded' over {jax.process_count()} processes needs a client "
            f"for each of their {jax.device_count()} devices, and a round has {num_clients}."
        )
    if strategy in ("auto", "sharded"):
        strategy = rule_strategy(convolves)
    share = -(-num_clients // devices)
    return Layout({"vmap": share, "map": 1}.get(strategy) or min(chunk or 1, share), devices)


def map_clients(fn: Callable, how: Layout, *stacked: Any) -> Any:
    """`jax.vmap(fn)(*stacked)`, laid out as told, inside one compiled program.

    What `fn` does with values that are not stacked (the server's weights) stays unbatched; with
    several devices they are copied to each, and of the results rows of numbers are dealt out by
    columns, everything else is copied to all.

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
    split, mesh = PartitionSpec("clients"), how.mesh()

    def train(args):
        with _alone():
            return map_clients(fn, how._replace(devices=1), *args)

    trained = jax.shard_map(train, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)(
        filled
    )
    by_column = NamedSharding(mesh, PartitionSpec(None, "clients"))

    def lay(leaf):
        rows_of_numbers = leaf.ndim == 2 and leaf.shape[1] >= how.devices
        where = by_column if rows_of_numbers else how.replicated()
        return jax.lax.with_sharding_constraint(leaf, where)[:size]

    return jax.tree.map(lay, trained)


# --- Columns of a stack ---------------------------------------------------------------------------


@contextlib.contextmanager
def spreading(how: Layout) -> Iterator[None]:
    """While a round is traced: `over_columns` deals columns to the layout's devices."""
    token = _spread.set(how.mesh() if how.devices > 1 else None)
    try:
        yield
    finally:
        _spread.reset(token)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Inside of one device's share: nothing is dealt out again."""
    token = _spread.set(None)
    try:
        yield
    finally:
        _spread.reset(token)


def over_columns(fn: Callable, *arrays: Any, total: Any = False) -> Any:
    """`fn(*arrays)` of arrays [..., D], each device computing its share of the columns.

    `fn` gives arrays [..., D] whose columns depend on the same columns alone; with `total` arrays
    that are sums over the columns, to which columns of zeros add nothing. Of a `fn` with several
    results `total` may say it of each: `(False, True)`. Where nothing is spread this is
    `fn(*arrays)`. XLA would copy the whole stack to every device where a rule reads it in blocks of
    columns.

    >>> over_columns(lambda x: x.sum(axis=0), jnp.ones((2, 3))).tolist()
    [2.0, 2.0, 2.0]
    """
    mesh, dim = _spread.get(), arrays[0].shape[-1]
    if mesh is None or dim < mesh.size:
        return fn(*arrays)
    spare = -dim % mesh.size
    if spare:
        arrays = tuple(jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, spare)]) for a in arrays)
    with _alone():
        whole = jax.eval_shape(fn, *arrays)
    totals = jax.tree.broadcast(total, whole)

    def share(*shares):
        with _alone():
            result = fn(*shares)
        add = lambda leaf, all: jax.lax.psum(leaf, "clients") if all else leaf  # noqa: E731
        return jax.tree.map(add, result, totals)

    columns = lambda leaf: PartitionSpec(*[None] * (leaf.ndim - 1), "clients")  # noqa: E731
    made = jax.shard_map(
        share,
        mesh=mesh,
        in_specs=tuple(map(columns, arrays)),
        out_specs=jax.tree.map(
            lambda leaf, all: PartitionSpec() if all else columns(leaf), whole, totals
        ),
        check_vma=False,
    )(*arrays)
    return jax.tree.map(lambda leaf, all: leaf if all else leaf[..., :dim], made, totals)

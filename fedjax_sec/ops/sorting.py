"""Sorting over the client axis, and running whole rules on cache-sized blocks of columns."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from fedjax_sec.ops.backend import on_cpu, on_gpu
from fedjax_sec.ops.client_axis import over_columns

#: Most clients for which a rule is written out row by row, on a CPU and on a GPU. Compile time
#: grows with K log2(K)^2, and beyond about 120 rows on a CPU, somewhere between 64 and 100 on a
#: GPU, XLA cuts the loop into many. Rules over more clients select instead: see `selection`.
MAX_UNROLLED_CPU, MAX_UNROLLED_GPU = 100, 64


def unrolled(num_rows: int) -> bool:
    """Whether rules over `num_rows` clients are written out row by row: few rows, on CPU or GPU."""
    if on_cpu():
        return num_rows <= MAX_UNROLLED_CPU
    return on_gpu() and num_rows <= MAX_UNROLLED_GPU


def selects(num_rows: int) -> bool:
    """Whether rules over `num_rows` clients count instead of sorting: many rows, on CPU or GPU.

    Nothing was measured on other devices, where `jnp.sort` is used.
    """
    return (on_cpu() or on_gpu()) and not unrolled(num_rows)


def column_chunk(num_rows: int) -> int:
    """Columns of a block of `num_rows` rows, such that the block stays in cache.

    >>> column_chunk(51), column_chunk(1), column_chunk(10_000)
    (8000, 20000, 1000)
    """
    return min(max(408_000 // max(num_rows, 1), 1000), 20_000)


@cache
def sorting_network(num_rows: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Layers of comparators ``(i, j), i < j`` that sort `num_rows` values of any number.

    Batcher's odd-even merge sort; Knuth, The Art of Computer Programming vol. 3, algorithm
    5.2.2M. Comparators of one layer touch disjoint rows.

    >>> sorting_network(3)
    (((0, 2),), ((0, 1),), ((1, 2),))
    """
    layers = []
    top = 1 << max((num_rows - 1).bit_length() - 1, 0)
    p = top
    while p > 0 and num_rows > 1:
        q, r, d = top, 0, p
        while True:
            layers.append(tuple((i, i + d) for i in range(num_rows - d) if i & p == r))
            if q == p:
                break
            q, r, d = q >> 1, p, q - p
        p >>= 1
    return tuple(layer for layer in layers if layer)


def compare(rows: list[Array], layers, lean: bool) -> list[Array]:
    """The rows after all comparators of some layers; `lean` as in `sorted_rows`.

    >>> [row.item() for row in compare([jnp.array(3), jnp.array(1)], [[(0, 1)]], lean=True)]
    [1, 3]
    """
    rows = list(rows)
    for layer in layers:
        for i, j in layer:
            a, b = rows[i], rows[j]
            if lean:
                rows[i], rows[j] = jnp.minimum(a, b), jnp.maximum(a, b)
            else:
                swap = b < a
                rows[i], rows[j] = lax.select(swap, b, a), lax.select(swap, a, b)
    return rows


def sorted_rows(block: Float[Array, "K C"], lean: bool = False) -> list[Float[Array, "1 C"]]:
    """Sort every column of a block, as a list of rows; for rules with one result.

    XLA on CPU compiles network and rule to a single loop that keeps a column in registers, if
    the rule ends in one array (every further array runs the network again), adds up by
    `tree_sum`, and keeps the shape ``[1, C]`` to its end: a reshape of every row counts as
    duplicated work and makes XLA cut the loop into dozens that repeat each other. No NaN.

    A comparator is a comparison and two choices, on a CPU nearly twice as quick as `jnp.minimum`
    and `jnp.maximum`, which must let NaN through. With `lean` it is those two nevertheless: two
    operations in place of three, for rules so long that XLA would cut their loop. On a GPU it
    always is.

    >>> [row.tolist() for row in sorted_rows(jnp.array([[3.0, 1.0], [2.0, 5.0]]))]
    [[[2.0, 1.0]], [[3.0, 5.0]]]
    """
    if not unrolled(block.shape[0]):
        return split_rows(jnp.sort(block, axis=0))
    return compare(split_rows(block), sorting_network(block.shape[0]), lean or not on_cpu())


def split_rows(block: Float[Array, "K C"]) -> list[Float[Array, "1 C"]]:
    """The rows of a block, each still of two dimensions.

    >>> [row.shape for row in split_rows(jnp.zeros((2, 3)))]
    [(1, 3), (1, 3)]
    """
    return [block[i : i + 1] for i in range(block.shape[0])]


def tree_sum(terms: list[Array]) -> Array:
    """Add up arrays pairwise, which keeps XLA's loops whole and rounding errors small.

    >>> tree_sum([jnp.ones(2), jnp.ones(2), jnp.ones(2)]).tolist()
    [3.0, 3.0]
    """
    terms = list(terms)
    while len(terms) > 1:
        pairs = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + terms[len(pairs) * 2 :]
    return terms[0]


def sort_block(block: Float[Array, "K C"]) -> Float[Array, "K C"]:
    """Sort every column of a block, ascending along axis 0; for rules that need all rows at once.

    On CPU a loop over the layers of the network: all comparators of a layer are equally wide, so
    a layer is two shifted copies of the block and a choice. No NaN.

    >>> sort_block(jnp.array([[3.0, 1.0], [2.0, 5.0]])).tolist()
    [[2.0, 1.0], [3.0, 5.0]]
    """
    num_rows = block.shape[0]
    layers = sorting_network(num_rows)
    if not on_cpu() or not layers:
        return jnp.sort(block, axis=0)
    # One layer after the other written out would be fused into one loop per row, each of which
    # runs the whole network below it: XLA on CPU drops optimisation barriers before it fuses.
    role = np.zeros((2, len(layers), num_rows, 1), bool)
    for depth, layer in enumerate(layers):
        low, high = zip(*layer, strict=True)
        role[0, depth, low] = role[1, depth, high] = True
    widths = jnp.array([layer[0][1] - layer[0][0] for layer in layers])

    def run_layer(block, layer):
        is_low, is_high, width = layer
        twice = jnp.concatenate([block, block])
        above = lax.dynamic_slice_in_dim(twice, width, num_rows, axis=0)
        below = lax.dynamic_slice_in_dim(twice, num_rows - width, num_rows, axis=0)
        low, high = is_low & (above < block), is_high & (below > block)
        return jnp.where(low, above, jnp.where(high, below, block)), None

    return lax.scan(run_layer, block, (jnp.asarray(role[0]), jnp.asarray(role[1]), widths))[0]


def map_columns(
    fn: Callable[..., Any], *arrays: Float[Array, "_ D"], chunk: int | None = None
) -> Any:
    """Apply `fn` to blocks of columns and put the results together.

    ``fn(blocks...)`` takes one ``[K_a, C]`` block per array and returns a pytree of ``[..., C]``
    arrays whose columns depend on the same columns of the blocks only; the result holds the same
    tree with ``[..., D]`` leaves, equal to ``fn(*arrays)``. A rule that sorts and then reduces
    does both while the block is in cache, instead of writing a sorted ``[K, D]`` and reading it
    back. Off CPU, or when D fits one block, this is ``fn(*arrays)``.

    Args:
        fn: the rule for one block.
        arrays: one or more arrays with the same number D of columns.
        chunk: columns in a block; by default `column_chunk` of the rows together, on CPU.

    >>> x = jnp.arange(10.0).reshape(2, 5)
    >>> map_columns(lambda b: b[0] + b[1], x, chunk=2).tolist()
    [5.0, 7.0, 9.0, 11.0, 13.0]
    """
    return over_columns(lambda *shares: _map_blocks(fn, shares, chunk), *arrays)


def _map_blocks(fn, arrays, chunk: int | None):
    dim = arrays[0].shape[-1]
    if chunk is None:
        chunk = column_chunk(sum(a.shape[0] for a in arrays)) if on_cpu() else dim
    if dim <= chunk:
        return fn(*arrays)
    num_blocks = -(-dim // chunk)
    # Blocks are read where they lie: padding D to a multiple would copy the whole stack first.
    starts = jnp.minimum(jnp.arange(num_blocks) * chunk, dim - chunk)
    repeated = num_blocks * chunk - dim

    def block_rule(start):
        return fn(*(lax.dynamic_slice_in_dim(a, start, chunk, axis=1) for a in arrays))

    def join(parts):  # [num_blocks, ..., C] -> [..., D]
        parts = jnp.moveaxis(parts, 0, -2)
        head = parts[..., :-1, :].reshape(*parts.shape[:-2], -1)
        return jnp.concatenate([head, parts[..., -1, repeated:]], axis=-1)

    return jax.tree.map(join, lax.map(block_rule, starts))


def map_columns_pair(
    fn: Callable[..., tuple[Array, Array]], *arrays: Float[Array, "_ D"], chunk: int | None = None
) -> tuple[Array, Array]:
    """`map_columns` for a rule with two results that share most of their work.

    XLA on CPU emits one loop per result and repeats the shared work in each; as the real and
    imaginary part of one array they come out of a single loop.

    >>> map_columns_pair(lambda b: (b[0], b[1]), jnp.array([[1.0], [2.0]]))
    (Array([1.], dtype=float32), Array([2.], dtype=float32))
    """
    if not on_cpu() or arrays[0].dtype not in (jnp.float32, jnp.float64):
        return map_columns(fn, *arrays, chunk=chunk)
    pair = map_columns(lambda *blocks: lax.complex(*fn(*blocks)), *arrays, chunk=chunk)
    # Otherwise XLA sees through the packing where there is a single block and no loop.
    pair = lax.optimization_barrier(pair)
    return jnp.real(pair), jnp.imag(pair)


def sort_chunk() -> int | None:
    """Columns of a block for rules on `sort_block`, which needs several copies of it in cache.

    >>> sort_chunk() in (1000, None)
    True
    """
    return 1000 if on_cpu() else None


def sort_clients(updates: Float[Array, "K D"]) -> Float[Array, "K D"]:
    """Sort every coordinate over the clients, ascending.

    On CPU by a comparator network on blocks of columns, about five times as fast as `jnp.sort`,
    which is used elsewhere. Rules on top of it need not sort at this price: see `sorted_rows`.

    Args:
        updates: stack of client updates, without NaN.

    >>> sort_clients(jnp.array([[3.0, 1.0], [2.0, 5.0], [1.0, 4.0]])).tolist()
    [[1.0, 1.0], [2.0, 4.0], [3.0, 5.0]]
    """
    return map_columns(sort_block, updates, chunk=sort_chunk())

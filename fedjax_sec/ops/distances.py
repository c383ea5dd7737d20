"""Distances between clients, Krum scores, and Bulyan's repeated Krum."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from fedjax_sec.ops.backend import on_cpu
from fedjax_sec.ops.client_axis import over_columns
from fedjax_sec.ops.moments import inverse_power, row_norms, unit_rows
from fedjax_sec.ops.precision import root, wide


def squared_distances(
    updates: Float[Array, "K D"], valid: Bool[Array, " K"]
) -> tuple[Float[Array, "K K"], Float[Array, ""]]:
    """Squared Euclidean distances between all clients, in scaled units, and the scale.

    With c a power of two (so exact) near one over the median of the largest magnitudes of the
    valid rows, and z the row that attains this median, one Gram matrix G of ``c (u_i - z)`` gives
    ``d_ij = G_ii + G_jj - 2 G_ij = c^2 |u_i - u_j|^2``. The shift keeps the accuracy when the
    updates nearly coincide, the scale keeps the squares in range. The true distance is
    ``sqrt(d) / c``. Whatever cannot be represented is infinite. Distances of half precision are
    float32, since D squares near one leave the range of float16 and close ones would tie.

    Args:
        updates: stack of client updates; valid rows may be huge, or hold NaN or infinity.
        valid: rows that take part; rows and columns of the others are infinite.

    Returns:
        Scaled squared distances, symmetric, with zeros on the diagonal of valid rows; and c.

    >>> x = jnp.array([[0.0, 0.0], [3.0, 4.0], [jnp.nan, 0.0]])
    >>> d, c = squared_distances(x, jnp.array([True, True, False]))
    >>> (jnp.sqrt(d) / c).tolist()
    [[0.0, 5.0, inf], [5.0, 0.0, inf], [inf, inf, inf]]
    """
    num_rows = updates.shape[0]
    # Faster on CPU than the maximum of absolute values.
    magnitude = jnp.maximum(jnp.max(updates, axis=1), -jnp.min(updates, axis=1))
    magnitude = magnitude.astype(wide(updates.dtype))
    magnitude = jnp.where(valid & ~jnp.isnan(magnitude), magnitude, jnp.inf)
    middle = jnp.argsort(magnitude)[jnp.maximum(valid.sum() - 1, 0) // 2]
    usable = jnp.isfinite(magnitude[middle])
    scale = inverse_power(magnitude[middle])
    reference = jnp.where(usable, updates[middle], 0.0)
    gram = _gram(updates, reference, scale, valid)
    norms = jnp.diagonal(gram)
    squares = jnp.maximum(norms[:, None] + norms[None, :] - 2.0 * gram, 0.0)
    squares = jnp.where(jnp.isnan(squares), jnp.inf, squares)
    squares = jnp.minimum(squares, squares.T)
    squares = jnp.where(jnp.eye(num_rows, dtype=bool), 0.0, squares)
    return jnp.where(valid[:, None] & valid[None, :], squares, jnp.inf), scale


#: Columns of a block whose Gram matrix is computed at a time on CPU: XLA takes two to three times
#: as long for the product of a wide matrix with its own transpose, and on one core only.
GRAM_CHUNK = 512


def _gram(
    updates: Float[Array, "K D"],
    reference: Float[Array, " D"],
    scale: Float[Array, ""] | Float[Array, "K 1"],
    valid: Bool[Array, " K"],
) -> Float[Array, "K K"]:
    """Inner products of all pairs of ``c (u_i - z)``, zero for invalid rows; c may differ by row.

    On CPU block by block, which also keeps the shifted rows in cache instead of in a second stack.
    """

    return over_columns(
        lambda rows, center: _gram_of(rows, center, scale, valid), updates, reference, total=True
    )


def _gram_of(updates, reference, scale, valid):
    """`_gram` on one device."""

    def product(rows, center):
        difference = rows.astype(scale.dtype) - center[None, :].astype(scale.dtype)
        shifted = jnp.where(valid[:, None], difference * scale, 0.0)
        return jnp.dot(shifted, shifted.T, precision=lax.Precision.HIGHEST)

    def block(start, size):
        return product(
            lax.dynamic_slice_in_dim(updates, start, size, axis=1),
            lax.dynamic_slice_in_dim(reference, start, size),
        )

    num_rows, dim = updates.shape
    whole, rest = divmod(dim, GRAM_CHUNK)
    if not on_cpu() or whole < 2:
        return product(updates, reference)
    zeros = jnp.zeros((num_rows, num_rows), scale.dtype)
    gram = lax.fori_loop(0, whole, lambda i, sum: sum + block(i * GRAM_CHUNK, GRAM_CHUNK), zeros)
    return gram + block(dim - rest, rest) if rest else gram


def cosine_similarities(
    updates: Float[Array, "K D"], valid: Bool[Array, " K"]
) -> Float[Array, "K K"]:
    """Cosines between all clients, ``<u_i, u_j> / (|u_i| |u_j|)``; zero for rows that are zero.

    From one Gram matrix of the rows, each scaled by a power of two so that its squares stay in
    range. At least float32. Rows and columns of invalid rows are zero.

    >>> x = jnp.array([[3.0, 4.0], [3e30, 4e30], [-4.0, 3.0], [jnp.nan, 0.0]])
    >>> cosine_similarities(x, jnp.array([True, True, True, False]))[0].tolist()
    [1.0, 1.0, 0.0, 0.0]
    """
    dtype = wide(updates.dtype)
    magnitude = jnp.maximum(jnp.max(updates, axis=1), -jnp.min(updates, axis=1)).astype(dtype)
    scale = inverse_power(jnp.where(valid, magnitude, 1.0))
    center = jnp.zeros(updates.shape[1], dtype)
    gram = _gram(updates, center, scale[:, None], valid)
    norms = root(jnp.diagonal(gram))
    product = norms[:, None] * norms[None, :]
    return jnp.where(product > 0, gram / jnp.where(product > 0, product, 1.0), 0.0)


def cosines_to(
    updates: Float[Array, "K D"], direction: Float[Array, " D"], valid: Bool[Array, " K"]
) -> Float[Array, " K"]:
    """Every client's cosine with one direction, ``<u_i, g> / (|u_i| |g|)``; zero where either is.

    The rows are brought to length one before they are multiplied, so huge and tiny ones count
    alike. At least float32.

    >>> x = jnp.array([[3e30, 4e30], [-4.0, 3.0], [jnp.nan, 0.0]])
    >>> cosines_to(x, jnp.array([6.0, 8.0]), jnp.array([True, True, False])).tolist()
    [1.0, 0.0, 0.0]
    """
    dtype = wide(updates.dtype)
    rows = jnp.where(valid[:, None], updates, 0).astype(dtype)
    one = direction.astype(dtype)[None]
    unit = unit_rows(one, row_norms(one))
    return jnp.sum(unit_rows(rows, row_norms(rows)) * unit, axis=1)


def _distance(sqdist, squared):
    wider = sqdist.astype(wide(sqdist.dtype))
    return wider if squared else root(wider)


def _limit_neighbours(num_neighbours, num_alive):
    return jnp.minimum(jnp.maximum(num_neighbours, 1), num_alive - 1)


def _finite(score: Array, alive: Array, dtype) -> Array:
    # Clients that are alive stay below the infinity of the others even when all scores overflow.
    return jnp.where(alive, jnp.minimum(score, jnp.finfo(dtype).max), jnp.inf).astype(dtype)


def krum_scores(
    sqdist: Float[Array, "K K"],
    alive: Bool[Array, " K"],
    num_neighbours: Int[Array, ""] | int,
    squared: bool = True,
) -> Float[Array, " K"]:
    """Krum score: the sum of a client's smallest squared distances to other clients.

    ``score_i = sum of the num_neighbours smallest d_ij, j alive, j != i``; Blanchard et al. 2017,
    section 4 (there ``num_neighbours = n - f - 2``). The number is limited to at least one and to
    the other clients that are alive.

    Args:
        sqdist: squared distances, in any unit.
        alive: clients still in the game; the others score infinity. Scores of those alive are
            finite (an overflow gives the largest float).
        num_neighbours: may be traced.
        squared: False sums distances instead of their squares, as the author code of ALIE does.

    >>> x = jnp.array([0.0, 1.0, 3.0])
    >>> krum_scores((x[:, None] - x[None, :]) ** 2, jnp.ones(3, bool), 1).tolist()
    [1.0, 1.0, 4.0]
    """
    num_rows = sqdist.shape[0]
    distance = _distance(sqdist, squared)
    other = alive[None, :] & ~jnp.eye(num_rows, dtype=bool)
    ordered = jnp.sort(jnp.where(other, distance, jnp.inf), axis=1)
    num_neighbours = _limit_neighbours(num_neighbours, alive.sum())
    near = jnp.arange(num_rows)[None, :] < num_neighbours
    return _finite(jnp.sum(jnp.where(near, ordered, 0.0), axis=1), alive, sqdist.dtype)


def krum_sequence(
    sqdist: Float[Array, "K K"],
    valid: Bool[Array, " K"],
    num_select: int,
    num_select_actual: Int[Array, ""] | int,
    neighbours_fn: Callable[[Int[Array, ""]], Int[Array, ""]],
    squared: bool = True,
) -> tuple[Bool[Array, " K"], Int[Array, " S"]]:
    """Select clients one after the other by Krum, each time among those that remain.

    Every step takes the client with the lowest `krum_scores` (of equal ones the lowest index) and
    removes it: the selection phase of Bulyan, El Mhamdi et al. 2018, section 4. Distances are
    sorted once; afterwards a client's rank among the remaining neighbours of every other is
    counted down, so a step costs O(K^2) elementwise work. A choice has no gradient.

    Args:
        sqdist: squared distances, in any unit.
        valid: clients that can be selected.
        num_select: S, the number of steps compiled.
        num_select_actual: steps taken, at most S; may be traced. Never more than valid clients.
        neighbours_fn: number of neighbours as a function of the number of clients that remain;
            limited to at least one and to the other clients that remain.
        squared: as in `krum_scores`.

    Returns:
        The selected clients, and their indices in order of selection, -1 for steps not taken.

    >>> x = jnp.array([0.0, 1.0, 3.0, 9.0])
    >>> d = (x[:, None] - x[None, :]) ** 2
    >>> chosen, order = krum_sequence(d, jnp.ones(4, bool), 3, 2, lambda n: n - 2)
    >>> chosen.tolist(), order.tolist()
    ([True, True, False, False], [1, 0, -1])
    """
    num_rows = sqdist.shape[0]
    distance = _distance(sqdist, squared)
    other = valid[None, :] & ~jnp.eye(num_rows, dtype=bool)
    masked = jnp.where(other, distance, jnp.inf)
    neighbour = jnp.argsort(masked, axis=1)
    ordered = jnp.take_along_axis(masked, neighbour, axis=1)
    place = jnp.argsort(neighbour, axis=1)  # place[i, j]: where j stands in i's list
    present = jnp.take_along_axis(other, neighbour, axis=1)
    rank = jnp.cumsum(present, axis=1, dtype=jnp.int32)
    column = jnp.arange(num_rows)[None, :]
    num_steps = jnp.minimum(num_select_actual, valid.sum())

    def step(t, state):
        alive, present, rank, order = state
        remaining = alive.sum()
        limit = _limit_neighbours(neighbours_fn(remaining), remaining)
        near = present & (rank <= limit)
        score = _finite(jnp.sum(jnp.where(near, ordered, 0.0), axis=1), alive, ordered.dtype)
        taken = jnp.where(t < num_steps, jnp.argmin(score), -1)
        removed = jnp.where(
            taken >= 0, lax.dynamic_slice_in_dim(place, jnp.maximum(taken, 0), 1, axis=1), num_rows
        )
        alive = alive & (jnp.arange(num_rows) != taken)
        present = present & (column != removed)
        rank = rank - (column >= removed)
        return alive, present, rank, order.at[t].set(taken)

    order = jnp.full(num_select, -1)
    alive, _, _, order = lax.fori_loop(0, num_select, step, (valid, present, rank, order))
    return valid & ~alive, order

"""Parts that several defences of FedML's code (FedSecurity) share, to the letter.

Its RFA and its geometric median of means keep the clients' weights in a Python set and pair its
elements, in the set's order, with the models. `set_weights` computes that order; `layered_median`
is the iteration behind both. Files are those of `python/fedml/core/security`.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from fedjax_sec.ops.moments import inverse_power
from fedjax_sec.ops.precision import root, wide

#: `eps` and `ftol` of `common/utils.py`, `compute_geometric_median`, and its number of steps.
EPSILON, TOLERANCE, STEPS = 1e-5, 1e-10, 100
_MODULUS_BITS = 61  # of CPython's hashes of numbers, modulo 2^61 - 1
_LINEAR_PROBES = 9  # CPython's Objects/setobject.c, as PERTURB_SHIFT
_PERTURB_SHIFT = 5


# --- Buckets --------------------------------------------------------------------------------------


def buckets(
    updates: Float[Array, "K D"],
    weights: Float[Array, " K"],
    valid: Bool[Array, " K"],
    size: Int[Array, ""] | int,
    at_most: int,
) -> tuple[Float[Array, "B D"], Float[Array, " B"], Float[Array, "B K"]]:
    """Weighted means of `size` valid rows at a time, in their order, their weights and members.

    `common/bucket.py`: nothing is shuffled, and the last bucket may be smaller. `size` may be
    traced, `at_most` is the number of buckets that are computed; those without a row have weight
    zero and no members.

    >>> x, w = jnp.array([[0.0], [4.0], [6.0]]), jnp.array([1.0, 3.0, 2.0])
    >>> rows, total, _ = buckets(x, w, jnp.ones(3, bool), 2, 2)
    >>> rows[:, 0].tolist(), total.tolist()
    ([3.0, 6.0], [4.0, 2.0])
    """
    bucket = (jnp.cumsum(valid) - 1) // size
    members = (jnp.arange(at_most)[:, None] == bucket[None]) & valid[None]
    dtype = wide(updates.dtype)
    shares = jnp.where(members, weights.astype(dtype)[None], 0.0)
    total = shares.sum(axis=1)
    shares = shares / jnp.where(total > 0, total, 1.0)[:, None]
    rows = jnp.dot(
        shares,
        jnp.where(valid[:, None], updates, 0.0).astype(dtype),
        precision=lax.Precision.HIGHEST,
    )
    return rows.astype(updates.dtype), total.astype(updates.dtype), members.astype(updates.dtype)


# --- Python's sets --------------------------------------------------------------------------------


class _Wide(NamedTuple):
    """Unsigned integers of 64 bits as two words."""

    high: Array
    low: Array


def set_weights(
    weights: Float[Array, " K"], valid: Bool[Array, " K"]
) -> tuple[Float[Array, " K"], Bool[Array, " K"]]:
    """The weight that FedML's RFA gives to each row, and which rows it uses at all.

    The code puts the numbers of examples into a set, divides each by the sum of the set into a
    second set, and pairs that set's elements with the clients. Of n clients with u different
    numbers the first u are used: the first alone where all are equal. A set's order follows from
    its elements' hashes, so it is the same in every process; it is exact for whole numbers of
    examples whose sum is below 2^31, and for CPython of 64 bits.

    >>> import jax
    >>> alpha, used = jax.jit(set_weights)(jnp.array([7.0, 7.0, 1.0]), jnp.ones(3, bool))
    >>> list({count / 8 for count in {7, 1}}), alpha.tolist(), used.tolist()
    ([0.125, 0.875], [0.125, 0.875, 0.0], [True, True, False])
    """
    clients = weights.shape[0]
    weights = jnp.where(valid, weights.astype(jnp.float32), 0.0)
    same = (weights[:, None] == weights[None, :]) & valid[:, None] & valid[None, :]
    earlier = jnp.arange(clients)[None, :] < jnp.arange(clients)[:, None]
    first = valid & ~jnp.any(same & earlier, axis=1)
    number = first.sum()
    # The set of counts; its order is the one in which the second set is filled.
    order = jnp.argsort(~first, stable=True)
    order = _set_order(_hash_of(*_mantissa(weights)), order, number)
    whole = _whole(weights)
    total = jnp.where(first, whole, 0).sum(dtype=jnp.uint32)
    order = _set_order(_hash_of(*_quotient(whole, total)), order, number)
    place = jnp.cumsum(valid) - 1
    used = valid & (place < number)
    shares = weights / jnp.maximum(jnp.where(first, weights, 0.0).sum(), 1e-30)
    alpha = shares[order[jnp.clip(place, 0, clients - 1)]]
    return jnp.where(used, alpha, 0.0), used


def _whole(weights):
    """The weights as whole numbers whose sum fits into 31 bits: as they are, if they are whole."""
    bits = 31 - (weights.shape[0] - 1).bit_length()
    largest = weights.max()
    exact = jnp.all(weights == jnp.floor(weights)) & (largest < 2.0**bits)
    scale = jnp.where(exact, 1.0, inverse_power(largest) * 2.0 ** (bits - 2))
    return jnp.round(weights * scale).astype(jnp.uint32)


def _mantissa(values) -> tuple[_Wide, Int[Array, " K"]]:
    """float32 as an integer times a power of two."""
    fraction, exponent = jnp.frexp(values)
    low = (fraction * 2.0**24).astype(jnp.uint32)
    return _Wide(jnp.zeros_like(low), low), exponent.astype(jnp.int32) - 24


def _quotient(part, whole) -> tuple[_Wide, Int[Array, " K"]]:
    """``part / whole`` as float64 rounds it: an integer of 53 bits times a power of two."""
    whole = jnp.broadcast_to(whole, part.shape)

    def double(_, carry):
        rest, exponent = carry
        small = (rest < whole) & (rest > 0)
        return jnp.where(small, rest << 1, rest), exponent - small.astype(jnp.int32)

    rest, exponent = lax.fori_loop(0, 31, double, (part, jnp.zeros(part.shape, jnp.int32)))

    def bit(_, carry):
        high, low, rest = carry
        one = rest >= whole
        rest = jnp.where(one, rest - whole, rest) << 1
        return (high << 1) | (low >> 31), (low << 1) | one.astype(jnp.uint32), rest

    zero = jnp.zeros_like(part)
    high, low, rest = lax.fori_loop(0, 53, bit, (zero, zero, rest))
    # Half a unit is rounded to even.
    up = (rest > whole) | ((rest == whole) & (low & 1 == 1))
    added = low + up.astype(jnp.uint32)
    return _Wide(high + (up & (added == 0)).astype(jnp.uint32), added), exponent - 52


def _shift_left(value: _Wide, by) -> _Wide:
    by = by.astype(jnp.uint32)
    inner = jnp.where(by < 32, by, by - 32)
    carried = jnp.where(inner > 0, value.low >> jnp.where(inner > 0, 32 - inner, 1), 0)
    near = _Wide((value.high << inner) | carried, value.low << inner)
    far = _Wide(value.low << inner, jnp.zeros_like(value.low))
    return _Wide(*(jnp.where(by < 32, a, b) for a, b in zip(near, far, strict=True)))


def _shift_right(value: _Wide, by) -> _Wide:
    by = jnp.asarray(by).astype(jnp.uint32)
    inner = jnp.where(by < 32, by, by - 32)
    carried = jnp.where(inner > 0, value.high << jnp.where(inner > 0, 32 - inner, 1), 0)
    near = _Wide(value.high >> inner, (value.low >> inner) | carried)
    far = _Wide(jnp.zeros_like(value.high), value.high >> inner)
    return _Wide(*(jnp.where(by < 32, a, b) for a, b in zip(near, far, strict=True)))


def _hash_of(mantissa: _Wide, exponent) -> _Wide:
    """CPython's hash of ``mantissa 2^exponent`` >= 0: modulo 2^61 - 1, where 2^61 is 1.

    So a power of two rotates the 61 bits.
    """
    turn = jnp.mod(exponent, _MODULUS_BITS)
    left, right = _shift_left(mantissa, turn), _shift_right(mantissa, _MODULUS_BITS - turn)
    cut = jnp.uint32((1 << (_MODULUS_BITS - 32)) - 1)
    return _Wide((left.high | right.high) & cut, left.low | right.low)


def _set_order(hashes: _Wide, order, number) -> Int[Array, " K"]:
    """The order of a set that the first `number` rows of `order` enter one after another.

    As `set_add_entry` and `set_table_resize` of CPython: a table of 8 places grows as soon as three
    fifths of it are full, to the next power of two above four times its elements, and what it holds
    moves in the table's order.
    """
    size, filled = 8, 0
    while True:
        grows_at = next(n for n in range(filled, size + 1) if 5 * n >= 3 * (size - 1))
        number_here = jnp.minimum(number, grows_at)
        placed = _fill(hashes, order, number_here, size)
        order = jnp.where(number >= filled, placed, order)
        if grows_at > order.shape[0]:
            return order
        filled, size = grows_at, 1 << (4 * grows_at).bit_length()


def _fill(hashes: _Wide, order, number, size: int) -> Int[Array, " K"]:
    """`order` with its first `number` rows in the order of a new table of `size` places."""
    probes = jnp.arange(_LINEAR_PROBES + 1)

    def insert(step, slots):
        row = order[step]
        key = _Wide(hashes.high[row], hashes.low[row])
        taken = jnp.zeros(size, bool).at[slots].set(True, mode="drop")  # `size` is no place

        def free_of(place):
            near = (probes == 0) | (place + _LINEAR_PROBES < size)
            free = near & ~taken[jnp.minimum(place + probes, size - 1)]
            return jnp.any(free), place + jnp.argmax(free).astype(place.dtype)

        def occupied(carry):
            return ~free_of(carry[0])[0]

        def probe(carry):
            place, key = carry
            key = _shift_right(key, _PERTURB_SHIFT)
            place = (place.astype(jnp.uint32) * 5 + 1 + key.low) & (size - 1)
            return place.astype(jnp.int32), key

        place = (key.low & (size - 1)).astype(jnp.int32)
        place, _ = lax.while_loop(occupied, probe, (place, key))
        return jnp.where(step < number, slots.at[step].set(free_of(place)[1]), slots)

    count = order.shape[0]
    slots = lax.fori_loop(0, min(count, size - 1), insert, jnp.full(count, size, jnp.int32))
    inside = jnp.arange(count) < number
    return order[jnp.argsort(jnp.where(inside, slots, size), stable=True)]


# --- The geometric median, tensor by tensor -------------------------------------------------------


def layered_median(
    updates: Float[Array, "K D"],
    alpha: Float[Array, " K"],
    used: Bool[Array, " K"],
    places: list[slice],
) -> tuple[Float[Array, " D"], Float[Array, " K"]]:
    r"""`compute_geometric_median` of every tensor by itself, and the rows' mean weights.

    .. math:: \alpha_i \leftarrow \max(\epsilon, \alpha_i / \max(\epsilon, \|u_i - z\|)), \quad
              \alpha \leftarrow \alpha / \sum_i \alpha_i, \quad z \leftarrow \sum_i \alpha_i u_i

    Unlike Weiszfeld's, a step divides the *last step's* weights by the distances, so the factors
    multiply and the result draws near a single row. At most 100 steps, until the sum of weighted
    distances stays as it is; epsilon = 1e-5.

    >>> x = jnp.array([[0.0, 0.0], [4.0, 0.0], [1.0, 3.0]])
    >>> print(layered_median(x, jnp.full(3, 1 / 3), jnp.ones(3, bool), [slice(0, 2)])[0].round(2))
    [0. 0.]
    >>> from fedjax_sec.ops.iterative import geometric_median
    >>> print(geometric_median(x, jnp.ones(3), jnp.zeros(2), 100)[0].round(2))
    [1.3  1.05]
    """
    dtype = wide(updates.dtype)
    rows = jnp.where(used[:, None], updates, 0.0)
    sizes = np.array([at.stop - at.start for at in places])
    # Tensors are cut into blocks of one width, with zeros behind: operations of each tensor's own,
    # a few hundred inside a loop, would compile for half a minute.
    width = 1 << max(int(sizes.sum()) // 2048, 1).bit_length()
    counts = -(-sizes // width)
    parts = [
        jnp.pad(rows[:, at], ((0, 0), (0, count * width - size)))
        for at, count, size in zip(places, counts, sizes, strict=True)
    ]
    blocks = jnp.concatenate(parts, axis=1).reshape(rows.shape[0], -1, width)
    owner = np.repeat(np.arange(len(places)), counts)
    owned = (owner[:, None] == jnp.arange(len(places))[None]).astype(dtype)  # [blocks, tensors]

    def middle(weights):
        return jnp.sum(weights[:, owner][..., None] * blocks.astype(dtype), axis=0)

    def distances(center):
        squares = jnp.sum((blocks.astype(dtype) - center[None]) ** 2, axis=2)
        return root(jnp.dot(squares, owned, precision=lax.Precision.HIGHEST))

    def objective(weights, distance):
        return jnp.sum(jnp.where(used[:, None], weights * distance, 0.0), axis=0)

    def step(state):
        weights, center, distance, value, done = state
        new = weights / jnp.maximum(EPSILON, distance)
        new = jnp.where(used[:, None], jnp.maximum(EPSILON, new), 0.0)
        new = new / jnp.maximum(new.sum(axis=0), EPSILON)[None]
        new = jnp.where(done[None], weights, new)
        center = middle(new)
        distance = distances(center)
        changed = objective(new, distance)
        still = jnp.abs(value - changed) < TOLERANCE * changed
        return new, center, distance, changed, done | still | (changed == 0)

    weights = jnp.broadcast_to(alpha.astype(dtype)[:, None], (alpha.shape[0], len(places)))
    center = middle(weights)
    distance = distances(center)
    value = objective(weights, distance)
    start = (weights, center, distance, value, jnp.zeros(len(places), bool))

    def unless_done(_, state):
        return lax.cond(jnp.all(state[-1]), lambda same: same, step, state)

    weights, center, *_ = lax.fori_loop(0, STEPS, unless_done, start)
    flat, starts = center.reshape(-1), width * (np.cumsum(counts) - counts)
    whole = jnp.concatenate([flat[at : at + size] for at, size in zip(starts, sizes, strict=True)])
    shares = jnp.asarray(sizes / sizes.sum(), dtype)
    return whole.astype(updates.dtype), weights @ shares

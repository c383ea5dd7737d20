"""A keyed permutation of {0, ..., count - 1} without a table, a sort or any state."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from fedjax_sec.ops.backend import on_cpu

_ROUNDS = 8
_GOLDEN = np.uint32(0x9E3779B9)  # 2^32 over the golden ratio, the usual odd multiplier


def _mix(h):
    """MurmurHash3's finaliser: a bijection of 32-bit words in which every bit affects all."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def permute(
    key: PRNGKeyArray,
    position: Int[Array, "*B"],
    count: Int[Array, ""],
    number: Int[Array, ""] | int = 0,
) -> Int[Array, "*B"]:
    """The images of `position` under random permutation `number` of {0, ..., count - 1}.

    A Feistel network on pairs `(l, r)` of residues modulo a = ceil(sqrt(count)),
    `(l, r) -> (r, l + hash(key, r) mod a)`, permutes {0, ..., a^2 - 1}; values that fall outside
    are permuted again until they fall inside (cycle walking), which keeps it a bijection.

    This is how an epoch visits every example once, with a traced `count` that differs between
    clients: sorting random numbers for all clients every round would cost more than the training
    step of a small model. Positions outside {0, ..., count - 1} give values inside that range too.

    Source: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002.

    >>> import jax, jax.numpy as jnp
    >>> sorted(permute(jax.random.key(0), jnp.arange(5), jnp.array(5)).tolist())
    [0, 1, 2, 3, 4]
    """
    count = jnp.maximum(count, 1).astype(jnp.uint32)
    side = jnp.ceil(jnp.sqrt(count.astype(jnp.float32))).astype(jnp.uint32)
    side = side + (side * side < count).astype(jnp.uint32)
    # Hashed from the key's own words: a generator call compiles longer than the whole network.
    first, second = jax.random.key_data(key)[..., 0], jax.random.key_data(key)[..., 1]
    base = _mix(first ^ _mix(second ^ _mix(jnp.asarray(number).astype(jnp.uint32) + _GOLDEN)))
    words = _mix(base + jnp.arange(1, _ROUNDS + 1, dtype=jnp.uint32) * _GOLDEN)

    def swap(halves, word):
        left, right = halves
        return (right, (left + _mix(right * _GOLDEN ^ word)) % side), None

    def scramble(value):
        halves = value // side, value % side
        (left, right), _ = jax.lax.scan(swap, halves, words, unroll=1 if on_cpu() else _ROUNDS)
        return left * side + right

    def walk(state):
        value, outside = state
        value = jnp.where(outside, scramble(value), value)
        return value, value >= count

    value = jnp.clip(position, 0).astype(jnp.uint32) % count
    start = value, jnp.full(value.shape, True)
    value, _ = jax.lax.while_loop(lambda state: jnp.any(state[1]), walk, start)
    return value.astype(jnp.int32)

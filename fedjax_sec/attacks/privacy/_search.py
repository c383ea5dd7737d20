"""Descent on guessed inputs, with the inputs on the way."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def descend(
    gradient_of: Callable,
    start: Any,
    optimizer: optax.GradientTransformation,
    iterations: int,
    snapshots: int = 0,
    bounds: tuple | None = None,
) -> tuple[Any, Any]:
    """(x, trail): x after so many steps of the optimizer, from `start` (an array).

    `gradient_of(step, x)` is the gradient that the optimizer gets. x is clipped to `bounds` behind
    every step where they are given. `trail [S, ...]` are the points before S evenly spaced steps,
    None without `snapshots`.

    >>> x, trail = descend(lambda step, x: x, jnp.ones(1), optax.sgd(0.5), 2, snapshots=2)
    >>> print(x, trail[:, 0])
    [0.25] [1.  0.5]
    """

    def step(carry, number):
        x, state = carry
        change, state = optimizer.update(gradient_of(number, x), state, x)
        x = optax.apply_updates(x, change)
        return (x if bounds is None else jnp.clip(x, *bounds), state), None

    def run(carry, begin, length: int):
        return jax.lax.scan(step, carry, begin + jnp.arange(length))[0]

    carry = start, optimizer.init(start)
    if not snapshots:
        return run(carry, 0, iterations)[0], None
    length = iterations // snapshots

    def stretch(carry, number):
        return run(carry, number * length, length), carry[0]

    carry, trail = jax.lax.scan(stretch, carry, jnp.arange(snapshots))
    return run(carry, snapshots * length, iterations - snapshots * length)[0], trail

"""Projected gradient descent on inputs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


def linf_pgd(
    gradient: Callable,
    x: Float[Array, " B *shape"],
    key: PRNGKeyArray,
    *,
    eps: Float[Array, ""] | float,
    step_size: Float[Array, ""] | float,
    num_steps: int,
    random_start: bool = True,
    memory: Any = None,
) -> Float[Array, " B *shape"]:
    r"""Inputs in the L-infinity ball around `x`, moved along the sign of a loss's gradient.

    .. math:: x_{t+1} = \Pi \left( x_t + \alpha\, \mathrm{sign}\, \nabla_x L(x_t) \right)

    with the projection onto :math:`|x_t - x| \le \epsilon` and the pixels' range [0, 1]. Madry et
    al. 2018, equation 3 and section 3, where x_0 is drawn uniformly from the ball.

    Args:
        gradient: of the loss in the inputs; its positive scale does not matter. With `memory`,
            what it remembers at the start, it is `(inputs, memory) -> (direction, memory)`.
        x: inputs in pixel units, in [0, 1].
        eps, step_size: in pixel units.
        num_steps: gradients taken.
        random_start: start anywhere in the ball instead of at x.

    >>> x = jnp.array([[0.5, 0.9]])
    >>> moved = linf_pgd(
    ...     jnp.sign, x, jax.random.key(0), eps=0.3, step_size=0.2, num_steps=2, random_start=False
    ... )
    >>> jnp.round(moved, 3).tolist()
    [[0.800000011920929, 1.0]]
    """
    low, high = jnp.maximum(x - eps, 0.0), jnp.minimum(x + eps, 1.0)
    start = x
    if random_start:
        start = x + eps * jax.random.uniform(key, x.shape, x.dtype, -1.0, 1.0)

    def step(_, carry):
        moved, memory = carry
        if memory is None:
            slope = gradient(moved)
        else:
            slope, memory = gradient(moved, memory)
        return jnp.clip(moved + step_size * jnp.sign(slope), low, high), memory

    return jax.lax.fori_loop(0, num_steps, step, (jnp.clip(start, low, high), memory))[0]

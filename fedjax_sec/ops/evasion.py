"""Losses that attacks on inputs ascend, and Auto-PGD."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

#: Losses that `objective` knows.
LOSSES = ("cross_entropy", "dlr", "margin")


def _of_class(logits, y):
    return jnp.sum(logits * jax.nn.one_hot(y, logits.shape[1], dtype=logits.dtype), axis=1)


def margin(logits: Float[Array, "B C"], y: Int[Array, " B"]) -> Float[Array, " B"]:
    r""":math:`z_y - \max_{i \neq y} z_i`: negative where another class wins.

    >>> margin(jnp.array([[3.0, 1.0], [0.0, 2.0]]), jnp.array([0, 0])).tolist()
    [2.0, -2.0]
    """
    others = jnp.where(jax.nn.one_hot(y, logits.shape[1], dtype=bool), -jnp.inf, logits)
    return _of_class(logits, y) - others.max(axis=1)


def objective(
    loss: str,
    logits: Float[Array, "B C"],
    y: Int[Array, " B"],
    target: Int[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    r"""The loss that an attack on each input ascends; with a `target` t, towards that class.

    With the logits z sorted as :math:`z_{\pi_1} \ge z_{\pi_2} \ge \dots`

    - `cross_entropy`: :math:`-\log p_y`, or :math:`\log p_t`;
    - `dlr`, the difference-of-logits ratio:
      :math:`-(z_y - \max_{i \ne y} z_i) / (z_{\pi_1} - z_{\pi_3})`, or
      :math:`-(z_y - z_t) / (z_{\pi_1} - (z_{\pi_3} + z_{\pi_4}) / 2)`;
    - `margin`: :math:`\max_{i \ne y} z_i - z_y`, or :math:`z_t - z_y`.

    Raises: `ValueError` for another loss.

    Source: Croce and Hein: Reliable evaluation of adversarial robustness with an ensemble of
    diverse parameter-free attacks (ICML 2020), equations 6 and 7, for the difference-of-logits
    ratio; Carlini and Wagner 2017 for the margin.

    >>> z, y = jnp.array([[4.0, 1.0, 2.0, 0.0]]), jnp.array([0])
    >>> objective("dlr", z, y).item(), objective("margin", z, y, jnp.array([1])).item()
    (-0.6666666865348816, -3.0)
    """
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {LOSSES}, got {loss!r}.")
    if loss == "cross_entropy":
        log_probs = jax.nn.log_softmax(logits)
        return -_of_class(log_probs, y) if target is None else _of_class(log_probs, target)
    apart = (
        margin(logits, y) if target is None else _of_class(logits, y) - _of_class(logits, target)
    )
    if loss == "margin":
        return -apart
    ranked = jnp.sort(logits, axis=1)
    low = ranked[:, -3] if target is None else (ranked[:, -3] + ranked[:, -4]) / 2
    return -apart / (ranked[:, -1] - low + 1e-12)


def checkpoints(num_steps: int) -> list[int]:
    """The steps after which Auto-PGD looks whether it still gets on.

    The first part is 22% of the steps, each later one 3% shorter than the one before, but at least
    6% (each rounded down, and at least one step), as in the author code.

    >>> checkpoints(100)[:5], checkpoints(10)
    ([22, 41, 57, 70, 80], [2, 3, 4, 5, 6, 7, 8, 9, 10])
    """
    length, least = (max(int(share * num_steps), 1) for share in (0.22, 0.06))
    shorter = max(int(0.03 * num_steps), 1)
    steps, at = [], 0
    while at + length <= num_steps:
        at += length
        steps.append(at)
        length = max(length - shorter, least)
    return steps


def linf_apgd(
    value: Callable[[Float[Array, " B *shape"]], Float[Array, " B"]],
    x: Float[Array, " B *shape"],
    key: PRNGKeyArray,
    *,
    eps: Float[Array, ""] | float,
    num_steps: int,
    rho: Float[Array, ""] | float = 0.75,
) -> Float[Array, " B *shape"]:
    r"""Auto-PGD: inputs in the L-infinity ball around `x` with the largest value that it met.

    .. math:: z_{k+1} = \Pi (x_k + \eta_k\, \mathrm{sign}\, \nabla L(x_k)), \qquad
              x_{k+1} = \Pi (x_k + 0.75 (z_{k+1} - x_k) + 0.25 (x_k - x_{k-1}))

    Every input has a step size of its own that begins at 2 eps. At a checkpoint it is halved, and
    the search goes on from the best point so far, where the value rose in fewer than `rho` of the
    steps since the last one, or where neither step size nor best value changed since then. The
    first step has no momentum, as in the author code. The start is drawn from the ball and scaled
    until one of its pixels is eps away, before pixels are cut to [0, 1].

    Source: Croce and Hein 2020, Algorithm 1 and Section 3; alpha 0.75, rho 0.75. "Fewer than" is
    the paper's Condition 1. AutoAttack's code (`autopgd_base.py`, `APGDAttack.check_oscillation`)
    halves at equality too, and at the first checkpoint counts the first step as a rise wherever the
    value is positive; so the two may halve at different checkpoints.

    >>> best = linf_apgd(
    ...     lambda x: -jnp.abs(x - 0.7).sum(1), jnp.full((1, 2), 0.5), jax.random.key(0), eps=0.3,
    ...     num_steps=20,
    ... )
    >>> bool(jnp.abs(best - 0.7).max() < 0.02)
    True
    """
    shape = (-1, *(1,) * (x.ndim - 1))
    low, high = jnp.maximum(x - eps, 0.0), jnp.minimum(x + eps, 1.0)
    marks = np.zeros(num_steps + 1, np.int32)  # how many steps the part ending here has
    ends = checkpoints(num_steps)
    marks[ends] = np.diff([0, *ends])
    both = jax.value_and_grad(lambda inputs: _summed(value, inputs), has_aux=True)

    def look(inputs):
        (_, values), gradient = both(inputs)
        return values, gradient

    draw = jax.random.uniform(key, x.shape, x.dtype, -1.0, 1.0)
    largest = jnp.abs(draw).reshape(draw.shape[0], -1).max(axis=1).reshape(shape)
    start = jnp.clip(x + eps * draw / largest, low, high)
    values, gradient = look(start)
    size = jnp.full(x.shape[0], 2 * eps, x.dtype)
    carry = {
        "x": start,
        "before": start,
        "gradient": gradient,
        "value": values,
        "best": start,
        "best_value": values,
        "best_gradient": gradient,
        "size": size,
        "rises": jnp.zeros_like(size),
        "marked_value": values,
        "just_halved": jnp.zeros(x.shape[0], bool),
    }

    def step(number, c):
        reach = c["size"].reshape(shape)
        z = jnp.clip(c["x"] + reach * jnp.sign(c["gradient"]), low, high)
        share = jnp.where(number == 0, 1.0, 0.75).astype(x.dtype)
        moved = c["x"] + share * (z - c["x"]) + (1 - share) * (c["x"] - c["before"])
        moved = jnp.clip(moved, low, high)
        values, gradient = look(moved)
        better = values > c["best_value"]
        wide = better.reshape(shape)
        new = {
            "x": moved,
            "before": c["x"],
            "gradient": gradient,
            "value": values,
            "best": jnp.where(wide, moved, c["best"]),
            "best_value": jnp.where(better, values, c["best_value"]),
            "best_gradient": jnp.where(wide, gradient, c["best_gradient"]),
            "size": c["size"],
            "rises": c["rises"] + (values > c["value"]),
            "marked_value": c["marked_value"],
            "just_halved": c["just_halved"],
        }
        length = jnp.asarray(marks)[number + 1]
        stuck = ~c["just_halved"] & (new["best_value"] <= new["marked_value"])
        halve = (length > 0) & ((new["rises"] < rho * length) | stuck)
        wide = halve.reshape(shape)
        return new | {
            "x": jnp.where(wide, new["best"], new["x"]),
            "gradient": jnp.where(wide, new["best_gradient"], new["gradient"]),
            "size": jnp.where(halve, new["size"] / 2, new["size"]),
            "rises": jnp.where(length > 0, 0.0, new["rises"]),
            "marked_value": jnp.where(length > 0, new["best_value"], new["marked_value"]),
            "just_halved": jnp.where(length > 0, halve, new["just_halved"]),
        }

    return jax.lax.fori_loop(0, num_steps, step, carry)["best"]


def _summed(value, inputs):
    values = value(inputs)
    return values.sum(), values

"""L-BFGS with fixed step lengths, as PyTorch's optimizer without a line search."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

#: `torch.optim.LBFGS`: tolerances on the largest gradient, and on a step's and the value's change.
GRADIENT, CHANGE = 1e-7, 1e-9
#: Least curvature of a step that is remembered.
CURVATURE = 1e-10


class Memory(NamedTuple):
    """The last m steps and changes of the gradient, the newest at `newest`; the scale of H."""

    steps: Float[Array, "m D"]
    changes: Float[Array, "m D"]
    weights: Float[Array, " m"]  # one over their products; 0: nothing is there
    scale: Float[Array, ""]
    newest: Int[Array, ""]


class State(NamedTuple):
    """The search: the point, value and gradient there, the last step, and the counts."""

    x: Float[Array, " D"]
    value: Float[Array, ""]
    gradient: Float[Array, " D"]
    step: Float[Array, " D"]
    before: Float[Array, " D"]
    memory: Memory
    done: Int[Array, ""]  # iterations of this call
    calls: Int[Array, ""]
    first: Array


def minimize(
    function: Callable,
    x: Float[Array, " D"],
    calls: int,
    iterations: int = 20,
    memory: int = 100,
    rate: float | Array = 1.0,
) -> tuple[Float[Array, " D"], Float[Array, ""]]:
    r"""`calls` times `iterations` steps of L-BFGS on `function(x [D]) -> number`.

    With H the inverse Hessian by the two-loop recursion over the last `memory` steps,

    .. math:: x \leftarrow x - \eta H \nabla f(x), \qquad
              x \leftarrow x - \eta \min(1, 1 / \|\nabla f\|_1) \nabla f(x)
              \text{ at first}

    A step is remembered where the gradient's change along it is larger than 1e-10. A call ends
    early as `torch.optim.LBFGS.step` does: where the gradient's largest entry is at most 1e-7,
    where it rises hardly along the direction, or where the step or the value changes by less than
    1e-9; the next call goes on from there with the same memory. A value that is not finite ends the
    search. Returns: the last point, whose value may be larger than an earlier one, and its value.

    Source: Liu, Nocedal 1989; conditions and constants of PyTorch's `torch/optim/lbfgs.py`, which
    the author code of DLG (Zhu et al. 2019) calls with `lr=1` and no line search. optax's L-BFGS
    remembers steps of negative curvature too, and then does not descend without a line search.

    >>> x, value = minimize(lambda x: jnp.sum((x - 3.0) ** 2), jnp.zeros(2), calls=5)
    >>> bool(jnp.abs(x - 3).max() < 1e-5)
    True
    """
    evaluate = jax.value_and_grad(function)
    value, gradient = evaluate(x)
    nothing = jnp.zeros((memory, x.shape[0]), x.dtype)
    weights, scale = jnp.zeros(memory, x.dtype), jnp.ones((), x.dtype)
    empty = Memory(nothing, nothing, weights, scale, jnp.int32(memory - 1))
    zero, count = jnp.zeros_like(x), jnp.int32(0)
    start = State(x, value, gradient, zero, gradient, empty, count, count, jnp.array(True))

    def running(state):
        sound = jnp.isfinite(state.value) & jnp.all(jnp.isfinite(state.gradient))
        steep = jnp.max(jnp.abs(state.gradient)) > GRADIENT
        return (state.calls < calls) & sound & steep

    def iterate(state):
        memory = _remember(state.memory, state.step, state.gradient - state.before)
        direction = -_product(memory, state.gradient)
        length = jnp.abs(state.gradient).sum()
        size = rate * jnp.where(state.first, jnp.minimum(1.0, 1.0 / length), 1.0)
        # Along a direction that hardly descends no later call would move either.
        flat = jnp.dot(state.gradient, direction) > -CHANGE
        step = jnp.where(flat, 0.0, size * direction)
        value, gradient = evaluate(state.x + step)
        small = (jnp.max(jnp.abs(step)) <= CHANGE) | (jnp.abs(value - state.value) < CHANGE)
        over = small | (state.done + 1 == iterations)
        done = jnp.where(over, 0, state.done + 1)
        called = jnp.where(flat, calls, state.calls + over)
        first = jnp.array(False)
        x, before = state.x + step, state.gradient
        return State(x, value, gradient, step, before, memory, done, called, first)

    end = jax.lax.while_loop(running, iterate, start)
    return end.x, end.value


def _remember(memory: Memory, step, change) -> Memory:
    """The memory with one more step where its curvature is positive."""
    product = jnp.dot(change, step)
    curved = product > CURVATURE
    at = (memory.newest + 1) % memory.weights.shape[0]
    steps, changes, weights, scale, newest = memory
    inverse = 1.0 / jnp.where(curved, product, 1.0)
    square = jnp.where(curved, jnp.dot(change, change), 1.0)
    return Memory(  # a row is written, never the whole
        steps.at[at].set(jnp.where(curved, step, steps[at])),
        changes.at[at].set(jnp.where(curved, change, changes[at])),
        weights.at[at].set(jnp.where(curved, inverse, weights[at])),
        jnp.where(curved, product / square, scale),
        jnp.where(curved, at, newest),
    )


def _product(memory: Memory, gradient):
    """H times the gradient, by the two-loop recursion."""
    size = memory.weights.shape[0]
    rows = (memory.newest - jnp.arange(size)) % size  # from the newest to the oldest

    def backward(vector, row):
        alpha = memory.weights[row] * jnp.dot(memory.steps[row], vector)
        return vector - alpha * memory.changes[row], alpha

    def forward(vector, one):
        row, alpha = one
        beta = memory.weights[row] * jnp.dot(memory.changes[row], vector)
        return vector + (alpha - beta) * memory.steps[row], None

    vector, alphas = jax.lax.scan(backward, gradient, rows)
    return jax.lax.scan(forward, memory.scale * vector, (rows, alphas), reverse=True)[0]

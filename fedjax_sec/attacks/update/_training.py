"""How an adversary trains a model of its own inside an attack on updates: SGD as PyTorch's."""

import jax
import jax.numpy as jnp


def blank(vector, part: slice):
    """The vector [D] with zeros in a part of it."""
    return vector if part.start == part.stop else vector.at[part].set(0.0)


def gradient(task, params, x, y, mask, key, objective):
    """(gradient [D], statistics [S] as the step moves them or None) of one batch.

    The gradient is of `objective(loss, params)`, where the loss is the batch's training loss.
    Running statistics have no gradient.
    """
    keeps = task.space.observed.stop > task.space.observed.start

    def value(params):
        if not keeps:
            loss = task.loss(params, x, y, mask, train=True, key=key)
            return objective(loss, params), None
        loss, seen = task.loss_and_observed(params, x, y, mask, key=key)
        return objective(loss, params), seen

    slope, seen = jax.grad(value, has_aux=True)(params)
    return blank(slope, task.space.observed), seen


def sgd_step(task, params, velocity, slope, seen, rate, momentum, weight_decay):
    """(params [D], velocity [D]) after v <- momentum v + g + weight_decay w, w <- w - rate v."""
    velocity = momentum * velocity + slope + weight_decay * blank(params, task.space.observed)
    params = params - rate * velocity
    return params if seen is None else params.at[task.space.observed].set(seen), velocity


def measure(task, params, x, y, size: int):
    """(mean loss, share that is read as `y`) over the examples [n, ...], `size` at a time."""
    count = y.shape[0]
    size = min(size, count)
    batches = -(-count // size)
    rows = jnp.minimum(jnp.arange(batches * size), count - 1)  # the last batch is padded
    real = (jnp.arange(batches * size) < count).reshape(batches, size)

    def sums(batch):
        rows, real = batch
        outputs = task.outputs(params, x[rows])
        total, units = task.losses(outputs, y[rows])
        right = task.task.right(outputs, y[rows])
        parts = total, units, right.reshape(right.shape[0], -1).mean(axis=1)
        return [jnp.sum(jnp.where(real, part, 0.0)) for part in parts]

    total, units, right = jax.lax.map(sums, (rows.reshape(batches, size), real))
    return total.sum() / jnp.maximum(units.sum(), 1), right.sum() / count

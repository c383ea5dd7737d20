"""Gradient matching: the update that guessed examples give, and its distance to a real one."""

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sec.core import ConfigError, Guess
from fedjax_sec.ops.precision import root


def slope_of(message, params, task, known):
    """The sum of a client's gradients [T] by its message: of one step the gradient itself.

    Of plain gradient steps the update is minus the rate times their sum.
    """
    if known.rate is None:
        raise ConfigError(
            "reconstruction: the client's steps are not plain gradient steps, from which gradients "
            "could be computed; give it the optimizer sgd without momentum."
        )
    part = task.space.trained
    slope = -message.vector[part] / known.rate
    if (known.steps or 1) == 1:
        slope = slope - known.l2 * params[part]
    return slope


def simulate(params, x, targets, task, known):
    r"""The sum of gradients [T] that clients with these examples would send, by `slope_of`.

    `x [n, ...]` in the units that components see, `targets [n, C]` shares of classes. One step: the
    gradient of the mean loss of all examples. More steps are unrolled: step s trains on the batch
    of the examples sB to (s + 1)B - 1, counted round and round, which is all of them where n = B.
    Of several clients each has the next n / clients of the examples, and their mean is returned.
    """
    if known.clients > 1 and (known.steps or 1) > 1:
        share = x.shape[0] // known.clients
        split = (leaf.reshape(known.clients, share, *leaf.shape[1:]) for leaf in (x, targets))
        alone = known._replace(clients=1)
        return jax.vmap(lambda x, y: _train(params, x, y, task, alone))(*split).mean(axis=0)
    return _train(params, x, targets, task, known)


def _train(params, x, targets, task, known):
    part, steps = task.space.trained, known.steps or 1
    count, batch = x.shape[0], min(known.batch, x.shape[0])
    size = count if steps == 1 else batch

    def loss(weights, inputs, shares):
        train = known.batch_statistics
        every = jnp.ones(size, bool)
        outputs = task.outputs(params.at[part].set(weights), inputs, train=train, mask=every)
        return -(shares * jax.nn.log_softmax(outputs)).sum(axis=-1).mean()

    start = params[part]
    if steps == 1:
        return jax.grad(loss)(start, x, targets)

    def step(carry, number):
        weights, total = carry
        rows = (number * batch + jnp.arange(batch)) % count
        slope = jax.grad(loss)(weights, x[rows], targets[rows]) + known.l2 * weights
        return (weights - known.rate * slope, total + slope), None

    # A step's forward pass is computed anew on the way back: memory does not grow with the steps.
    body = jax.checkpoint(step)
    return jax.lax.scan(body, (start, jnp.zeros_like(start)), jnp.arange(steps))[0][1]


def squared_distance(one, other):
    """The squared L2 distance of two vectors."""
    return jnp.sum((one - other) ** 2)


def cosine_distance(one, other):
    """1 minus the cosine of the angle between two vectors; 1 where one of them is zero.

    >>> float(cosine_distance(jnp.array([1.0, 0.0]), jnp.array([0.0, 2.0])))
    1.0
    """
    lengths = root(jnp.sum(one**2)) * root(jnp.sum(other**2))
    return 1.0 - jnp.dot(one, other) / jnp.maximum(lengths, 1e-20)


def total_variation(x):
    r"""Mean absolute difference of neighbouring pixels of images [n, H, W, C], both ways added.

    >>> float(total_variation(jnp.array([[[[0.0], [1.0]], [[0.0], [1.0]]]])))
    1.0
    """
    return jnp.abs(jnp.diff(x, axis=1)).mean() + jnp.abs(jnp.diff(x, axis=2)).mean()


def units(task):
    """(mean, std) that bring normalised inputs into the units that components see, and back."""
    shape = (1,) * len(task.inputs.shape) + (-1,)
    return (np.array(v, np.float32).reshape(shape) for v in (task.inputs.mean, task.inputs.std))


def limits(task):
    """(lowest, highest) valid values of normalised inputs, without an end where there is none."""
    mean, std = units(task)
    return (task.inputs.low - mean) / std, (task.inputs.high - mean) / std


def guess_of(x, labels, loss, task, trail=None):
    """The guess whose inputs are x in normalised units, clipped to the valid range; a trail too."""
    mean, std = units(task)

    def image(x):
        inside = jnp.clip(x * std + mean, task.inputs.low, task.inputs.high)
        return jnp.where(jnp.isfinite(inside), inside, jnp.broadcast_to(mean, inside.shape))

    return Guess(image(x), labels, loss, None if trail is None else jax.vmap(image)(trail))


def best_of(guesses):
    """The guess with the lowest loss of several, stacked; one whose loss is not finite is last."""
    row = jnp.argmin(jnp.nan_to_num(guesses.loss, nan=jnp.inf))
    return jax.tree.map(lambda leaf: leaf[row], guesses)

"""Inputs, read from the gradient of the dense layer that takes them."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sec.attacks.privacy import _matching
from fedjax_sec.core import ConfigError

#: Two units give the same input where its numbers differ by less, squared, in the mean.
_SAME = 1e-5


def most_certain(kernel, bias, task, count: int, shared: bool = False):
    """The n inputs [n, ...] that units give most certainly, clipped to the valid range.

    A unit that one example alone moves gives that example, and so does every other such unit; of
    several it gives a mixture, which differs from unit to unit. Inputs are taken by how many units
    give them, then those within the valid range, then by the size of the bias's gradient. With
    `shared` an example moves all units that it passes alike, so mixtures agree too: taken are
    inputs within the range by the smallest gradient of the bias, which is the sum over the
    examples. Mixtures of inputs that are taken come behind all others.
    """
    x, inside = inputs_of(kernel, bias, task)
    flat = x.reshape(x.shape[0], -1)
    size = jnp.abs(bias) / jnp.maximum(jnp.abs(bias).max(), 1e-30)
    if shared:
        rank = 1.0 + inside - 0.5 * size
    else:
        squares = jnp.sum(flat**2, axis=1)
        apart = squares[:, None] + squares[None] - 2.0 * flat @ flat.T
        same = (apart <= _SAME * flat.shape[1]) & (inside[:, None] * inside[None] > 0)
        rank = jnp.maximum(same.sum(axis=1), 1) + 0.5 * inside + 0.25 * size

    # `beside` is what lies beside the affine hull of the inputs that are taken.
    def take(carry, number):
        left, beside = carry
        unit = jnp.argmax(left)
        line = beside[unit] / jnp.maximum(jnp.linalg.norm(beside[unit]), 1e-30)
        off = beside - (beside @ line)[:, None] * line[None]
        beside = jnp.where(number == 0, beside - beside[unit][None], off)
        mixed = jnp.sum(beside**2, axis=1) <= _SAME * flat.shape[1]
        left = jnp.where(mixed & (left > 0), left - 2.0 * x.shape[0] - 2.0, left)
        return (left.at[unit].set(-jnp.inf), beside), unit

    units = jax.lax.scan(take, (rank, flat), jnp.arange(count))[1]
    return jnp.clip(x[units], task.inputs.low, task.inputs.high)


def first_dense_name(task) -> str:
    """The dense layer with a bias that takes the input itself, such as `params/dense_0`.

    Raises: `ConfigError` where the model has none.
    """
    features = math.prod(task.inputs.shape)
    for name, shape in task.space.shapes.items():
        layer, _, leaf = name.rpartition("/")
        takes_as_much = leaf == "kernel" and len(shape) == 2 and shape[0] == features
        if takes_as_much and f"{layer}/bias" in task.space.slices and _takes_input(layer, task):
            return layer
    raise ConfigError(
        f"attack: inputs are read from a dense layer with a bias that takes the input itself, "
        f"{features} numbers, and the model has none; such models are 'mlp' and "
        f"'logistic_regression'."
    )


def _takes_input(layer: str, task) -> bool:
    """Whether a unit's gradients by kernel and bias have the input as their quotient.

    Tried with random parameters and one random example, while the program is traced.
    """
    with jax.ensure_compile_time_eval():
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.uniform(0.1, 0.9, (1, *task.inputs.shape)), jnp.float32)
        params = jnp.asarray(0.1 * rng.normal(size=task.dim), jnp.float32)
        params = params.at[task.space.observed].set(1.0)

        def loss(params):
            return jax.nn.log_softmax(task.outputs(params, x))[0, 0]

        slope = jax.grad(loss)(params)
        kernel, bias = layer_of(slope, layer, task.space)
        unit = jnp.argmax(jnp.abs(bias))
        wanted = bias[unit] * task.inputs.normalize(x).reshape(-1)
        return bool(jnp.allclose(kernel[:, unit], wanted, rtol=1e-3, atol=1e-6))


def layer_of(vector, layer: str, space):
    """(kernel [F, U], bias [U]) of a dense layer in a vector [D]."""
    kernel = vector[space.slices[f"{layer}/kernel"]].reshape(space.shapes[f"{layer}/kernel"])
    return kernel, vector[space.slices[f"{layer}/bias"]]


def first_dense(slope, params, task):
    """The gradients (kernel [F, U], bias [U]) of the dense layer that takes the input itself."""
    whole = jnp.zeros_like(params).at[task.space.trained].set(slope)
    return layer_of(whole, first_dense_name(task), task.space)


def inputs_of(kernel, bias, task):
    """(inputs [U, ...] by every unit, whether each lies within the valid range [U])."""
    mean, std = _matching.units(task)
    safe = jnp.where(bias == 0, 1.0, bias)
    x = (kernel / safe[None]).T.reshape(-1, *task.inputs.shape) * std + mean
    axes = tuple(range(1, x.ndim))
    slack = 1e-3
    inside = (x >= task.inputs.low - slack).all(axes) & (x <= task.inputs.high + slack).all(axes)
    x = jnp.where(jnp.isfinite(x), x, jnp.broadcast_to(mean, x.shape))
    return x, (inside & (bias != 0)).astype(jnp.float32)

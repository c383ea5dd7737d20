"""Labels of a batch from the gradient of the last layer."""

import jax
import jax.numpy as jnp

from fedjax_sec.core import ConfigError


def head_of(slope, params, task):
    """(gradient of the last layer's kernel [F, C], of its bias [C] or None) of the slope [T]."""
    whole = jnp.zeros_like(params).at[task.space.trained].set(slope)
    head = task.head or task.space.last.rpartition("/")[0]
    kernel, bias = f"{head}/kernel", f"{head}/bias"
    if kernel not in task.space.slices:
        raise ConfigError(
            f"reconstruction: labels are read from the kernel of the last layer, and the model "
            f"has no {kernel!r}; give the labels, or a model whose head is one dense layer."
        )
    weights = whole[task.space.slices[kernel]].reshape(task.space.shapes[kernel])
    return weights, whole[task.space.slices[bias]] if bias in task.space.slices else None


def by_sign(kernel, bias, count: int):
    r"""iDLG: the class whose column of the kernel's gradient has the lowest sum.

    Exact for one example whose features are not negative. Of a batch the `count` lowest.
    """
    return jnp.argsort(kernel.sum(axis=0))[jnp.arange(count) % kernel.shape[1]]


def by_minimum(kernel, bias, count: int):
    """GradInversion (Yin et al. 2021): the classes whose columns hold the lowest entries."""
    return jnp.argsort(kernel.min(axis=0))[jnp.arange(count) % kernel.shape[1]]


def by_bias(kernel, bias, count: int):
    r"""The gradient of the bias, class after class: every class that it raises, then the rest.

    Each class with a negative entry is there once at least. With m the sum of these entries over
    the number of examples, one example changes an entry by about m: it is taken off those, and the
    class with the lowest entry is there once more, until all `count` are named.

    Source: Geiping et al., breaching, `base_attack.py`, label strategy `bias-corrected`.
    """
    if bias is None:
        raise ConfigError(
            "reconstruction: labels 'bias' are read from the bias of the last layer, and the model "
            "has none; choose labels 'sign' or 'minimum'."
        )
    impact = jnp.where(bias < 0, bias, 0.0).sum() / count
    order = jnp.argsort(bias)

    def name(carry, place):
        left, taken = carry
        fresh = order[jnp.minimum(place, order.shape[0] - 1)]
        unnamed = (place < order.shape[0]) & (bias[fresh] < 0)
        label = jnp.where(unnamed, fresh, jnp.argmin(left))
        return (left.at[label].add(-impact), taken + 1), label

    return jax.lax.scan(name, (bias, 0), jnp.arange(count))[1]


STRATEGIES = {"sign": by_sign, "minimum": by_minimum, "bias": by_bias}


def labels_of(how: str, slope, params, task, known):
    """The labels [n]: as `known`, or by the strategy `how`."""
    if how == "known":
        if known.labels is None:
            raise ConfigError(
                "reconstruction: labels 'known' needs labels that the observer knows; give "
                f"labels=, or choose one of {', '.join(STRATEGIES)}."
            )
        return known.labels.astype(jnp.int32)
    kernel, bias = head_of(slope, params, task)
    return STRATEGIES[how](kernel, bias, known.count).astype(jnp.int32)

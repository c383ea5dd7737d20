"""The contract of an augmentation."""

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sec.core import InputSpec
from fedjax_sec.testing.compare import both_ways, close, differs, expect, finite, same_bits
from fedjax_sec.testing.fields import check_numeric_fields_are_traced
from fedjax_sec.testing.materials import SHAPES

_COUNT = 6


def _inputs(kind: str) -> tuple[InputSpec, jax.Array]:
    """The specification of one kind of inputs, and some of them."""
    rng, shape = np.random.default_rng(0), SHAPES[kind]
    if kind == "tokens":
        return InputSpec(kind, shape), jnp.asarray(rng.integers(0, 7, (_COUNT, *shape)), jnp.int32)
    numbers = (0.4,) * shape[-1], (0.5,) * shape[-1]
    return InputSpec(kind, shape, 255.0, *numbers), jnp.asarray(
        rng.random((_COUNT, *shape)), jnp.float32
    )


def check_augmentation(augmentation, kind: str) -> None:
    """Inputs keep shape, type and range; the key alone decides, each example by itself."""
    spec, x = _inputs(kind)

    def run(seed, x):
        return augmentation.apply(jax.random.key(seed), x, spec)

    moved = both_ways(run, 0, x)
    expect(moved.shape == x.shape and moved.dtype == x.dtype, f"inputs become {moved.shape}")
    if kind != "tokens":
        finite(moved, "an input")
        expect(moved.min() >= spec.low and moved.max() <= spec.high, "inputs leave their range")
    apply = jax.jit(run)
    expect(differs(moved, x), "nothing changes")
    same_bits(apply(0, x), moved)
    expect(differs(apply(1, x), moved), "the key does not matter")
    same_bits(apply(0, x.at[1:].set(x[0]))[0], moved[0])  # whatever lies beside it
    stacked = jnp.stack([x, x[::-1]])
    mapped = jax.jit(jax.vmap(run))(jnp.arange(2), stacked)
    close(mapped, jnp.stack([apply(i, one) for i, one in enumerate(stacked)]))


def check_augmentation_fields(augmentation, kind: str) -> None:
    """Numeric fields are traced."""
    spec, x = _inputs(kind)
    check_numeric_fields_are_traced(augmentation, lambda one: one.apply(jax.random.key(0), x, spec))


CHECKS = (check_augmentation, check_augmentation_fields)

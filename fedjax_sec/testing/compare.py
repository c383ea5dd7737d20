"""Comparisons of pytrees, each a function that raises `AssertionError`; they stand on chex."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np


def expect(condition: Any, message: str) -> None:
    """Raises `AssertionError` unless the condition holds, also under `python -O`."""
    if not condition:
        raise AssertionError(message)


def close(actual, expected, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Two pytrees of arrays agree in structure and value."""
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=atol)


def same_bits(actual, expected) -> None:
    """Two pytrees of arrays are equal to the last bit (NaN equals NaN)."""
    chex.assert_trees_all_equal(actual, expected)


def same_form(before, after, what: str) -> None:
    """Two pytrees agree in structure, shapes and dtypes: a state keeps its form."""
    expect(jax.tree.structure(before) == jax.tree.structure(after), f"{what} changes its structure")
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        forms = [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in (old, new)]
        expect(forms[0] == forms[1], f"{what} changes from {forms[0]} to {forms[1]}")


def finite(tree, what: str) -> None:
    """All leaves are finite."""
    try:
        chex.assert_tree_all_finite(tree)
    except AssertionError as error:
        raise AssertionError(f"{what} is not finite: {error}") from None


@contextlib.contextmanager
def no_concrete_values(what: str) -> Iterator[None]:
    """Reading a tracer's value (`float(...)`, `if ...`) is a violation like any other."""
    try:
        yield
    except (jax.errors.JAXTypeError, jax.errors.UnexpectedTracerError) as error:
        raise AssertionError(f"{what} is read as a Python number: {error}") from error


def both_ways(function: Callable, *args, rtol: float = 1e-4, atol: float = 1e-5):
    """The function's result, the same with and without jit.

    Keys are made inside the function, so that none is used twice.

    >>> print(both_ways(lambda x: 2 * x, jnp.ones(2)))
    [2. 2.]
    """
    with no_concrete_values("an array"):
        jitted = jax.jit(function)(*args)
    eager = jax.tree.map(jnp.asarray, function(*args))
    try:
        close(jitted, eager, rtol, atol)
    except AssertionError as error:
        raise AssertionError(f"with and without jit differ: {error}") from None
    return jitted


def differs(one, other) -> bool:
    """Whether two arrays differ in any bit."""
    return not np.array_equal(one, other)

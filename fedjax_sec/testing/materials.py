"""The contract of networks, data sets and partitions."""

import dataclasses
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sec.core import ConfigError
from fedjax_sec.core.space import make_space
from fedjax_sec.data import MissingDataError, checked
from fedjax_sec.data.packing import check_partition
from fedjax_sec.testing.compare import close, differs, expect, finite, same_bits

#: An input of each kind for networks: of the tiny worlds' images convolutions would leave nothing.
SHAPES = {"pixels": (32, 32, 3), "features": (20,), "tokens": (6,)}


def shallow(component):
    """A network of the least depth, if it has one: deep ones compile for minutes."""
    depth = {f.name: f.metadata["low"] for f in dataclasses.fields(component) if f.name == "depth"}
    return dataclasses.replace(component, **depth)


def check_model(component, kind: str = "pixels", classes: int = 7) -> None:
    """Finite logits, the same for an example whatever lies beside it; vmap equals a loop.

    The key of `init` matters, and what it gives for one key is always the same.
    """
    shape = SHAPES[kind]
    model = component.make(shape, classes)
    init = jax.jit(model.init)
    variables, again, other = (init(jax.random.key(seed)) for seed in (0, 0, 1))
    same_bits(variables, again)
    pairs = zip(jax.tree.leaves(variables), jax.tree.leaves(other), strict=True)
    expect(any(differs(a, b) for a, b in pairs), "the key of `init` does not matter")
    rng = np.random.default_rng(0)
    x = rng.random((2, *shape)).astype(np.float32)
    if kind == "tokens":
        x = rng.integers(0, classes, (2, *shape)).astype(np.int32)
    x = jnp.asarray(x)
    run = lambda v, x: model.apply(v, x, train=False, key=None)  # noqa: E731
    apply = jax.jit(run)
    logits = apply(variables, x)
    wanted = {(2, *shape, classes), (2, classes)} if kind == "tokens" else {(2, classes)}
    expect(logits.shape in wanted, f"outputs have shape {logits.shape}, not {sorted(wanted)[0]}")
    finite(logits, "an output")
    same_bits(apply(variables, x), logits)
    close(run(variables, x), logits, rtol=1e-4, atol=1e-5)
    close(apply(variables, x[1:]), logits[1:], rtol=1e-4, atol=1e-5)
    stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), variables, other)
    close(
        jax.jit(jax.vmap(apply, (0, None)))(stacked, x),
        jnp.stack([logits, apply(other, x)]),
        rtol=1e-4,
        atol=1e-5,
    )


def check_space(component, kind: str = "pixels", classes: int = 7) -> None:
    """Splitting the variables and joining them again changes no bit; something is trained."""
    model = component.make(SHAPES[kind], classes)
    space = make_space(model)
    variables = model.init(jax.random.key(0))
    vector, frozen = space.split(variables)
    expect(vector.shape == (space.dim,), f"the vector has shape {vector.shape}")
    expect(space.trained.stop > space.trained.start, "no variable is trained")
    same_bits(space.join(vector, frozen), variables)


MODEL_CHECKS = (check_model, check_space)


def check_dataset(component, folder: str | Path | None = None) -> None:
    """Embedded data is sound; other data says what is missing and where it was looked for."""
    if folder is None:
        with tempfile.TemporaryDirectory() as empty:
            return check_dataset(component, empty)
    try:
        source = component.load(str(folder), download=False)
    except MissingDataError as error:
        told = repr(component.registered_name) in str(error) and str(folder) in str(error)
        expect(told, f"the error names neither data set nor folder: {error}")
        return None
    try:
        sound = checked(source, component.registered_name)
        same_bits(sound[1:5], source[1:5])  # there is nothing to convert
    except ConfigError as error:
        raise AssertionError(str(error)) from error
    kind = source.input_kind
    for x, y in ((source.x_train, source.y_train), (source.x_test, source.y_test)):
        expect(len(x) == len(y) > 0, f"{len(y)} targets for {len(x)} examples")
        expect(y.dtype == np.int32, f"targets are {y.dtype}, not int32")
        if kind == "pixels":
            expect(x.dtype == np.uint8 and x.max() <= source.scale, "pixels exceed the scale")
        if kind != "tokens" and source.all_classes and not source.is_subset:
            same = set(np.unique(y)) == set(range(source.num_classes))
            expect(same, "a class has no example in one of the parts")
    if kind == "pixels" and source.x_train.ndim == 4:
        channels = source.x_train.shape[-1]
        expect(len(source.mean) == len(source.std) == channels, "mean or std of other channels")
    train = {x.tobytes() for x in source.x_train}
    shared = any(x.tobytes() in train for x in source.x_test)
    expect(not shared, "a test example was trained on")
    return None


def check_partitioner(component) -> None:
    """Every client holds examples, each at most once, and the seed alone decides which."""
    labels = np.random.default_rng(0).integers(0, 10, 203).astype(np.int32)
    users = np.random.default_rng(1).integers(0, 31, 203).astype(np.int32)
    first, again, other = (
        component.split(np.random.default_rng(seed), labels, 10, users) for seed in (0, 0, 1)
    )
    check_partition(first, len(labels))
    expect(first.counts.shape == (10,) and first.counts.min() >= 1, "a client holds nothing")
    same_bits(first, again)
    expect(differs(first.index, other.index), "the seed does not matter")

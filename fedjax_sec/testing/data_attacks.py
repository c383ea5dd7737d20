"""The contract of attacks on data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sec.testing.compare import (
    both_ways,
    close,
    expect,
    finite,
    no_concrete_values,
    same_bits,
    same_form,
)
from fedjax_sec.testing.fields import check_numeric_fields_are_traced
from fedjax_sec.testing.update_attacks import attacker_view
from fedjax_sec.testing.worlds import World, world


def _state(part, place: World):
    return part.init(place.setting, place.task)


def _check_inputs(x, y, place: World) -> None:
    """Inputs and targets are of the tiny world's kind."""
    expect(x.shape[1:] == place.task.inputs.shape, f"inputs have shape {x.shape[1:]}")
    expect(jnp.issubdtype(y.dtype, jnp.integer), f"targets are {y.dtype}")
    low = -1 if place.kind == "tokens" else 0
    expect(((y >= low) & (y < place.classes)).all(), f"a target is not below {place.classes}")
    if place.kind == "pixels":
        expect(((x >= 0) & (x <= 1)).all(), "a pixel lies outside [0, 1]")
    elif place.kind == "tokens":
        expect(((x >= 0) & (x < place.classes)).all(), "a token is outside the vocabulary")
    else:
        finite(x, "an input")


def check_memory(part, kind: str) -> None:
    """The state keeps its form through `prepare`, with and without jit."""
    place = world(kind)
    state = _state(part, place)

    def prepare(state):
        return part.prepare(jax.random.key(5), state, attacker_view(kind=kind))

    same_form(state, both_ways(prepare, state), "the state")


def check_poison(part, kind: str) -> None:
    """Shapes, dtypes and the range of inputs survive; the same example is poisoned alike."""
    place = world(kind)
    x, y = place.sample(jax.random.key(3), 9)

    def poison(x, y):
        key, state = jax.random.key(0), _state(part, place)
        return part.poison(key, state, x, y, jnp.array(1), place.task)

    px, py = both_ways(poison, x, y)
    expect(px.shape == x.shape and px.dtype == x.dtype, f"x becomes {px.dtype} {px.shape}")
    expect(py.shape == y.shape and py.dtype == y.dtype, f"y becomes {py.dtype} {py.shape}")
    _check_inputs(px, py, place)
    order = np.random.default_rng(0).permutation(9)
    close(poison(x[order], y[order]), (px[order], py[order]))


def check_choice(part, kind: str) -> None:
    """A mask of the client's own examples; padding behind them changes nothing."""
    place = world(kind)
    labels = place.task.task.labels_of(place.sample(jax.random.key(3), 9)[1])
    choose = jax.jit(lambda y, held: part.choose(jax.random.key(0), y, held))
    held = jnp.arange(9) < 7
    with no_concrete_values("an array"):
        chosen = choose(labels, held)
    expect(chosen.shape == (9,) and chosen.dtype == bool, "the choice is no mask [M]")
    expect(chosen.any(), "nothing is poisoned")
    expect(not chosen[7:].any(), "padding is poisoned")
    if labels is None:
        return
    if part.bases is not None:
        of_base = np.isin(labels[chosen], part.bases)
        expect(of_base.all(), "an example of no class of `bases` is poisoned")
    same_bits(choose(labels.at[7:].set(0), held), chosen)
    same_bits(choose(labels[:7], jnp.ones(7, bool)), chosen[:7])


def check_backdoor(part, kind: str) -> None:
    """`examples` and `probes` hold inputs, the attacker's labels and which of them count."""
    place = world(kind)
    state = _state(part, place)
    x, y = part.examples(jax.random.key(0), state, attacker_view(kind=kind))
    expect(x.shape[0] == y.shape[0] >= 1, "there are no examples, or not as many labels")
    _check_inputs(x, y, place)
    inputs, targets = place.sample(jax.random.key(4), 7)
    probes = functools.partial(part.probes, state, task=place.task)
    x, target, include = both_ways(lambda x, y: probes(x, y), inputs, targets)
    expect(x.dtype == inputs.dtype, f"probes are {x.dtype}")
    if part.probes_are_tests:
        expect(x.shape[0] == 7, f"there are {x.shape[0]} probes of 7 test examples")
    expect(target.shape == (x.shape[0], *targets.shape[1:]), f"labels have shape {target.shape}")
    expect(include.shape == (x.shape[0],) and include.dtype == bool, "`include` is no mask [P]")
    _check_inputs(x, target, place)


def check_fields(part, kind: str) -> None:
    """Numeric fields are traced."""
    place = world(kind)
    x, y = place.sample(jax.random.key(3), 9)
    labels = place.task.task.labels_of(y)
    state = _state(part, place)
    check_numeric_fields_are_traced(
        part,
        lambda one: (
            one.poison(jax.random.key(0), state, x, y, jnp.array(1), place.task),
            one.choose(jax.random.key(1), labels, jnp.ones(9, bool)),
        ),
    )


CHECKS = (check_memory, check_poison, check_choice, check_backdoor, check_fields)

"""The contract of a stage of a defence in the clients' local training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sec.core import NO_HOOKS, ClientView
from fedjax_sec.round.pipeline import Defense
from fedjax_sec.testing.compare import (
    both_ways,
    close,
    differs,
    expect,
    finite,
    no_concrete_values,
    same_bits,
    same_form,
)
from fedjax_sec.testing.defenses import DIM, PlainMean, defend, stack_of_updates
from fedjax_sec.testing.fields import check_numeric_fields_are_traced, numeric_fields
from fedjax_sec.testing.worlds import CAPACITY, plain_client, world

#: Local steps: several, since a stage may compare one with the next.
STEPS = 4


def train(part, count=CAPACITY, seed=0, honest=True):
    """A client's update [D] in a tiny world, trained under the stage; None: under none."""
    place, client = world(), plain_client(steps=STEPS)
    data = place.local_data(count)
    hooks = NO_HOOKS
    if part is not None:
        view = ClientView(place.task, data, client, place.params())
        hooks = Defense((part, PlainMean())).hooks(view, jnp.asarray(honest))
    state, key = client.init(place.task.dim), jax.random.key(seed)
    return client.apply(key, place.params(), state, data, place.task, hooks).delta


def strong(part):
    """The stage with numbers well inside their ranges: a default may be too small to see."""
    return dataclasses.replace(part, **{name: values[1] for name, values in numeric_fields(part)})


def _strengths(part):
    """The stage with large numbers, and with small ones: a bound acts where it is small."""
    fields = [(name, high) for name, (_, high) in numeric_fields(part)]
    for factor in (1.0, 0.01):
        yield dataclasses.replace(part, **{name: factor * high for name, high in fields})


def check_local_shapes(part) -> None:
    """A finite update [D], with and without jit, and a memory that keeps its form."""
    place = world()
    data = place.local_data(7)
    hooks = part.hooks(ClientView(place.task, data, plain_client(steps=STEPS), place.params()))
    ones = jnp.ones(place.task.space.trained.stop - place.task.space.trained.start)
    if hooks.correct is not None:
        same_form(ones, hooks.correct(ones, ones), "the gradient")
    if hooks.after_step is not None:
        moved, memory = hooks.after_step(jax.random.key(0), ones, ones, hooks.memory)
        same_form(ones, moved, "the update behind a step")
        same_form(hooks.memory, memory, "the memory")
    if hooks.send is not None:
        same_form(ones, hooks.send(jax.random.key(0), ones), "the update that is sent")
    delta = both_ways(lambda count: train(part, count), 7)
    expect(delta.shape == (place.task.dim,), f"the update has shape {delta.shape}")
    finite(delta, "the update")


def check_local_acts(part) -> None:
    """Training is another one under the stage, but for a client without examples."""
    acting = [one for one in _strengths(part) if differs(train(one), train(None))]
    expect(bool(acting), "it changes nothing")
    same_bits(train(acting[0], 0), np.zeros(world().task.dim, np.float32))


def check_local_malicious(part) -> None:
    """Malicious clients train as without a defence, unless it says that they follow."""
    part = strong(part)
    expected = train(part) if part.malicious_follow else train(None)
    close(train(part, honest=False), expected)


def check_local_over_clients(part) -> None:
    """vmap over clients equals a loop over them."""
    counts, seeds = jnp.array([3, 9, 6]), jnp.arange(3)
    one = lambda count, seed: train(strong(part), count, seed)  # noqa: E731
    with no_concrete_values("an array"):
        mapped = jax.jit(jax.vmap(one))(counts, seeds)
    run = jax.jit(one)
    close(mapped, jnp.stack([run(c, s) for c, s in zip(counts, seeds, strict=True)]), rtol=1e-4)


def check_local_fields(part) -> None:
    """Numeric fields are traced."""
    check_numeric_fields_are_traced(part, lambda one: train(one))


def check_server_is_as_without(part) -> None:
    """At the server nothing changes, to the bit: neither the aggregate nor what is random."""
    updates = stack_of_updates()
    alone = defend(PlainMean(), updates)
    beside = defend(part, updates)
    same_bits(beside, alone)
    expect(beside[0].shape == (DIM,), "the aggregate has another length")


CHECKS = (
    check_local_shapes,
    check_local_acts,
    check_local_malicious,
    check_local_over_clients,
    check_local_fields,
    check_server_is_as_without,
)

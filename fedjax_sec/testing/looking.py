"""The contract of attacks on inputs, monitors, evaluators and attacks on privacy."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sec import core
from fedjax_sec.core import Guess, Known
from fedjax_sec.ops import evasion, observers
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
from fedjax_sec.testing.fields import numeric_fields
from fedjax_sec.testing.worlds import (
    accepted,
    backdoor_of,
    make_rounds,
    message_of,
    plain_rounds,
    run_rounds,
    world,
)


def _searching(attack):
    """(the attack itself or the one nested in it that has the radius, the field it lies in)."""
    for field in dataclasses.fields(attack):
        if field.metadata.get("kind") == "evasion":
            return getattr(attack, field.name), field.name
    return attack, None


def check_evasion(attack, kind: str) -> None:
    """Stays in the ball and in the inputs' range, never helps the model, and repeats itself.

    Its numeric fields are traced: one compilation serves all values, and none changes the shapes.
    """
    place = world(kind)
    task, spec = place.task, place.task.inputs
    params = place.params(1.0)
    x, y = spec.decode(place.pool.x[:12]), place.pool.y[:12]
    outputs = functools.partial(task.outputs, params)
    other = functools.partial(task.outputs, params[::-1])

    def run(attack):
        return attack.apply(jax.random.key(1), outputs, x, y, other)

    chex.clear_trace_counter()  # it counts by the function's name
    jitted = jax.jit(chex.assert_max_traces(run, n=1))
    with no_concrete_values("an array"):
        moved = jitted(attack)
    expect(moved.shape == x.shape and moved.dtype == x.dtype, "the inputs change their form")
    expect((moved >= spec.low).all() and (moved <= spec.high).all(), "an input leaves its range")
    expect(jnp.abs(moved - x).max() > 0, "nothing was moved")
    same_bits(moved, jitted(attack))
    inner, field = _searching(attack)
    if (eps := core.value_of(inner, "eps")) is not None:
        expect(jnp.abs(moved - x).max() <= eps + 1e-6, "an input leaves the ball")
        halved = dataclasses.replace(inner, eps=eps / 2)
        if field is not None:
            halved = dataclasses.replace(attack, **{field: halved})
        inside = jnp.abs(jitted(halved) - x).max() <= eps / 2 + 1e-6
        expect(inside, "an input leaves the ball of half the radius")
    for name, (value, _) in numeric_fields(attack):
        if name != "eps" and value is not None and getattr(attack, name) is not None:
            jitted(dataclasses.replace(attack, **{name: value}))
    if "surrogate" not in attack.needs:  # a surrogate's examples may help the victim
        clean, left = (evasion.margin(outputs(inputs), y) for inputs in (x, moved))
        expect(np.all(left <= clean + 1e-6), "the attack helped the model")


# --- Monitors -----------------------------------------------------------------------------------


def check_monitor(monitor, kind: str) -> None:
    """It keeps the form of its state, measures what is finite, and cannot change the round.

    Two rounds with it give the parameters of two rounds without it, to the bit. Its metrics are
    finite in a sound round, and their shapes are always the same.
    """
    linear = any(isinstance(one, core.PrivacyAttack) for _, one, _ in core.walk(monitor))
    place = world(kind, linear)
    if not accepted(monitor, place.setting):
        return
    rounds = make_rounds(place, monitors=(monitor,))
    with no_concrete_values("an array"):
        state, (first, metrics) = run_rounds(rounds)
    same_form(rounds.state, state, "the monitor's state")
    plain, (_, without) = plain_rounds(kind, linear)
    same_bits(state[:4], plain[:4])
    seen = {name: value for name, value in metrics.items() if name not in without}
    same_bits({name: metrics[name] for name in without}, without)
    finite(seen, "a metric of a sound round")
    for name, value in seen.items():
        expect(isinstance(name, str) and isinstance(value, jax.Array), f"{name!r} is no metric")
    shapes = lambda values: {name: v.shape for name, v in values.items()}  # noqa: E731
    expect(shapes(first) == shapes(metrics), "metrics change their shapes from round to round")


# --- Evaluators ---------------------------------------------------------------------------------


def check_evaluator(evaluator, kind: str) -> None:
    """Finite metrics, the same keys for all parameters, with a backdoor and without one.

    With and without jit.
    """
    place = world(kind)
    if not accepted(evaluator, place.setting):
        return
    backdoor = backdoor_of(kind)
    adversaries = [None]
    if backdoor is not None:
        adversaries.append((backdoor, backdoor.init(place.setting, place.task)))
    x, y = place.pool.x[20:], place.pool.y[20:]
    measured = False
    for adversary in adversaries:

        def measure(params, adversary=adversary):
            return evaluator.measure(jax.random.key(2), params, x, y, place.task, adversary)

        one = both_ways(measure, place.params())
        expect(isinstance(one, dict), f"measure returns {type(one).__name__}, not metrics")
        finite(one, "a metric")
        same_form(one, measure(place.params(1.0)), "what is measured")
        measured = measured or bool(one)
    expect(measured, "nothing is measured")


# --- Attacks on privacy -------------------------------------------------------------------------


def check_privacy_attack(attack, kind: str) -> None:
    """As many inputs and targets as there are examples, finite and in range, by the key alone.

    With and without jit, on a linear model, from whose gradient an example can be read. A search is
    cut short, and one that needs labels gets them.
    """
    place = world(kind, linear=True)
    known = Known(jnp.float32(0.1), 1, 2, place.classes, labels=jnp.arange(2) % place.classes)
    message, spec, attack = message_of(place), place.task.inputs, _cut_short(attack)
    task = observers.blinded(place.task)
    params = attack.plant(jax.random.key(8), place.params(), task)
    same_form(place.params(), params, "the planted parameters")
    expect(attack.tampers == bool(differs(params, place.params())), "`tampers` is not true of it")

    def reconstruct(vector):
        sent = message._replace(vector=vector)
        guess = attack.reconstruct(jax.random.key(9), sent, params, task, known)
        return Guess(*guess)[:2]

    x, y = both_ways(reconstruct, message.vector, rtol=1e-2, atol=1e-2)
    told = task.task.labels_of(y) is not None
    expect(y.shape[0] == known.count and (y.ndim == 1 or not told), f"targets have shape {y.shape}")
    expect(jnp.issubdtype(y.dtype, jnp.integer), f"targets are {y.dtype}")
    expect(((y >= 0) & (y < place.classes)).all(), f"a target is not below {place.classes}")
    if x is not None:
        expect(x.shape == (known.count, *spec.shape), f"inputs have shape {x.shape}")
        finite(x, "an input")
        inside = (x >= spec.low).all() and (x <= spec.high).all()
        expect(inside, f"an input leaves its range, {spec.low} to {spec.high}")
    close(jax.jit(reconstruct)(message.vector), (x, y))


def _cut_short(attack):
    """The attack with the shortest search: a long one amplifies the rounding of jit."""
    fields = {f.name: f.metadata for f in dataclasses.fields(attack)}
    names = fields.keys() & {"steps", "iterations"}
    return dataclasses.replace(attack, **{name: fields[name]["low"] for name in names})

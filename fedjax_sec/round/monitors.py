"""How a round lets monitors look: each gets the trace and hands back its own state and metrics."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

from fedjax_sec.core import ConfigError
from fedjax_sec.core.types import BoundTask, Metrics, RoundTrace


def observe(
    monitors: tuple,
    key,
    states: tuple,
    trace: RoundTrace,
    task: BoundTask,
    probes: tuple,
    last,
) -> tuple[tuple, Metrics]:
    """All monitors' new states, and their metrics under their prefixes.

    A monitor of the `last` round looks where `last` is true; elsewhere its state stays and its
    metrics are zero. Values that no monitor reads are not computed.
    """
    new, metrics = [], {}
    for i, (monitor, state) in enumerate(zip(monitors, states, strict=True)):
        seen = trace._replace(probes=probes[i] if probes else None)
        look = functools.partial(monitor.observe, jax.random.fold_in(key, i), state, seen, task)
        if monitor.when == "every":
            state, values = look()
        else:
            state, values = _look_where(last, look, state)
        new.append(state)
        prefix = monitor.registered_name if monitor.prefix is None else monitor.prefix
        for name, value in values.items():
            full = f"{prefix}/{name}" if prefix else name
            if full in metrics:
                raise ConfigError(
                    f"evaluation.monitors: two monitors measure {full!r}; leave one of them out."
                )
            metrics[full] = value
    return tuple(new), metrics


def _look_where(last, look: Callable, state) -> tuple:
    """`look()` where `last` is true; elsewhere the state, and zeros for metrics."""
    # Traced once, and not a second time for the shapes: it may hold a defence's whole rule.
    jaxpr, shapes = jax.make_jaxpr(look, return_shape=True)()
    structure = jax.tree.structure(shapes)
    nothing = jax.tree.map(lambda m: jnp.zeros(m.shape, m.dtype), shapes[1])
    return jax.lax.cond(
        last,
        lambda: jax.tree.unflatten(structure, jaxpr_as_fun(jaxpr)()),
        lambda: (state, nothing),
    )

"""How much of a call's time an accelerator computes, from a trace of it."""

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import jax


def busy_share(call: Callable[[], object], longest: int = 5) -> dict:
    """The share of the device's time that it works, and its costliest kernels.

    Traces one call. `busy` is the length of the union of all kernels' intervals over the time from
    the first kernel's start to the last one's end; `kernels` their number; `costliest` the
    `longest` names by their share of the busy time. Empty where a trace shows no device.

    >>> busy_share(lambda: jax.numpy.ones(2).block_until_ready())
    {}
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            call()
        (trace,) = Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(trace))
        events = [
            (event.start_ns, event.start_ns + event.duration_ns, event.name)
            for plane in profile.planes
            if plane.name.startswith("/device:GPU")
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]
    if not events:
        return {}
    busy = union(event[:2] for event in events)
    span = max(stop for _, stop, _ in events) - min(start for start, _, _ in events)
    totals: dict[str, float] = {}
    for start, stop, name in events:
        totals[name] = totals.get(name, 0.0) + stop - start
    top = sorted(totals, key=lambda name: -totals[name])[:longest]
    return {
        "busy": busy / span,
        "kernels": len(events),
        "costliest": {name: totals[name] / busy for name in top},
    }


def union(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals.

    >>> union([(4.0, 5.0), (0.0, 2.0), (1.0, 3.0)])
    4.0
    """
    total, reached = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total

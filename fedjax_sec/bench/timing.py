"""Timing cases in turns, and what the machine itself can do."""

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache

from fedjax_sec.ops.backend import on_cpu

#: Calls in a queue where a device works on while the host goes on: one call alone would be timed
#: with its launch, which a program of many calls does not wait for.
QUEUED = 10


class Case(NamedTuple):
    """Something to time. `call()` does the work `times` times and waits for it."""

    name: str
    call: Callable[[], object]
    times: int = 1


def queued(name: str, call: Callable[[], object], wait: Callable[[object], object]) -> Case:
    """The case of one call on a CPU, and of `QUEUED` calls before one wait elsewhere.

    >>> queued("one", lambda: jnp.ones(2), jax.block_until_ready).times
    1
    """
    times = 1 if on_cpu() else QUEUED

    def all_calls():
        for _ in range(times - 1):
            call()
        wait(call())

    return Case(name, all_calls, times)


class Timing(NamedTuple):
    """Seconds a call: the median of all, the shortest, the longest, and how many were timed."""

    median: float
    fastest: float
    slowest: float
    repeats: int


def take_turns(cases: Sequence[Case], repeats: int, at_most: float = 60.0) -> dict[str, Timing]:
    """Times the cases A B C A B C ..., after one untimed call of each.

    In turns, so that a machine whose speed drifts slows all of them alike. A case whose first call
    takes long is called less often: no more than `at_most` seconds in all, but three times.

    >>> timings = take_turns([Case("nothing", lambda: None)], repeats=3)
    >>> timings["nothing"].repeats
    3
    """
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    budget = {}
    for case in cases:
        budget[case.name] = min(repeats, max(3, int(at_most / max(case.times * _once(case), 1e-9))))
    for turn in range(repeats):
        for case in cases:
            if turn < budget[case.name]:
                seconds[case.name].append(_once(case))
    return {
        name: Timing(statistics.median(timings), min(timings), max(timings), len(timings))
        for name, timings in seconds.items()
    }


def _once(case: Case) -> float:
    begin = time.perf_counter()
    case.call()
    return (time.perf_counter() - begin) / case.times


@contextlib.contextmanager
def compiling_anew():
    """Nothing is read from the cache of compiled programs within, so compile times are true."""
    cached = jax.config.jax_enable_compilation_cache

    def switch(on):
        jax.config.update("jax_enable_compilation_cache", on)
        # JAX looks at the setting once in a process and remembers; it must look again.
        compilation_cache.reset_cache()

    switch(False)
    try:
        yield
    finally:
        switch(cached)


class Rates(NamedTuple):
    """The machine's rates: FLOP/s of a large float32 product, bytes/s of a large copy."""

    flops: float
    bytes: float

    def seconds(self, flops: float, moved: float) -> float:
        """The shortest time for so many operations and bytes: the larger of the two alone.

        >>> Rates(flops=100.0, bytes=10.0).seconds(flops=50.0, moved=20.0)
        2.0
        """
        return max(flops / self.flops, moved / self.bytes)


def measure_machine(size: int | None = None, copied: int | None = None, repeats: int = 7) -> Rates:
    """Rates of a [size, size] product and of a copy of `copied` floats, read and written.

    By default 2048 and 2^26 on a CPU; elsewhere 8192 and 2^29, beside which a launch is short. The
    product is at full float32 precision, as all distances here are.
    """
    size = size or (2048 if on_cpu() else 8192)
    copied = copied or (1 << (26 if on_cpu() else 29))
    a = jax.random.normal(jax.random.key(0), (size, size))
    product = jax.jit(lambda a: jnp.dot(a, a, precision=jax.lax.Precision.HIGHEST))
    vector = jnp.zeros(copied)
    plus = jax.jit(lambda v: v + 1)
    timings = take_turns(
        [
            queued("product", lambda: product(a), jax.block_until_ready),
            queued("copy", lambda: plus(vector), jax.block_until_ready),
        ],
        repeats,
    )
    return Rates(2 * size**3 / timings["product"].median, 8 * copied / timings["copy"].median)

"""Speed measurements: our time beside a peer's and the machine's own limit, in one run."""

from collections.abc import Callable
from typing import NamedTuple

from fedjax_sec.bench import aggregators, fixed, inversion, memory, order, rounds, scaling


class Suite(NamedTuple):
    """What `fedjax-sec bench NAME` runs: `names()` are the parts that can be chosen alone."""

    names: Callable
    run: Callable


SUITES = {
    "aggregators": Suite(
        lambda: aggregators.rules(4, 1),
        lambda rates, only, repeats, with_peers, data_dir, shapes: aggregators.run(
            rates, shapes or aggregators.SHAPES, only, repeats, with_peers
        ),
    ),
    "order": Suite(
        lambda: order.ways(4),
        lambda rates, only, repeats, with_peers, data_dir, shapes: order.run(
            rates, only, repeats, *([k for k, _ in shapes], shapes[0][1]) if shapes else ()
        ),
    ),
    "inversion": Suite(
        lambda: inversion.NETWORKS,
        lambda rates, only, repeats, with_peers, data_dir, shapes: inversion.run(
            rates, only, repeats, with_peers
        ),
    ),
    "rounds": Suite(
        rounds.workloads,
        lambda rates, only, repeats, with_peers, data_dir, shapes: rounds.run(
            rates, only, repeats, data_dir, with_peers
        ),
    ),
    "scaling": Suite(
        lambda: ("K", "D", "batch", "seeds", "cells"),
        lambda rates, only, repeats, with_peers, data_dir, shapes: scaling.run(
            rates, only, repeats, data_dir
        ),
    ),
    "memory": Suite(
        lambda: aggregators.rules(4, 1),
        lambda rates, only, repeats, with_peers, data_dir, shapes: memory.run(
            only, *(shapes or ())[:1]
        ),
    ),
    "fixed": Suite(
        tuple,
        lambda rates, only, repeats, with_peers, data_dir, shapes: fixed.run(repeats, data_dir),
    ),
}

"""Aggregation rules on a stack [K, D]: ours, the plain version, ByzFL's, and the limit."""

import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sec.api import _aggregate
from fedjax_sec.bench import peers
from fedjax_sec.bench.timing import Rates, queued, take_turns
from fedjax_sec.round.pipeline import Defense

SHAPES = ((51, 80_000), (100, 1_000_000))
ITERATIONS, RADIUS = 3, 100.0  # ByzFL's defaults


class Rule(NamedTuple):
    """A rule of ours, and the operations that nobody can avoid."""

    defense: dict
    flops: float = 0.0  # beyond one pass over the stack


def rules(num_rows: int, dim: int) -> dict[str, Rule]:
    """The rules by name, for f = K / 4 (Bulyan's largest f that K allows).

    The limit counts one pass over the stack and, for rules on distances, the K^2 D products and
    sums of one symmetric Gram matrix.
    """
    f = num_rows // 4
    gram = num_rows**2 * dim
    weiszfeld = {"num_iterations": ITERATIONS, "smoothing": 0.1, "start": "zero"}
    return {
        "mean": Rule({"name": "mean", "weighted": False}),
        "median": Rule({"name": "median"}),
        "trimmed_mean": Rule({"name": "trimmed_mean", "num_byzantine": f}),
        "near_median": Rule(
            {"name": "trimmed_mean", "num_byzantine": f, "variant": "nearest_n_minus_f"}
        ),
        "krum": Rule({"name": "krum", "num_byzantine": f}, gram),
        "multi_krum": Rule(
            {"name": "multi_krum", "num_byzantine": f, "num_selected": num_rows - f}, gram
        ),
        "bulyan": Rule({"name": "bulyan", "num_byzantine": (num_rows - 3) // 4}, gram),
        "geometric_median": Rule({"name": "geometric_median", "weighted": False, **weiszfeld}),
        "centered_clipping": Rule({"name": "centered_clipping", "radius": RADIUS}),
    }


def run(
    rates: Rates, shapes=SHAPES, only=(), repeats: int = 7, with_peers: bool = True
) -> Iterator[dict]:
    """One row a shape and rule: medians in milliseconds, ratios, compile seconds, memory."""
    for num_rows, dim in shapes:
        stack = jax.random.normal(jax.random.key(0), (num_rows, dim))
        updates = np.array(stack)
        theirs = peers.byzfl_aggregators(num_rows // 4, ITERATIONS, RADIUS) if with_peers else {}
        for name, rule in rules(num_rows, dim).items():
            if only and name not in only:
                continue
            yield _row(name, rule, stack, updates, theirs.get(name), rates, repeats)


def arguments(defense, stack) -> tuple:
    """The arguments of `fedjax_sec.aggregate`'s compiled function for this stack [K, D]."""
    num_rows, dim = stack.shape
    key, params = jax.random.key(0), jnp.zeros(dim)
    return Defense.build(defense), stack, jnp.ones(num_rows), key, params, None, None


def _row(name, rule, stack, updates, theirs, rates, repeats) -> dict:
    num_rows, dim = stack.shape
    args = arguments(rule.defense, stack)
    lowered = _aggregate.lower(*args)
    begin = time.perf_counter()
    function = lowered.compile()
    compiling = time.perf_counter() - begin
    memory = function.memory_analysis()
    cases = [queued("ours", lambda: function(*args), jax.block_until_ready)]
    cases += peers.byzfl_cases(theirs, updates) if theirs else []
    timings = take_turns(cases, repeats)
    limit = rates.seconds(rule.flops, 4 * (num_rows + 1) * dim)
    ours = timings.pop("ours")
    row = {
        "rule": name,
        "K": num_rows,
        "D": dim,
        "ours ms": 1e3 * ours.median,
        "fastest ms": 1e3 * ours.fastest,
        "slowest ms": 1e3 * ours.slowest,
        "limit ms": 1e3 * limit,
        "times the limit": ours.median / limit,
        "compile s": compiling,
        "temporary / stack": memory.temp_size_in_bytes / stack.nbytes if memory else None,
    }
    for peer, timing in timings.items():
        row[f"{peer} ms"] = 1e3 * timing.median
        row[f"faster than {peer}"] = timing.median / ours.median
    return row

"""Ways to find the median over K clients: sorting, counting, and a sorting network.

`fedjax_sec.ops.sorting` chooses among them by the backend and K.
"""

import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sec.bench.timing import Rates, queued, take_turns
from fedjax_sec.ops import selection, sorting

CLIENTS, DIM = (10, 20, 51, 100, 200), 1_000_000
#: Most rows whose network is written out: compile time grows with them.
MOST_WRITTEN_OUT = 100


def ways(num_rows: int) -> dict[str, Callable]:
    """[K, D] -> [D], the value of rank K // 2 of each column, by name.

    >>> x = jnp.arange(12.0).reshape(4, 3)
    >>> {name: way(x)[0].item() for name, way in ways(4).items()}
    {'jnp.sort': 6.0, 'counting': 6.0, 'network': 6.0}
    """
    middle, layers = num_rows // 2, sorting.sorting_network(num_rows)
    known = {
        "jnp.sort": lambda x: jnp.sort(x, axis=0)[middle],
        "counting": lambda x: selection.order_statistic(x, jnp.int32(middle))[0],
    }
    if num_rows <= MOST_WRITTEN_OUT:
        known["network"] = lambda x: sorting.compare(sorting.split_rows(x), layers, True)[middle][0]
    return known


def run(
    rates: Rates, only: Sequence[str] = (), repeats: int = 7, clients=CLIENTS, dim: int = DIM
) -> Iterator[dict]:
    """One row a number of clients and a way, with the limit of one read of the stack."""
    for num_rows in clients:
        stack = jax.random.normal(jax.random.key(num_rows), (num_rows, dim))
        right = jnp.sort(stack, axis=0)[num_rows // 2]
        cases, seconds = [], {}
        for name, way in ways(num_rows).items():
            if only and name not in only:
                continue
            begin = time.perf_counter()
            function = jax.jit(way).lower(stack).compile()
            seconds[name] = time.perf_counter() - begin
            np.testing.assert_array_equal(function(stack), right)
            cases.append(queued(name, lambda f=function, x=stack: f(x), jax.block_until_ready))
        limit = rates.seconds(0.0, 4 * (num_rows + 1) * dim)
        for name, timing in take_turns(cases, repeats).items():
            yield {
                "K": num_rows,
                "D": dim,
                "way": name,
                "ms": 1e3 * timing.median,
                "limit ms": 1e3 * limit,
                "times the limit": timing.median / limit,
                "compile s": seconds[name],
            }

"""What a sweep costs: its programs, their memory, and, after a few timed rounds, its time."""

import heapq
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from fedjax_sec.core import ConfigError
from fedjax_sec.core.advice import shown
from fedjax_sec.core.host import undisturbed
from fedjax_sec.runs.execution import choose_layout
from fedjax_sec.runs.memory import tree_bytes
from fedjax_sec.runs.prepare import make_replicas
from fedjax_sec.runs.program import Program
from fedjax_sec.sweeps import groups as groups_lib
from fedjax_sec.sweeps.grid import Cell
from fedjax_sec.sweeps.groups import Group


class Cost(NamedTuple):
    """What the groups of one compiled program need, each of `size` runs.

    `dim` parameters; bytes of the state of one run, of what it works with in a round, and of the
    data, which all runs of a group share. `start` is the time until the first round, measuring the
    layout and compiling, `round` and `evaluation` those of all runs of a group together, in
    seconds; None where nothing was timed.
    """

    groups: tuple[Group, ...]
    dim: int
    state_bytes: int
    data_bytes: int
    working_bytes: int | None = None
    start: float | None = None
    round: float | None = None
    evaluation: float | None = None

    @property
    def size(self) -> int:
        """Runs in a group."""
        return len(self.groups[0].cells)

    @property
    def seconds(self) -> float | None:
        """A group's time, from nothing."""
        if self.start is None or self.round is None or self.evaluation is None:
            return None
        one = self.groups[0].cells[0].experiment
        evaluations = -(-one.rounds // one.evaluation.every) + 1
        return self.start + one.rounds * self.round + evaluations * self.evaluation


@undisturbed
def estimate(
    cells: Sequence[Cell],
    *,
    group_size: int | None = None,
    at_once: int | None = None,
    rounds: int = 3,
    on_program: Callable[[Cost], None] | None = None,
) -> list[Cost]:
    """The cost of every program of a sweep, in the order of its cells; writes nothing.

    Args:
      cells: of one sweep.
      group_size: as in `plan`.
      at_once: as in `run_cells`.
      rounds: rounds of each program that are run and timed on this machine, after as many that are
        not; 0: none is compiled.
      on_program: called with each cost when it is known.

    Raises: `ConfigError` for cells that cannot be run.
    """
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 0:
        raise ConfigError(f"rounds must be an integer >= 0, got {shown(rounds)}.")
    by_program: dict = {}
    for group in groups_lib.grouped(cells, groups_lib.limit(group_size)):
        key = group.cells[0].experiment.structure(), len(group.cells)
        by_program.setdefault(key, []).append(group)
    costs = []
    for members in by_program.values():
        costs.append(_cost(tuple(members), at_once, rounds))
        if on_program is not None:
            on_program(costs[-1])
    return costs


def _cost(groups: tuple[Group, ...], at_once: int | None, rounds: int) -> Cost:
    prepared = groups_lib.with_prepared(groups[0], {}).prepared
    begin = time.perf_counter()
    program = Program(prepared[0], at_once, choose_layout(prepared[0], len(prepared)))
    replicas = make_replicas(prepared)
    shapes = program.state_shapes(replicas)
    size = len(prepared)
    data = tree_bytes((program.pool, program.test))
    dim = program.problem.space.dim
    cost = Cost(groups, dim, tree_bytes(shapes) // size, data)
    if not rounds:
        return cost
    working, _ = program.needs(shapes, replicas, rounds)
    state = program.init(replicas)
    jax.block_until_ready(program.evaluate(state, replicas))
    start = time.perf_counter() - begin
    state, _ = jax.block_until_ready(program.advance(state, replicas, 0, rounds))
    timed = time.perf_counter()
    state, _ = jax.block_until_ready(program.advance(state, replicas, rounds, rounds))
    round = (time.perf_counter() - timed) / rounds
    timed = time.perf_counter()
    jax.block_until_ready(program.evaluate(state, replicas, 2 * rounds))
    side = max(min(program.at_once or size, size), 1)
    return cost._replace(
        working_bytes=working // side,
        start=start,
        round=round,
        evaluation=time.perf_counter() - timed,
    )


def duration_on(costs: Sequence[Cost], workers: int) -> float | None:
    """Seconds until all groups are done, each taken by the next free worker, as workers do.

    >>> from fedjax_sec.sweeps.grid import make_cells
    >>> cells = make_cells({"rounds": 10, "evaluation": {"every": 10}}, {}, seeds=range(3))
    >>> groups = groups_lib.grouped(cells, 1)
    >>> cost = Cost(tuple(groups), 10, 40, 0, 0, start=5.0, round=1.0, evaluation=0.5)
    >>> [duration_on([cost], workers) for workers in (1, 2, 3)]
    [48.0, 32.0, 16.0]
    """
    busy = [0.0] * max(workers, 1)
    for cost in costs:
        if cost.seconds is None:
            return None
        for _ in cost.groups:
            heapq.heapreplace(busy, busy[0] + cost.seconds)
    return max(busy)

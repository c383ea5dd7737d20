"""`fedjax-sec plan`."""

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fedjax_sec.cli.common import (
    DataDir,
    Overrides,
    app,
    console,
    data_overrides,
    imported,
    reported,
)


@app.command()
@reported()
def plan(
    ctx: typer.Context,
    config: Annotated[Path, typer.Argument(metavar="SWEEP.yaml", help="The sweep.")],
    overrides: Overrides = None,
    *,
    workers: Annotated[
        list[int] | None, typer.Option(min=1, help="Workers to estimate for; repeatable.")
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=0, help="Rounds of each program to time here; 0: none is compiled.")
    ] = 3,
    data_dir: DataDir = None,
) -> None:
    """Say what a sweep costs before it is run: programs, memory, time on so many workers."""
    from fedjax_sec import sweeps
    from fedjax_sec.progress import duration

    data = data_overrides(data_dir, overrides or ())
    settings, cells = sweeps.load(config, overrides or (), data, imported(ctx))
    table = Table("program", "groups", "runs each", "parameters", "memory a run", "data")
    for name in ("start", "a round", "a group") if rounds else ():
        table.add_column(name)

    costs = []

    def on_program(cost):
        costs.append(cost)
        memory = f"{size_of(cost.state_bytes)} kept"
        if cost.working_bytes is not None:
            memory += f" + {size_of(cost.working_bytes)} while it runs"
        titles = dict.fromkeys(cell.title for group in cost.groups for cell in group.cells)
        more = f" and {len(titles) - 1} more" if len(titles) > 1 else ""
        row = [next(iter(titles)) + more, len(cost.groups), cost.size, f"{cost.dim:,}", memory]
        row.append(size_of(cost.data_bytes))
        if rounds:
            row += [duration(cost.start), _brief(cost.round), duration(cost.seconds)]
        table.add_row(*map(str, row))
        if not console.is_terminal:
            print("\t".join(map(str, row)))

    sweeps.estimate(
        cells,
        group_size=settings.group_size,
        at_once=settings.at_once,
        rounds=rounds,
        on_program=on_program,
    )
    if console.is_terminal:
        console.print(table)
    groups = sum(len(cost.groups) for cost in costs)
    total = sum(cell.experiment.rounds for cell in cells)
    console.print(
        f"{len(cells)} runs of {total:,} rounds in all; groups: {groups}; programs: {len(costs)}",
        highlight=False,
    )
    for number in workers or ([settings.workers] if settings.workers else [1]):
        if (seconds := sweeps.duration_on(costs, number)) is not None:
            plural = "s" * (number != 1)
            console.print(
                f"estimated on {number} worker{plural} like this: {duration(seconds)}",
                highlight=False,
            )


def size_of(size: float) -> str:
    """Bytes for people.

    >>> size_of(1500), size_of(3 * 2**30)
    ('1.5 KiB', '3.0 GiB')
    """
    units = ("bytes", "KiB", "MiB", "GiB")
    power = min(int(math.log(max(size, 1), 1024)), len(units) - 1)
    return f"{size / 1024**power:.{1 if power else 0}f} {units[power]}"


def _brief(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"{1000 * seconds:.3g} ms"

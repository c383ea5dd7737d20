"""`fedjax-sec bench`."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from fedjax_sec import core
from fedjax_sec.cli.common import DataDir, app, console, errors, reported
from fedjax_sec.core import ConfigError, files

SIZED = ("aggregators", "memory", "order")  # benchmarks of a stack of any size


@app.command()
def bench(
    suite: Annotated[
        str, typer.Argument(help="aggregators, order, memory, rounds, inversion, scaling or fixed.")
    ] = "aggregators",
    *,
    out: Annotated[Path, typer.Option(help="JSON file for the results.")],
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only this rule, or these rounds (words of their names), or this axis."),
    ] = None,
    size: Annotated[
        list[str] | None, typer.Option(metavar="K,D", help="Clients and parameters of a stack.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=3, help="Timed calls of everything.")] = 7,
    with_peers: Annotated[
        bool, typer.Option("--peers/--no-peers", help="Time the peers too, where installed.")
    ] = True,
    data_dir: DataDir = None,
) -> None:
    """Time ourselves beside peers and the machine's limit."""
    from fedjax_sec.bench import SUITES, peers, report, timing

    with reported():
        if suite not in SUITES:
            raise ConfigError(
                f"Unknown benchmark {suite!r}.{core.suggestion(suite, SUITES)} "
                f"Known: {', '.join(SUITES)}."
            )
        shapes = [_shape(text) for text in size or ()]
        if shapes and suite not in SIZED:
            raise ConfigError(
                f"--size belongs to the benchmarks {', '.join(SIZED)}, not to {suite!r}."
            )
        chosen = SUITES[suite]
        known = chosen.names()
        for name in only or ():
            if not any(name in one for one in known):
                raise ConfigError(
                    f"--only: unknown {name!r}.{core.suggestion(name, known)} "
                    f"Known: {', '.join(known)}."
                )
        if with_peers and (absent := peers.missing()):
            errors.print(f"Not installed, so not compared with: {', '.join(absent)}.")
        files.check_writable(out.absolute().parent)
        rates = timing.measure_machine()
        folder = None if data_dir is None else str(data_dir)
        rows = []
        for row in chosen.run(rates, tuple(only or ()), repeats, with_peers, folder, shapes):
            rows.append(row)  # written at once: a long benchmark that is stopped keeps what it has
            report.write(out, "fedjax-sec " + shlex.join(sys.argv[1:]), rates, rows)
    print(report.table(rows))
    console.print(
        f"Product {rates.flops / 1e9:.0f} GFLOP/s, copy {rates.bytes / 1e9:.1f} GB/s. "
        f"Results: {out}",
        soft_wrap=True,
    )


def _shape(text: str) -> tuple[int, int]:
    clients, _, dim = text.partition(",")
    if not (clients.strip().isdigit() and dim.strip().isdigit()) or int(clients) < 4:
        raise ConfigError(f"--size must be K,D such as 51,80000 with K >= 4, got {text!r}.")
    return int(clients), int(dim)

"""`fedjax-sec reconstruct`."""

from pathlib import Path
from typing import Annotated

import typer

from fedjax_sec.cli.common import (
    DataDir,
    app,
    console,
    data_overrides,
    print_table,
    reported,
)
from fedjax_sec.core import ConfigError, files, suggestion
from fedjax_sec.core.optional import require

_PREFIXES = ("attack", "experiment")


@app.command()
@reported()
def reconstruct(
    where: Annotated[
        Path,
        typer.Argument(metavar="RUN_OR_CONFIG", help="Folder of a finished run, or CONFIG.yaml."),
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="attack=NAME [attack.FIELD=VALUE]... [experiment.KEY=VALUE]...",
            help="The privacy attack, and changes to a configuration.",
        ),
    ] = None,
    *,
    rounds: Annotated[
        list[str] | None,
        typer.Option(
            "--round",
            help="Round, from 1, or 1-9; repeatable (a run's next one, a configuration's first).",
        ),
    ] = None,
    clients: Annotated[
        list[str] | None,
        typer.Option("--client", help="Number of a client, or 0-9; repeatable (0)."),
    ] = None,
    observer: Annotated[
        str, typer.Option(help="Who looks: server, client, uplink or downlink.")
    ] = "server",
    secure_aggregation: Annotated[
        bool, typer.Option("--secure-aggregation", help="The server sees the clients' mean alone.")
    ] = False,
    merged: Annotated[
        int | None,
        typer.Option(min=1, help="Clients of whose mean the attack takes a message for."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the attack's draws.")] = 0,
    success: Annotated[
        float, typer.Option(help="PSNR in decibels from which on an attack succeeds.")
    ] = 20.0,
    out: Annotated[Path, typer.Option(help="Folder for the files.")],
    data_dir: DataDir = None,
) -> None:
    """Reconstruct clients' examples from what an observer sees in a round.

    Prints each client's scores, and writes reconstruction.json, the arrays and the pictures.
    """
    from fedjax_sec.ops import observers
    from fedjax_sec.report import reconstruction as report
    from fedjax_sec.runs import config as config_lib

    for package in ("matplotlib.figure", "pandas"):
        require(package, "The pictures of a reconstruction")
    if observer not in observers.OBSERVERS:
        raise ConfigError(
            f"--observer must be one of {', '.join(observers.OBSERVERS)}, got {observer!r}."
            f"{suggestion(observer, observers.OBSERVERS)}"
        )
    given = config_lib.apply_overrides({}, settings or ())
    if unknown := sorted(set(given) - set(_PREFIXES)):
        raise ConfigError(
            f"reconstruct: {unknown[0]!r} is neither a field of the attack nor of the experiment; "
            f"write attack.{unknown[0]}=... or experiment.{unknown[0]}=..."
        )
    if "attack" not in given:
        raise ConfigError("reconstruct: name the privacy attack, such as attack=dlg.")
    prefix = "experiment."
    changes = [text[len(prefix) :] for text in settings or () if text.startswith(prefix)]
    overrides = data_overrides(data_dir, changes)
    for text in changes:
        key, value = config_lib.parse_override(text)
        overrides[key] = value
    out = out.absolute()
    files.check_writable(out.parent)
    made = report.reconstruct(
        where,
        given["attack"],
        rounds=None if rounds is None else _numbers(rounds, "--round"),
        clients=_numbers(clients or ["0"], "--client"),
        observer=observer,
        secure_aggregation=secure_aggregation,
        merged=merged,
        seed=seed,
        success=success,
        overrides=overrides,
    )
    written = report.write(made, out)
    print_table(report.table(made), f"{made.attack.registered_name}, seen by the {observer}")
    lines = (f"Written: {path}" for path in written)
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _numbers(given: list[str], option: str) -> list[int]:
    """The numbers that are given one by one or as ranges.

    >>> _numbers(["7", "0-2"], "--client")
    [7, 0, 1, 2]
    """
    numbers: list[int] = []
    for text in given:
        first, dash, last = text.partition("-")
        known = first.isdecimal() and (not dash or last.isdecimal())
        if not known or int(last or first) < int(first):
            raise ConfigError(f"{option} must be a number such as 3 or a range 0-9, got {text!r}.")
        numbers += range(int(first), int(last or first) + 1)
    return numbers

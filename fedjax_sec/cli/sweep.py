"""`fedjax-sec sweep`."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from fedjax_sec.cli.common import (
    DataDir,
    Log,
    Out,
    Overrides,
    app,
    console,
    data_option,
    data_overrides,
    errors,
    import_options,
    imported,
    interruptible,
    log_options,
    print_table,
    reported,
)
from fedjax_sec.core.optional import require

LauncherOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Where runs are computed: local (processes of this machine), ray, slurm; with fields, "
        "'{name: slurm, partition: gpu}'.",
    ),
]
WorkersOption = Annotated[
    int | None, typer.Option(min=1, help="Workers of the launcher; local: one a device.")
]


def launcher_of(given: Any, workers: int | None):
    """The launcher of the two options; what `given` says may be YAML."""
    from fedjax_sec import sweeps as sweep_lib
    from fedjax_sec.runs.config import parse_override

    spec = parse_override(f"launcher={given}")[1] if isinstance(given, str) else given
    return sweep_lib.build_launcher(spec, workers)


def launcher_options(launcher: str | None, workers: int | None) -> list[str]:
    """The two options, to be typed again."""
    named = [] if launcher is None else ["--launcher", launcher]
    return named + ([] if workers is None else ["--workers", str(workers)])


@app.command()
@reported()
def sweep(
    ctx: typer.Context,
    config: Annotated[Path, typer.Argument(metavar="SWEEP.yaml", help="The sweep.")],
    overrides: Overrides = None,
    *,
    out: Out,
    data_dir: DataDir = None,
    log: Log = None,
    launcher: LauncherOption = None,
    workers: WorkersOption = None,
) -> None:
    """Run a sweep, or resume it: finished runs in OUT are skipped."""
    imports = imported(ctx)
    again = ["fedjax-sec", "sweep", str(config), *(overrides or ()), "--out", str(out.absolute())]
    again += [*data_option(data_dir), *import_options(imports)]
    again += [*launcher_options(launcher, workers), *log_options(log)]
    run_sweep(config, out, overrides or (), data_dir, again, imports, launcher, workers, log)


def run_sweep(
    config: Path,
    out: Path,
    overrides: Sequence[str] = (),
    data_dir: Path | None = None,
    again: Sequence[str] | None = None,
    imports: Sequence[str] = (),
    launcher: str | None = None,
    workers: int | None = None,
    log: Sequence[str] | None = None,
) -> None:
    """Runs a sweep file, writes its tables and its figure into `out` and prints the first table.

    `again` is the command that resumes after an interruption.
    """
    from fedjax_sec import sweeps as sweep_lib
    from fedjax_sec.report import sweeps as files_lib
    from fedjax_sec.report import tables as tables_lib

    require("matplotlib.figure", "The figure of a sweep")  # before anything is computed
    for package in ("pandas", "tabulate"):
        require(package, "The table of a sweep")
    out = out.absolute()
    data = data_overrides(data_dir, overrides)
    settings, cells = sweep_lib.load(config, overrides, data, imports, log)
    results = run_with_progress(
        cells,
        out,
        at_once=settings.at_once,
        group_size=settings.group_size,
        again=again,
        launcher=launcher_of(launcher or settings.launcher, workers or settings.workers),
    )
    heading, _, table = next(iter(tables_lib.tables(cells, results).values()))
    print_table(table, heading)
    for warning in tables_lib.warnings_of(cells, results):
        console.print(f"[bold yellow]Warning:[/] {escape(warning)}", soft_wrap=True)
    figure = files_lib.write(cells, results, out, settings.title)  # drawing takes seconds
    console.print(f"Tables: {out / 'table.md'}\nFigure: {figure}", soft_wrap=True)


def run_with_progress(
    cells,
    out: Path,
    at_once: int | None = None,
    group_size: int | None = None,
    again: Sequence[str] | None = None,
    prepared: Mapping | None = None,
    launcher: Any = None,
):
    """`sweeps.run_cells` with its progress on stderr (plain lines when it is no terminal).

    `again` is the command that goes on after an interruption (None: this one).
    """
    from fedjax_sec import progress
    from fedjax_sec import sweeps as sweep_lib

    with interruptible(again or ["python", *sys.argv]), progress.choose(errors) as display:
        watch = progress.OfSweep(display, cells, sweep_lib.unfinished(cells, out), out)

        def on_status(status):
            """All workers in one line; another where a run has failed."""
            for name, error in watch.on_status(status):
                errors.print(f"{name} failed: {error}", markup=False, soft_wrap=True)

        return sweep_lib.run_cells(
            cells,
            out,
            at_once=at_once,
            group_size=group_size,
            launcher=launcher,
            on_group=watch.on_group,
            on_wait=watch.on_wait,
            on_status=on_status,
            prepared=prepared,
        )

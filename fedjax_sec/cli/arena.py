"""`fedjax-sec arena`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fedjax_sec.cli.common import (
    DataDir,
    Log,
    Overrides,
    app,
    console,
    data_option,
    data_overrides,
    errors,
    import_options,
    imported,
    log_options,
    print_table,
    reported,
)
from fedjax_sec.cli.sweep import (
    LauncherOption,
    WorkersOption,
    launcher_of,
    launcher_options,
    run_with_progress,
)
from fedjax_sec.core.optional import require

_LIST = "Names separated by commas (of a pipeline by +), a YAML file, or YAML inline."


@app.command()
@reported()
def arena(
    ctx: typer.Context,
    base: Annotated[Path, typer.Argument(metavar="BASE.yaml", help="The experiment.")],
    overrides: Overrides = None,
    *,
    attacks: Annotated[str, typer.Option(metavar="A,B,...", help=_LIST)],
    defenses: Annotated[str, typer.Option(metavar="C,D,...", help=_LIST)],
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of every combination.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("results/arena"),
    data_dir: DataDir = None,
    log: Log = None,
    launcher: LauncherOption = None,
    workers: WorkersOption = None,
) -> None:
    """Run every attack against every defence, or resume it: tables and heat maps."""
    from fedjax_sec import sweeps
    from fedjax_sec.report import arena as report_lib
    from fedjax_sec.report import tables
    from fedjax_sec.runs import config as config_lib
    from fedjax_sec.runs import loggers

    require("matplotlib.figure", "A heat map")  # before anything is computed
    for package in ("pandas", "tabulate"):
        require(package, "The table of an arena")
    out, imports, given = out.absolute(), imported(ctx), overrides or ()
    again = ["fedjax-sec", "arena", str(base), *given, "--attacks", attacks]
    again += ["--defenses", defenses, "--seeds", str(seeds), "--out", str(out)]
    again += [*data_option(data_dir), *import_options(imports)]
    again += [*launcher_options(launcher, workers), *log_options(log)]
    where = launcher_of(launcher, workers)
    changes = dict(map(config_lib.parse_override, given)) | data_overrides(data_dir, given)
    changes = loggers.with_more(changes, log, "--log")
    planned = sweeps.plan_arena(base, attacks, defenses, seeds, changes, imports)
    planned, prepared = sweeps.admit(planned, out)
    for one in planned.refused:
        errors.print(f"[bold yellow]Refused:[/] {escape(str(one))}", soft_wrap=True)
    results = run_with_progress(planned.cells, out, again=again, prepared=prepared, launcher=where)
    scored = report_lib.score(planned, results)
    figures = report_lib.write(scored, results, out)
    for heading, _, table in report_lib.sections(scored)[:2]:
        print_table(table, f"{heading} (%), {scored.data}")
    for warning in tables.warnings_of(planned.cells, results):
        console.print(f"[bold yellow]Warning:[/] {escape(warning)}", soft_wrap=True)
    drawn = ", ".join(map(str, figures))
    console.print(f"Tables: {out / 'arena.md'}\nHeat maps: {drawn}", soft_wrap=True)

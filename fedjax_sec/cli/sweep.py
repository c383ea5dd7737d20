"""`fedjax-sec sweep`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fedjax_sec.cli.common import (
    DataDir,
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
    print_table,
    progress_bar,
    reported,
    status_of,
)


@app.command()
@reported()
def sweep(
    ctx: typer.Context,
    config: Annotated[Path, typer.Argument(metavar="SWEEP.yaml", help="The sweep.")],
    overrides: Overrides = None,
    *,
    out: Out,
    data_dir: DataDir = None,
) -> None:
    """Run a sweep; what is finished in OUT is kept and not run again."""
    from fedjax_sec import sweeps as sweep_lib
    from fedjax_sec.report import plotting
    from fedjax_sec.report import tables as tables_lib

    out, imports = out.absolute(), imported(ctx)
    again = ["fedjax-sec", "sweep", str(config), *(overrides or ()), "--out", str(out)]
    again += [*data_option(data_dir), *import_options(imports)]
    changes = data_overrides(data_dir)
    settings, cells = sweep_lib.load(config, overrides or (), changes, imports)
    found = run_with_progress(cells, out, at_once=settings.at_once, again=again)
    frame, axes = tables_lib.to_frame(cells, found), tables_lib.axes_of(cells)
    frame.to_csv(out / "runs.csv", index=False)
    tables_lib.summarized(frame, axes).to_csv(out / "table.csv", index=False)
    tables = list(tables_lib.tables(cells, found).values())
    texts = [f"### {head}\n\n{said}\n\n{table.to_markdown()}\n" for head, said, table in tables]
    (out / "table.md").write_text("\n".join(texts))
    heading, _, table = tables[0]
    print_table(table, heading)
    for warning in tables_lib.warnings_of(cells, found):
        console.print(f"[bold yellow]Warning:[/] {escape(warning)}", soft_wrap=True)
    groups: dict = {}
    for cell, result in zip(cells, found, strict=True):
        first, *rest = cell.parts
        groups.setdefault(first, {}).setdefault(" / ".join(rest) or "run", []).append(result)
    lines = [f"{tables_lib.data_of(found)}; {plotting.band_of(frame['seed'].nunique())}"]
    lines = [settings.title, *lines] if settings.title else lines
    paths = plotting.grid_of_curves(groups, lines, out / "accuracy")
    console.print(f"Tables: {out / 'table.md'}\nFigure: {paths[0]}", soft_wrap=True)


def run_with_progress(
    cells, out: Path, at_once: int | None = None, again: Sequence[str] | None = None
):
    """`sweep.run_cells` with a progress bar on stderr (plain lines when it is no terminal).

    `again` is the command that goes on after an interruption (None: this one).
    """
    from fedjax_sec import sweeps as sweep_lib

    with interruptible(again or ["python", *sys.argv]), progress_bar() as progress:

        def on_group(number, total, members):
            rounds = members[0].experiment.rounds
            names = ", ".join(dict.fromkeys(cell.title for cell in members))
            text = f"group {number + 1}/{total}: {names}"
            if progress.disable:
                errors.print(f"{text} ({len(members)} runs)", soft_wrap=True)
            task = progress.add_task(text[:60], total=rounds, status="compiling")
            return lambda done, rows: progress.update(task, completed=done, status=status_of(rows))

        def on_wait(left):
            text = f"waiting for {len(left)} runs of other processes"
            if progress.disable:
                errors.print(text)
            progress.add_task(text, total=None, status="")

        return sweep_lib.run_cells(cells, out, at_once=at_once, on_group=on_group, on_wait=on_wait)

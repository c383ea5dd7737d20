"""`fedjax-sec status`."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from fedjax_sec.cli.common import app, console, reported
from fedjax_sec.progress import duration, newest
from fedjax_sec.progress.words import speed

#: Runs that are named one by one; `--json` names all.
SHOWN = 20


@app.command()
def status(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of a run or a sweep.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Everything, each run too, as JSON.")
    ] = False,
) -> None:
    """Say what of a run or a sweep is finished, running, waiting or interrupted, and how long."""
    from fedjax_sec.sweeps import survey

    with reported():
        folder = survey(out)
    if as_json:
        print(json.dumps(folder.to_dict(), indent=2))
        return
    lines = [f"{folder.kind} {folder.path}: {len(folder.runs)} run{'s' * (len(folder.runs) != 1)}"]
    lines += [", ".join(f"{count} {name}" for name, count in folder.counts.items() if count)]
    lines += [f"estimated time left: {duration(folder.seconds_left)}"]
    if folder.rounds_per_second is not None:
        lines[-1] += f", {speed(folder.rounds_per_second)} of all runs"
    for line in filter(None, lines):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if rows := _rows(folder):
        if not console.is_terminal:
            print("\n".join("\t".join(row) for row in rows))
            return
        table = Table("state", "runs", "round", "newest metrics", title_justify="left")
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)


def _rows(folder) -> list[tuple[str, str, str, str]]:
    """Rows for groups that run or failed, one each, then for diverged runs."""
    groups: dict = {}
    for run in folder.runs:
        if run.state in ("running", "interrupted", "failed"):
            groups.setdefault((run.state, run.group or run.name), []).append(run)
    rows = []
    for (state, _), runs in sorted(groups.items()):
        total = "?" if runs[0].rounds is None else runs[0].rounds
        said = f": {runs[0].error}" if runs[0].error else ""
        done, metrics = f"{runs[0].done}/{total}", newest([run.newest for run in runs])
        rows.append((state, _named([run.name for run in runs]) + said, done, metrics))
    if diverged := [run.name for run in folder.runs if run.diverged]:
        rows.append(("diverged", _named(diverged), "", ""))
    return rows


def _named(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more

"""`fedjax-sec status`."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from fedjax_sec.cli.common import app, console, reported

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
    for line in filter(None, lines):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if rows := _rows(folder):
        if not console.is_terminal:
            print("\n".join("\t".join(row) for row in rows))
            return
        table = Table("state", "runs", "round", title_justify="left")
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)


def _rows(folder) -> list[tuple[str, str, str]]:
    """Rows for groups that run or failed, one each, then for diverged runs."""
    groups: dict = {}
    for run in folder.runs:
        if run.state in ("running", "interrupted", "failed"):
            groups.setdefault((run.state, run.group or run.name), []).append(run)
    rows = []
    for (state, _), runs in sorted(groups.items()):
        total = "?" if runs[0].rounds is None else runs[0].rounds
        said = f": {runs[0].error}" if runs[0].error else ""
        rows.append((state, _named([run.name for run in runs]) + said, f"{runs[0].done}/{total}"))
    if diverged := [run.name for run in folder.runs if run.diverged]:
        rows.append(("diverged", _named(diverged), ""))
    return rows


def _named(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def duration(seconds: float | None) -> str:
    """Seconds in words that fit their accuracy.

    >>> duration(None), duration(0), duration(59.2), duration(3599), duration(90000)
    ('unknown', 'none', '60 s', '60 min', '25 h 0 min')
    """
    if seconds is None:
        return "unknown"
    if seconds <= 0:
        return "none"
    if seconds < 100:
        return f"{-(-seconds // 1):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"

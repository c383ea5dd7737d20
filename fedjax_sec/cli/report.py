"""`fedjax-sec report`."""

from pathlib import Path
from typing import Annotated

import typer

from fedjax_sec.cli.common import app, console, reported
from fedjax_sec.core import ConfigError, files


@app.command()
@reported()
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="OUT [OTHER]",
            help="Folder of a run, a sweep, an arena or a paper, or of several runs; two to "
            "compare them.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="The page (default: report.html or comparison.html in OUT)."),
    ] = None,
    pictures: Annotated[
        bool,
        typer.Option(
            "--pictures/--no-pictures", help="Read the data sets to draw poisoned examples."
        ),
    ] = True,
) -> None:
    """Write one page that shows all runs of a folder, finished or not, or compares two folders."""
    from fedjax_sec.report import page

    if len(folders) > 2:
        raise ConfigError(f"report: one folder, or two to compare, got {len(folders)}.")
    page.check_packages()
    name = "report.html" if len(folders) == 1 else "comparison.html"
    out = (folders[0] / name if out is None else out).absolute()
    if out.is_dir():
        raise ConfigError(f"--out: {str(out)!r} is a folder; name a file, such as {name}.")
    if out.parent not in [folder.absolute() for folder in folders]:
        files.check_writable(out.parent)
    if len(folders) == 1:
        page.write_one(folders[0], out, pictures)
    else:
        console.print(page.write_two(*folders, out)[1], soft_wrap=True)
    console.print(f"Page: {out}", soft_wrap=True)

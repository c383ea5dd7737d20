"""`fedjax-sec audit`."""

from pathlib import Path
from typing import Annotated

import typer

from fedjax_sec.cli.common import app, reported
from fedjax_sec.core import files


@app.command()
def audit(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    surrogate: Annotated[
        Path | None, typer.Option(help="Finished run whose model transfer attacks are made on.")
    ] = None,
    eps: Annotated[
        float | None, typer.Option(help="Radius in pixels (default: the run's own training's).")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Test examples to attack.")] = 500,
    steps: Annotated[int, typer.Option(min=1, help="PGD's steps.")] = 40,
    restarts: Annotated[int, typer.Option(min=1, help="PGD's restarts.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Markdown file for the report.")] = None,
) -> None:
    """Say whether a run's robustness is believable, overstated, or due to masked gradients."""
    from fedjax_sec.report.audit import audit as look

    with reported():
        if out is not None:
            files.check_writable(out.absolute().parent)
        report = look(
            run_dir, surrogate=surrogate, eps=eps, images=images, steps=steps, restarts=restarts
        )
        text = report.to_markdown()
        print(text, end="")
        if out is not None:
            files.write_atomically(out, f"# Audit of {run_dir.name}\n\n{text}")

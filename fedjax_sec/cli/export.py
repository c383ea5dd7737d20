"""`fedjax-sec export`."""

from pathlib import Path
from typing import Annotated

import typer

from fedjax_sec.cli.common import app, console, reported


@app.command()
@reported()
def export(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of a run or a sweep.")],
    *,
    to: Annotated[str, typer.Option(metavar="FORMAT", help="tensorboard, wandb, csv or parquet.")],
    folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write into.")],
) -> None:
    """Write what was measured for TensorBoard or W&B, or as a table."""
    from fedjax_sec.report import exports

    runs = exports.export(out, to, folder)
    text = f"{len(runs)} run{'s' * (len(runs) != 1)} as {to}: {folder}"
    console.print(text, markup=False, highlight=False, soft_wrap=True)

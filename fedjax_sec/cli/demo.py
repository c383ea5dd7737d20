"""`fedjax-sec demo`."""

from pathlib import Path
from typing import Annotated

import typer

from fedjax_sec.cli.common import Overrides, app, reported
from fedjax_sec.cli.sweep import run_sweep
from fedjax_sec.core import shipped


@app.command()
@reported()
def demo(
    overrides: Overrides = None,
    *,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("results/demo"),
) -> None:
    """Run the demo: no attack and two attacks against five defences on embedded digits."""
    changes = overrides or ()
    again = ["fedjax-sec", "demo", *changes, "--out", str(out.absolute())]
    run_sweep(shipped.config_file("demo", "sweep"), out, changes, again=again)

"""`fedjax-sec certify`."""

from pathlib import Path
from typing import Annotated

import typer

from fedjax_sec.cli.common import app, console, print_table, reported
from fedjax_sec.core import ConfigError, files
from fedjax_sec.core.optional import require


@app.command()
@reported()
def certify(
    run_dirs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Folders of finished runs of CRFL."),
    ],
    copies: Annotated[int, typer.Option(min=1, help="M, noisy copies of the model.")] = 1000,
    alpha: Annotated[
        float, typer.Option(help="Probability with which a bound of a vote's share fails.")
    ] = 0.001,
    std: Annotated[
        float | None, typer.Option(min=0, help="Deviation of the copies' noise (the training's).")
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Test examples, the first ones (all).")
    ] = None,
    convention: Annotated[
        str, typer.Option(help="`paper`, or `author` for what the author code does otherwise.")
    ] = "paper",
    lipschitz: Annotated[
        float | None,
        typer.Option(help="L, the gradient's constant (that of logistic regression)."),
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option(help="gamma, what attackers multiply updates by (the attack's factor)."),
    ] = None,
    weight: Annotated[
        float | None,
        typer.Option(help="An attacker's weight in the aggregate (that in the mean)."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the copies' noise.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the files (default: the run's own).")
    ] = None,
) -> None:
    """Certify runs of CRFL: how large a backdoor may be that changes no prediction.

    Prints certified rate and accuracy at some norms of the backdoor, and writes certificate.json,
    certificate.csv and a figure. Several runs share one.
    """
    from fedjax_sec.report import certificate as report

    for package in ("matplotlib.figure", "pandas"):
        require(package, "The figure of a certificate")
    if out is None and len(run_dirs) > 1:
        raise ConfigError("certify: with several runs say where their figure goes (--out).")
    folder = (run_dirs[0] if out is None else out).absolute()
    if out is not None:
        files.check_writable(folder.parent)
    options = {
        "copies": copies,
        "alpha": alpha,
        "std": std,
        "images": images,
        "convention": convention,
        "lipschitz": lipschitz,
        "scale": scale,
        "weight": weight,
        "seed": seed,
    }
    made = [report.certify(run, **options) for run in run_dirs]
    certificates = report.labelled(run_dirs, made)
    written = report.write(certificates, folder)
    print_table(report.table(certificates), "Certified rate / accuracy (%) at radius r")
    lines = [*report.said(certificates), *(f"Written: {path}" for path in written)]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)

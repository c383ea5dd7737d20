"""`fedjax-sec import-fedml`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fedjax_sec.cli.common import app, console, errors, reported
from fedjax_sec.core import ConfigError, files


class Convention(StrEnum):
    """The source of a rule's computation: FedML's code or the cited paper."""

    fedsecurity = "fedsecurity"
    paper = "paper"


@app.command("import-fedml")
@reported()
def import_fedml(
    config: Annotated[
        Path, typer.Argument(metavar="FILE.yaml", help="A configuration of FedML's FedSecurity.")
    ],
    *,
    out: Annotated[
        Path | None, typer.Option(metavar="OURS.yaml", help="The file to write (none: printed).")
    ] = None,
    convention: Annotated[
        Convention, typer.Option(help="Rules as FedML computes them, or as their papers do.")
    ] = Convention.fedsecurity,
) -> None:
    """Turn a FedSecurity configuration into ours, and say what of it is not the same."""
    from fedjax_sec import fedml

    if out is not None and out.exists():
        raise ConfigError(f"{str(out)!r} exists; choose another name, or remove it.")
    if out is not None and not out.parent.is_dir():
        raise ConfigError(f"{str(out)!r}: there is no folder {str(out.parent)!r}; create it first.")
    made = fedml.convert(config, convention=convention.value)
    for line in made.lines():
        errors.print(escape(line), soft_wrap=True, highlight=False)
    made.experiment()  # before anything is written
    text = made.to_yaml(config.name)
    if out is None:
        print(text, end="")
        return
    files.write_atomically(out, text)
    console.print(f"Configuration: {out}", soft_wrap=True)

"""What the scripts share: options, the configurations they start from, and what they print."""

from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fedjax_sec import cli
from fedjax_sec.runs import config as config_lib

CONFIGS = Path(__file__).parents[1] / "configs"

Out = cli.Out
DataDir = cli.DataDir
Seeds = Annotated[int, typer.Option(min=1, help="Seeds of every cell.")]
Override = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="KEY.PATH=VALUE for every cell. It wins: file < scale < row < --set, as captions say.",
    ),
]
ITEMS_HELP = typer.Argument(help="Tables and figures, or all.")
SCALE_HELP = typer.Option(help="smoke, small (CPU), paper.")


def choice(name: str, values: Iterable[str]) -> type[StrEnum]:
    """What an option may be."""
    return StrEnum(name, {value: value for value in values})


def asked(items: Sequence[StrEnum], known: Iterable[str]) -> list[str]:
    """The names of the items asked for; `all` are all that are known."""
    names = [item.value for item in items]
    return list(known) if "all" in names else names


def experiment(
    paper: str, name: str, data_dir: Path | None, override: Sequence[str] | None = None
) -> dict:
    """The experiment of `configs/PAPER/NAME.yaml`, with its data in `data_dir` where given.

    `override` is `--set`, which must not name another place of the data then.
    """
    spec = config_lib.read_yaml(CONFIGS / paper / f"{name}.yaml")
    return config_lib.apply_overrides(spec, cli.data_overrides(data_dir, override or ()))


def show(written: Sequence[Path]) -> None:
    """Prints the tables, and where everything is."""
    for path in written:
        if path.suffix == ".md":
            print(path.read_text())
    print("\n".join(str(path) for path in written))

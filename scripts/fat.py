"""Regenerates the tables and figures of FAT: Federated Adversarial Training.

    python scripts/fat.py table1 table3 curves --scale small --out results/fat
    python scripts/fat.py table2 figure1 figure2 --users mnist_by_writer --out results/fat-users

Finished runs in the output folder are kept and not run again.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fedjax_sec import cli
from fedjax_sec import config as config_lib
from fedjax_sec.papers import fat

Item = StrEnum("Item", {name: name for name in (*fat.ITEMS, "all")})
Dataset = StrEnum("Dataset", {name: name for name in fat.DATASETS})
Users = StrEnum("Users", {name: name for name in fat.USERS})
Scale = StrEnum("Scale", {name: name for name in fat.SCALES})
CONFIGS = Path(__file__).parents[1] / "configs" / "fat"


def main(
    items: Annotated[list[Item], typer.Argument(help="Tables and figures, or all.")],
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    dataset: Annotated[
        list[Dataset] | None, typer.Option(help="Of Tables 1 and 3; may be repeated.")
    ] = None,
    users: Annotated[Users, typer.Option(help="Data set of Table 2.")] = Users.mnist_by_writer,
    scale: Annotated[Scale, typer.Option(help="smoke, small (CPU), paper.")] = Scale.paper,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of every row.")] = 1,
    override: Annotated[
        list[str] | None, typer.Option("--set", help="KEY.PATH=VALUE for every row.")
    ] = None,
    data_dir: cli.DataDir = None,
) -> None:
    """Regenerate FAT's tables and figures."""
    wanted = list(fat.ITEMS) if Item.all in items else [item.value for item in items]
    datasets = tuple(one.value for one in dataset or ()) or fat.Plan().datasets
    with cli.reported():
        plan = fat.Plan(scale.value, seeds, datasets, users.value, tuple(override or ()))
        bases = {
            name: config_lib.apply_overrides(
                config_lib.read_yaml(CONFIGS / f"{name}.yaml"), cli.data_overrides(data_dir)
            )
            for name in (*fat.DATASETS, *fat.USERS)
        }
        written = fat.regenerate(plan, wanted, bases, out, cli.run_with_progress)
    for path in written:
        if path.suffix == ".md":
            print(path.read_text())
    print("\n".join(str(path) for path in written))


if __name__ == "__main__":
    typer.run(main)

"""Regenerates the tables and figures of FAT: Federated Adversarial Training.

    python scripts/fat.py table1 table3 curves --scale small --out results/fat
    python scripts/fat.py table2 figure1 figure2 --users mnist_by_writer --out results/fat-users

Finished runs in the output folder are kept and not run again.
"""

from typing import Annotated

import _common as common
import typer

from fedjax_sec import cli
from fedjax_sec.papers import fat

Item = common.choice("Item", (*fat.ITEMS, "all"))
Dataset = common.choice("Dataset", fat.DATASETS)
Users = common.choice("Users", fat.USERS)
Scale = common.choice("Scale", fat.SCALES)


def main(
    items: Annotated[list[Item], common.ITEMS_HELP],
    out: common.Out,
    dataset: Annotated[
        list[Dataset] | None, typer.Option(help="Of Tables 1 and 3; may be repeated.")
    ] = None,
    users: Annotated[Users, typer.Option(help="Data set of Table 2.")] = Users.mnist_by_writer,
    scale: Annotated[Scale, common.SCALE_HELP] = Scale.paper,
    seeds: common.Seeds = 1,
    override: common.Override = None,
    data_dir: common.DataDir = None,
) -> None:
    """Regenerate FAT's tables and figures."""
    wanted = common.asked(items, fat.ITEMS)
    datasets = tuple(one.value for one in dataset or ()) or fat.Plan().datasets
    with cli.reported():
        plan = fat.Plan(scale.value, seeds, datasets, users.value, tuple(override or ()))
        bases = {
            name: common.experiment("fat", name, data_dir, override)
            for name in (*fat.DATASETS, *fat.USERS)
        }
        written = fat.regenerate(plan, wanted, bases, out, cli.run_with_progress)
    common.show(written)


if __name__ == "__main__":
    typer.run(main)

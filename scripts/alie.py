"""Regenerates the tables and figures of *A Little Is Enough*.

    python scripts/alie.py all --scale paper --dataset mnist --seeds 3 --out results/alie

Finished runs in the output folder are kept and not run again.
"""

from typing import Annotated

import _common as common
import typer

from fedjax_sec import cli
from fedjax_sec.papers import alie
from fedjax_sec.runs import config as config_lib

Item = common.choice("Item", (*alie.ITEMS, "all"))
Scale = common.choice("Scale", alie.SCALES)
Dataset = common.choice("Dataset", alie.DATASETS)
Convention = common.choice("Convention", alie.CONVENTIONS)


def main(
    items: Annotated[list[Item], common.ITEMS_HELP],
    out: common.Out,
    scale: Annotated[Scale, common.SCALE_HELP] = Scale.paper,
    dataset: Annotated[Dataset, typer.Option(help="Data set.")] = Dataset.mnist,
    seeds: common.Seeds = 3,
    convention: Annotated[
        Convention, typer.Option(help="The paper's formulas or the author code's.")
    ] = Convention.paper,
    override: common.Override = None,
    data_dir: common.DataDir = None,
) -> None:
    """Regenerate ALIE's tables and figures."""
    mnist_only, cifar_only = {"figure2"}, {"figure3", "figure4"}
    wanted = common.asked(items, alie.ITEMS)
    skip = cifar_only if dataset == Dataset.mnist else mnist_only
    with cli.reported():
        if not set(wanted) - skip:
            raise config_lib.ConfigError(
                f"{', '.join(wanted)}: not in the paper for {dataset}; "
                f"see --dataset ({', '.join(alie.DATASETS)})."
            )
        plan = alie.Plan(dataset.value, scale.value, seeds, convention.value, tuple(override or ()))
        base = common.experiment("alie", dataset.value, data_dir, override)
        kept = [item for item in wanted if item not in skip]
        written = alie.regenerate(plan, kept, base, out, cli.run_with_progress)
    common.show(written)


if __name__ == "__main__":
    typer.run(main)

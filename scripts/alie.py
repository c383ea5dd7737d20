"""Regenerates the tables and figures of *A Little Is Enough*.

    python scripts/alie.py all --scale paper --dataset mnist --seeds 3 --out results/alie

Finished runs in the output folder are kept and not run again.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fedjax_sec import cli
from fedjax_sec import config as config_lib
from fedjax_sec.papers import alie

Item = StrEnum("Item", {name: name for name in (*alie.ITEMS, "all")})
Scale = StrEnum("Scale", {name: name for name in alie.SCALES})
Dataset = StrEnum("Dataset", {name: name for name in alie.DATASETS})
Convention = StrEnum("Convention", {name: name for name in alie.CONVENTIONS})
CONFIGS = Path(__file__).parents[1] / "configs" / "alie"


def main(
    items: Annotated[list[Item], typer.Argument(help="Tables and figures, or all.")],
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    scale: Annotated[Scale, typer.Option(help="smoke, small (CPU), paper.")] = Scale.paper,
    dataset: Annotated[Dataset, typer.Option(help="Data set.")] = Dataset.mnist,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of every cell.")] = 3,
    convention: Annotated[
        Convention, typer.Option(help="The paper's formulas or the author code's.")
    ] = Convention.paper,
    override: Annotated[
        list[str] | None, typer.Option("--set", help="KEY.PATH=VALUE for every cell.")
    ] = None,
    data_dir: cli.DataDir = None,
) -> None:
    """Regenerate ALIE's tables and figures."""
    mnist_only, cifar_only = {"figure2"}, {"figure3", "figure4"}
    wanted = list(alie.ITEMS) if Item.all in items else [item.value for item in items]
    skip = cifar_only if dataset == Dataset.mnist else mnist_only
    with cli.reported():
        if not set(wanted) - skip:
            raise config_lib.ConfigError(
                f"{', '.join(wanted)}: not in the paper for {dataset}; "
                f"see --dataset ({', '.join(alie.DATASETS)})."
            )
        plan = alie.Plan(dataset.value, scale.value, seeds, convention.value, tuple(override or ()))
        base = config_lib.read_yaml(CONFIGS / f"{dataset.value}.yaml")
        base = config_lib.apply_overrides(base, cli.data_overrides(data_dir))
        kept = [item for item in wanted if item not in skip]
        written = alie.regenerate(plan, kept, base, out, cli.run_with_progress)
    for path in written:
        if path.suffix == ".md":
            print(path.read_text())
    print("\n".join(str(path) for path in written))


if __name__ == "__main__":
    typer.run(main)

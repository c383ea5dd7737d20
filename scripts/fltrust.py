"""Regenerates Table III of FLTrust, and curves over what its numbers depend on.

    python scripts/fltrust.py table3 --dataset har_windows --out results/fltrust-har

Finished runs in the output folder are kept and not run again.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fedjax_sec import cli
from fedjax_sec import config as config_lib
from fedjax_sec.papers import fltrust

Item = StrEnum("Item", {name: name for name in (*fltrust.ITEMS, "all")})
Dataset = StrEnum("Dataset", {name: name for name in fltrust.DATASETS})
Scale = StrEnum("Scale", {name: name for name in fltrust.SCALES})
CONFIGS = Path(__file__).parents[1] / "configs" / "fltrust"


def main(
    items: Annotated[list[Item], typer.Argument(help="The table and curves, or all.")],
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    dataset: Annotated[Dataset, typer.Option(help="Data set.")],
    scale: Annotated[Scale, typer.Option(help="smoke, small (CPU), paper.")] = Scale.paper,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of every cell.")] = 3,
    override: Annotated[
        list[str] | None, typer.Option("--set", help="KEY.PATH=VALUE for every cell.")
    ] = None,
    data_dir: cli.DataDir = None,
) -> None:
    """Regenerate FLTrust's table and impact curves."""
    wanted = list(fltrust.ITEMS) if Item.all in items else [item.value for item in items]
    with cli.reported():
        plan = fltrust.Plan(dataset.value, scale.value, seeds, tuple(override or ()))
        base = config_lib.apply_overrides(
            config_lib.read_yaml(CONFIGS / f"{dataset.value}.yaml"), cli.data_overrides(data_dir)
        )
        written = fltrust.regenerate(plan, wanted, base, out, cli.run_with_progress)
    for path in written:
        if path.suffix == ".md":
            print(path.read_text())
    print("\n".join(str(path) for path in written))


if __name__ == "__main__":
    typer.run(main)

"""Regenerates the tables and figures of the robust learning rate paper.

    python scripts/rlr.py all --scale paper --out results/rlr

Finished runs in the output folder are kept and not run again.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fedjax_sec import cli
from fedjax_sec import config as config_lib
from fedjax_sec.papers import rlr

Item = StrEnum("Item", {name: name for name in (*rlr.ITEMS, "all")})
Scale = StrEnum("Scale", {name: name for name in rlr.SCALES})
NonIid = StrEnum("NonIid", {name: name for name in rlr.NON_IID})
CONFIGS = Path(__file__).parents[1] / "configs" / "rlr"


def main(
    items: Annotated[list[Item], typer.Argument(help="Tables and figures, or all.")],
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    scale: Annotated[Scale, typer.Option(help="smoke, small (CPU), paper.")] = Scale.paper,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of every cell.")] = 1,
    non_iid: Annotated[
        NonIid, typer.Option(help="Data of the non-IID half; the paper's is femnist_digits.")
    ] = NonIid.mnist_by_writer,
    override: Annotated[
        list[str] | None, typer.Option("--set", help="KEY.PATH=VALUE for every cell.")
    ] = None,
    data_dir: cli.DataDir = None,
) -> None:
    """Regenerate the robust learning rate paper's tables and figures."""
    wanted = list(rlr.ITEMS) if Item.all in items else [item.value for item in items]
    with cli.reported():
        plan = rlr.Plan(scale.value, seeds, non_iid.value, tuple(override or ()))
        bases = {
            setting: config_lib.apply_overrides(
                config_lib.read_yaml(CONFIGS / f"{plan.config(setting)}.yaml"),
                cli.data_overrides(data_dir),
            )
            for setting in rlr.SETTINGS
        }
        written = rlr.regenerate(plan, wanted, bases, out, cli.run_with_progress)
    for path in written:
        if path.suffix == ".md":
            print(path.read_text())
    print("\n".join(str(path) for path in written))


if __name__ == "__main__":
    typer.run(main)

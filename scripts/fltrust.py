"""Regenerates Table III of FLTrust, and curves over what its numbers depend on.

    python scripts/fltrust.py table3 --dataset har_windows --out results/fltrust-har

Finished runs in the output folder are kept and not run again.
"""

from typing import Annotated

import _common as common
import typer

from fedjax_sec import cli
from fedjax_sec.papers import fltrust

Item = common.choice("Item", (*fltrust.ITEMS, "all"))
Dataset = common.choice("Dataset", fltrust.DATASETS)
Scale = common.choice("Scale", fltrust.SCALES)


def main(
    items: Annotated[list[Item], common.ITEMS_HELP],
    out: common.Out,
    dataset: Annotated[Dataset, typer.Option(help="Data set.")],
    scale: Annotated[Scale, common.SCALE_HELP] = Scale.paper,
    seeds: common.Seeds = 3,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only these cells: 'ATTACK / DEFENSE', with * for any; repeatable."),
    ] = None,
    override: common.Override = None,
    data_dir: common.DataDir = None,
) -> None:
    """Regenerate FLTrust's table and impact curves."""
    wanted = common.asked(items, fltrust.ITEMS)
    with cli.reported():
        plan = fltrust.Plan(
            dataset.value, scale.value, seeds, tuple(override or ()), tuple(only or ())
        )
        base = common.experiment("fltrust", dataset.value, data_dir, override)
        written = fltrust.regenerate(plan, wanted, base, out, cli.run_with_progress)
    common.show(written)


if __name__ == "__main__":
    typer.run(main)

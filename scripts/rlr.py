"""Regenerates the tables and figures of the robust learning rate paper.

    python scripts/rlr.py all --scale paper --out results/rlr

Finished runs in the output folder are kept and not run again.
"""

from typing import Annotated

import _common as common
import typer

from fedjax_sec import cli
from fedjax_sec.papers import rlr

Item = common.choice("Item", (*rlr.ITEMS, "all"))
Scale = common.choice("Scale", rlr.SCALES)
NonIid = common.choice("NonIid", rlr.NON_IID)


def main(
    items: Annotated[list[Item], common.ITEMS_HELP],
    out: common.Out,
    scale: Annotated[Scale, common.SCALE_HELP] = Scale.paper,
    seeds: common.Seeds = 1,
    non_iid: Annotated[
        NonIid, typer.Option(help="Data of the non-IID half; the paper's is femnist_digits.")
    ] = NonIid.mnist_by_writer,
    override: common.Override = None,
    data_dir: common.DataDir = None,
) -> None:
    """Regenerate the robust learning rate paper's tables and figures."""
    wanted = common.asked(items, rlr.ITEMS)
    with cli.reported():
        plan = rlr.Plan(scale.value, seeds, non_iid.value, tuple(override or ()))
        bases = {
            setting: common.experiment("rlr", plan.config(setting), data_dir, override)
            for setting in rlr.SETTINGS
        }
        written = rlr.regenerate(plan, wanted, bases, out, cli.run_with_progress)
    common.show(written)


if __name__ == "__main__":
    typer.run(main)

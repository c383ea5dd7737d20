"""`fedjax-sec trigger` and `fedjax-sec partition`: pictures of a configuration."""

from pathlib import Path
from typing import Annotated

import typer

from fedjax_sec.cli.common import Config, DataDir, Overrides, app, console, data_overrides, reported
from fedjax_sec.core import files


@app.command()
def trigger(
    config: Config,
    overrides: Overrides = None,
    *,
    out: Annotated[Path, typer.Option(help="File for the picture (PNG, and PDF beside it).")],
    count: Annotated[int, typer.Option(min=1, max=20, help="Test images to show.")] = 4,
    data_dir: DataDir = None,
) -> None:
    """Draw what a backdoor does to test images, and each malicious client's part of it."""
    from fedjax_sec.report import inspection, plotting
    from fedjax_sec.runs import config as config_lib
    from fedjax_sec.runs.source import load_source

    with reported():
        spec = config_lib.apply_overrides(config_lib.read_yaml(config), overrides or ())
        experiment = config_lib.from_mapping(spec, data_overrides(data_dir, overrides or ()))
        files.check_writable(out.absolute().parent)
        pictures = inspection.backdoor_pictures(experiment, count)
        title = f"{experiment.backdoor.registered_name}, {load_source(experiment).label}"
        paths = plotting.trigger_pictures(pictures, title, out)
    console.print(f"Picture: {paths[0]}", soft_wrap=True)


@app.command()
def partition(
    config: Config,
    overrides: Overrides = None,
    *,
    out: Annotated[Path, typer.Option(help="File for the picture (PNG, and PDF beside it).")],
    data_dir: DataDir = None,
) -> None:
    """Draw how many examples of each class every client holds, and the server if it holds any."""
    from fedjax_sec.report import inspection, plotting
    from fedjax_sec.runs import config as config_lib
    from fedjax_sec.runs.source import load_source

    with reported():
        spec = config_lib.apply_overrides(config_lib.read_yaml(config), overrides or ())
        experiment = config_lib.from_mapping(spec, data_overrides(data_dir, overrides or ()))
        files.check_writable(out.absolute().parent)
        holdings = inspection.class_table(experiment)
        kind = experiment.data.partition.registered_name
        title = f"{kind}, {load_source(experiment).label}, seed {experiment.seed}"
        paths = plotting.class_table(holdings, title, out)
    console.print(f"Picture: {paths[0]}", soft_wrap=True)

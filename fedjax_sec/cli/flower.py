"""`fedjax-sec flower`: experiments with real clients, by Flower."""

from pathlib import Path
from typing import Annotated

import typer

from fedjax_sec.cli.common import (
    Config,
    DataDir,
    Out,
    Overrides,
    app,
    console,
    data_option,
    data_overrides,
    import_options,
    imported,
    interruptible,
    reported,
)
from fedjax_sec.core import plugins
from fedjax_sec.core.optional import require

group = typer.Typer(no_args_is_help=True, add_completion=False)


@group.callback()
def flower() -> None:
    """Run an experiment with real clients over a network, by Flower."""


app.add_typer(group, name="flower")

Timeout = Annotated[float, typer.Option(help="Seconds that a round waits for its clients.")]
Quorum = Annotated[
    int | None,
    typer.Option(min=1, help="Fewest clients of a finished round (the defence's bound)."),
]


def _experiment(ctx: typer.Context, config: Path, overrides, data_dir: Path | None):
    from fedjax_sec.runs import config as config_lib

    require("flwr", "fedjax-sec flower")
    spec = config_lib.apply_overrides(config_lib.read_yaml(config), overrides or ())
    if imports := imported(ctx):
        spec["imports"] = plugins.joined(spec.get("imports"), imports)
    return config_lib.from_mapping(spec, data_overrides(data_dir, overrides or ()))


@group.command()
def run(
    ctx: typer.Context,
    config: Config,
    overrides: Overrides = None,
    *,
    out: Out,
    nodes: Annotated[int, typer.Option(min=1, help="SuperNodes that share the clients.")] = 2,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in OUT.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in OUT.")] = False,
    timeout: Timeout = 600.0,
    quorum: Quorum = None,
    data_dir: DataDir = None,
) -> None:
    """Run it on processes of this machine: a SuperLink, SuperNodes, and the rounds."""
    out = out.absolute()
    again = ["fedjax-sec", "flower", "run", str(config), *(overrides or ()), "--out", str(out)]
    again += ["--nodes", str(nodes), "--resume", *data_option(data_dir)]
    with reported(), interruptible([*again, *import_options(imported(ctx))]):
        experiment = _experiment(ctx, config, overrides, data_dir)
        from fedjax_sec.flower.figures import write_trace
        from fedjax_sec.flower.loopback import deploy

        result = deploy(
            experiment,
            out=out,
            nodes=nodes,
            resume=resume,
            overwrite=overwrite,
            timeout=timeout,
            quorum=quorum,
        )
        written = write_trace(out)
    headline = result.summary["headline"]
    value = result.summary["final"][headline]
    rounds = int(result.metrics["round"][-1])
    console.print(f"{headline.replace('_', ' ')} {100 * value:.1f}% after {rounds} rounds")
    for path in written:
        console.print(str(path), soft_wrap=True)


@group.command("app")
def write(
    ctx: typer.Context,
    config: Config,
    overrides: Overrides = None,
    *,
    app_dir: Annotated[Path, typer.Option("--app", help="Folder for the app.")],
    out: Annotated[Path, typer.Option(help="Folder for the results, on the server's machine.")],
    timeout: Timeout = 600.0,
    quorum: Quorum = None,
    data_dir: DataDir = None,
) -> None:
    """Write the experiment as a Flower app, for `flwr run`."""
    with reported():
        experiment = _experiment(ctx, config, overrides, data_dir)
        from fedjax_sec.flower.folder import write_app

        folder = write_app(experiment, app_dir, out, timeout=timeout, quorum=quorum)
    console.print(f"flwr run {folder} SUPERLINK --stream", soft_wrap=True)


@group.command()
def trace(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of a deployed run.")],
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in the picture, the last ones.")] = 2,
) -> None:
    """Write the times of its rounds: trace.json, for ui.perfetto.dev, and a picture."""
    with reported():
        from fedjax_sec.flower.figures import write_trace

        written = write_trace(out, rounds)
    for path in written:
        console.print(str(path), soft_wrap=True)

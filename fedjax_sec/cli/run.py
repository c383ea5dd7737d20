"""`fedjax-sec run`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from fedjax_sec.cli.common import (
    Config,
    DataDir,
    Log,
    Out,
    Overrides,
    app,
    console,
    data_option,
    data_overrides,
    errors,
    import_options,
    imported,
    interruptible,
    log_options,
    reported,
)
from fedjax_sec.core import ConfigError, distributed, plugins, suggestion
from fedjax_sec.core.advice import shown
from fedjax_sec.core.registry import headline_in


@app.command()
def run(
    ctx: typer.Context,
    config: Config,
    overrides: Overrides = None,
    *,
    out: Out,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in OUT.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in OUT.")] = False,
    data_dir: DataDir = None,
    log: Log = None,
    profile: Annotated[
        Path | None, typer.Option(help="Folder for a JAX profiler trace of some rounds.")
    ] = None,
    coordinator: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Of the first of several processes that compute each round together.",
        ),
    ] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="How many there are.")] = None,
    process: Annotated[int | None, typer.Option(min=0, help="The number of this one.")] = None,
    together: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What starts the processes: slurm (this command under srun is one of them), or "
            "ray; with fields, '{name: ray, gpus: 1}'.",
        ),
    ] = None,
) -> None:
    """Run one experiment."""
    from fedjax_sec import api, progress
    from fedjax_sec.runs import config as config_lib
    from fedjax_sec.runs import loggers

    out, imports = out.absolute(), imported(ctx)
    numbers = {"coordinator": coordinator, "processes": processes, "process": process}
    again = ["fedjax-sec", "run", str(config), *(overrides or ()), "--out", str(out), "--resume"]
    again += [*data_option(data_dir), *import_options(imports), *log_options(log)]
    with reported():
        starter = _starter(together, **numbers)
        if starter is not None:
            again += ["--together", together]
            again += [] if processes is None else ["--processes", str(processes)]
        elif together is not None or any(one is not None for one in numbers.values()):
            distributed.start(**numbers)
    with reported(), interruptible(again):
        if resume and overwrite:
            raise ConfigError("Give --resume or --overwrite, not both.")
        spec = config_lib.apply_overrides(config_lib.read_yaml(config), overrides or ())
        spec = loggers.with_more(spec, log, "--log")
        if imports:  # the run's folder says what it needs
            spec["imports"] = plugins.joined(spec.get("imports"), imports)
        experiment = config_lib.from_mapping(spec, data_overrides(data_dir, overrides or ()))
        with progress.choose(errors) as display:
            watch = progress.OfRun(display, experiment.rounds)
            result = api.run(
                experiment,
                out=out,
                resume=resume,
                overwrite=overwrite,
                on_evaluation=watch,
                profile=profile,
                together=starter,
            )
            watch.end()
    if distributed.leads():
        _print_summary(result, out)


def _starter(
    together: str | None, coordinator: str | None, processes: int | None, process: int | None
):
    """What starts the processes; None where something else started this one, or it is alone.

    Raises: `ConfigError` for names and fields that are none, and options that contradict.
    """
    from fedjax_sec.runs.config import parse_override
    from fedjax_sec.runs.together import STARTERS, build_starter

    if together is None:
        if processes is not None and coordinator is process is None:
            raise ConfigError(
                f"--processes {processes} needs --coordinator and --process, where each process is "
                f"started by hand, or --together ray, which starts them."
            )
        return None
    spec = parse_override(f"together={together}")[1]
    name = spec.get("name") if isinstance(spec, Mapping) else spec
    known = ("slurm", *STARTERS)
    if isinstance(name, str) and name not in known:
        raise ConfigError(
            f"--together: unknown name {name!r}.{suggestion(name, known)} Known: "
            f"{', '.join(known)}."
        )
    given = {"--coordinator": coordinator, "--process": process}
    if name == "slurm":
        if isinstance(spec, Mapping) and len(spec) > 1:
            raise ConfigError(f"--together slurm has no fields, got {shown(spec)}.")
        given["--processes"] = processes
    for option, value in given.items():
        if value is not None:
            raise ConfigError(
                f"{option} {value} contradicts --together {name}, which says it; leave one of the "
                f"two out."
            )
    return None if name == "slurm" else build_starter(spec, processes, "--together")


def _print_summary(result, out) -> None:
    summary = result.summary
    table = Table(title=f"{summary['data']['label']}, {int(result.metrics['round'][-1])} rounds")
    table.add_column("metric")
    table.add_column("final", justify="right")
    for name, value in summary["final"].items():
        if name != "round":
            table.add_row(name, "" if value is None else f"{value:.4g}")
    best = summary["best"]
    headline = headline_in(best)
    name = headline.replace("_", " ")
    table.add_row(f"best {name} (round {best['round']:.0f})", f"{best[headline]:.4g}")
    table.add_row("rounds per second", f"{summary['rounds_per_second'] or float('nan'):.1f}")
    table.add_row("compile seconds", f"{summary['compile_seconds']:.1f}")
    at_once, devices = summary["layout"].values()
    table.add_row("clients side by side", f"{at_once} on {devices} device(s)")
    tuning = summary["tuning"]
    if tuning["convolution"]:
        table.add_row("convolutions as", tuning["convolution"])
    table.add_row("chosen by", "measurement" if tuning["milliseconds"] else "rule")
    console.print(table)
    for warning in summary.get("warnings", ()):
        console.print(f"[bold yellow]Warning:[/] {escape(warning)}")
    console.print(f"Results: {out}", soft_wrap=True)

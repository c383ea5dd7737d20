"""The `fedjax-sec` command: thin; everything it does is a call into the package."""

import contextlib
import inspect
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fedjax_sec import core
from fedjax_sec.core import ConfigError, files, registry

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Attacks and defences in federated learning, batched and compiled.",
)
console = Console()
errors = Console(stderr=True)

Config = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The experiment.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Changes to it.")
]
Out = Annotated[Path, typer.Option(help="Folder for the results.")]
DataDir = Annotated[
    Path | None, typer.Option(help="Folder of prepared tensorflow-datasets (data.data_dir).")
]


@contextlib.contextmanager
def reported():
    """Prints a bad configuration, or a file that cannot be used, as a message, not a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        text = files.describe(error) if isinstance(error, OSError) else str(error)
        errors.print(f"[bold red]Error:[/] {escape(text)}", soft_wrap=True)
        raise typer.Exit(2) from None


class _Terminated(BaseException):
    """SIGTERM, to be passed through as KeyboardInterrupt is."""


@contextlib.contextmanager
def interruptible(command: Sequence[str]) -> Iterator[None]:
    """Ends on SIGINT and SIGTERM with the command that goes on; exit status 130 and 143."""

    def terminate(number, frame):
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except (KeyboardInterrupt, _Terminated) as reason:
        number = signal.SIGTERM if isinstance(reason, _Terminated) else signal.SIGINT
        text = f"Stopped by {number.name}; what is done is kept. To go on: {shlex.join(command)}"
        errors.print(text, markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(128 + number) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
        console=errors,
        disable=not errors.is_terminal,
    )


def _status(rows) -> str:
    accuracy = sum(row["accuracy"] for row in rows) / len(rows)
    return f"accuracy {100 * accuracy:.1f}%"


def data_overrides(data_dir: Path | None) -> dict:
    """What `--data-dir` changes in an experiment; it wins over the file and the environment."""
    return {} if data_dir is None else {"data.data_dir": str(data_dir)}


def _data_option(data_dir: Path | None) -> list[str]:
    return [] if data_dir is None else ["--data-dir", str(data_dir)]


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    *,
    out: Out,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in OUT.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in OUT.")] = False,
    data_dir: DataDir = None,
    profile: Annotated[
        Path | None, typer.Option(help="Folder for a JAX profiler trace of some rounds.")
    ] = None,
) -> None:
    """Run one experiment."""
    from fedjax_sec import api
    from fedjax_sec.runs import config as config_lib

    out = out.absolute()
    again = ["fedjax-sec", "run", str(config), *(overrides or ()), "--out", str(out), "--resume"]
    with reported(), interruptible([*again, *_data_option(data_dir)]):
        if resume and overwrite:
            raise ConfigError("Give --resume or --overwrite, not both.")
        spec = config_lib.apply_overrides(config_lib.read_yaml(config), overrides or ())
        experiment = config_lib.from_mapping(spec, data_overrides(data_dir))
        with _progress() as progress:
            task = progress.add_task("rounds", total=experiment.rounds, status="compiling")

            def show(done, rows):
                progress.update(task, completed=done, status=_status(rows))

            result = api.run(
                experiment,
                out=out,
                resume=resume,
                overwrite=overwrite,
                on_evaluation=show,
                profile=profile,
            )
    _print_summary(result, out)


def _print_summary(result, out) -> None:
    summary = result.summary
    table = Table(title=f"{summary['data']['label']}, {int(result.metrics['round'][-1])} rounds")
    table.add_column("metric")
    table.add_column("final", justify="right")
    for name, value in summary["final"].items():
        if name != "round":
            table.add_row(name, "" if value is None else f"{value:.4g}")
    best = summary["best"]
    table.add_row(f"best accuracy (round {best['round']:.0f})", f"{best['accuracy']:.4g}")
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


@app.command()
@reported()
def sweep(
    config: Annotated[Path, typer.Argument(metavar="SWEEP.yaml", help="The sweep.")],
    overrides: Overrides = None,
    *,
    out: Out,
    data_dir: DataDir = None,
) -> None:
    """Run a sweep; what is finished in OUT is kept and not run again."""
    from fedjax_sec import sweeps as sweep_lib
    from fedjax_sec.report import plotting
    from fedjax_sec.report import tables as tables_lib

    out = out.absolute()
    again = ["fedjax-sec", "sweep", str(config), *(overrides or ()), "--out", str(out)]
    again += _data_option(data_dir)
    settings, cells = sweep_lib.load(config, overrides or (), data_overrides(data_dir))
    found = run_with_progress(cells, out, at_once=settings.at_once, again=again)
    frame, axes = tables_lib.to_frame(cells, found), tables_lib.axes_of(cells)
    frame.to_csv(out / "runs.csv", index=False)
    tables_lib.summarized(frame, axes).to_csv(out / "table.csv", index=False)
    tables = list(tables_lib.tables(cells, found).values())
    texts = [f"### {head}\n\n{said}\n\n{table.to_markdown()}\n" for head, said, table in tables]
    (out / "table.md").write_text("\n".join(texts))
    heading, _, table = tables[0]
    _print_table(table, heading)
    for warning in tables_lib.warnings_of(cells, found):
        console.print(f"[bold yellow]Warning:[/] {escape(warning)}", soft_wrap=True)
    groups: dict = {}
    for cell, result in zip(cells, found, strict=True):
        first, *rest = cell.parts
        groups.setdefault(first, {}).setdefault(" / ".join(rest) or "run", []).append(result)
    lines = [f"{tables_lib.data_of(found)}; {plotting.band_of(frame['seed'].nunique())}"]
    lines = [settings.title, *lines] if settings.title else lines
    paths = plotting.grid_of_curves(groups, lines, out / "accuracy")
    console.print(f"Tables: {out / 'table.md'}\nFigure: {paths[0]}", soft_wrap=True)


def run_with_progress(
    cells, out: Path, at_once: int | None = None, again: Sequence[str] | None = None
):
    """`sweep.run_cells` with a progress bar on stderr (plain lines when it is no terminal).

    `again` is the command that goes on after an interruption (None: this one).
    """
    from fedjax_sec import sweeps as sweep_lib

    with interruptible(again or ["python", *sys.argv]), _progress() as progress:

        def on_group(number, total, members):
            rounds = members[0].experiment.rounds
            names = ", ".join(dict.fromkeys(cell.title for cell in members))
            text = f"group {number + 1}/{total}: {names}"
            if progress.disable:
                errors.print(f"{text} ({len(members)} runs)", soft_wrap=True)
            task = progress.add_task(text[:60], total=rounds, status="compiling")
            return lambda done, rows: progress.update(task, completed=done, status=_status(rows))

        def on_wait(left):
            text = f"waiting for {len(left)} runs of other processes"
            if progress.disable:
                errors.print(text)
            progress.add_task(text, total=None, status="")

        return sweep_lib.run_cells(cells, out, at_once=at_once, on_group=on_group, on_wait=on_wait)


def _print_table(frame, title: str) -> None:
    table = Table(title=title)
    table.add_column(str(frame.index.name or ""))
    for column in frame.columns:
        table.add_column(str(column), justify="right", overflow="fold")
    for name, row in frame.iterrows():
        table.add_row(str(name), *(str(value) for value in row))
    console.print(table)


@app.command("list")
def list_(
    kind: Annotated[
        str | None, typer.Argument(help="attacks, defenses, datasets, models, ...")
    ] = None,
) -> None:
    """List the components that a configuration can name."""
    kinds = {f"{name}s": found for name, found in registry.KINDS.items()}
    with reported():
        if kind is not None and kind not in kinds:
            raise ConfigError(
                f"Unknown kind {kind!r}.{core.suggestion(kind, kinds)} Known: {', '.join(kinds)}."
            )
    for name, found in kinds.items():
        if kind in (None, name):
            table = Table(title=name, title_justify="left", show_header=False, box=None)
            for entry in found.names():
                table.add_row(f"[bold]{entry}[/]", escape(registry.summary(found.get(entry))))
            console.print(table)


@app.command()
def show(
    name: Annotated[
        str, typer.Argument(help="A component, a section (data, sweep, ...) or an optimizer.")
    ],
) -> None:
    """Show a component, a section or an optimizer: what it does, its fields and their ranges."""
    from fedjax_sec.core import optimizers
    from fedjax_sec.report import keys

    functions = optimizers.OPTIMIZERS | optimizers.SCHEDULES
    if name in keys.SECTIONS:
        _print_fields(f"[bold]{name}[/] (section)", keys.SECTIONS[name], keys)
        return
    if name in ("optimizer", "optimizers"):
        for title, found in (
            ("optimizers", optimizers.OPTIMIZERS),
            ("schedules of a learning rate", optimizers.SCHEDULES),
        ):
            table = Table(title=title, title_justify="left", show_header=False, box=None)
            for entry in sorted(found):
                table.add_row(f"[bold]{entry}[/]", ", ".join(r.key for r in keys.arguments(entry)))
            console.print(table)
        return
    with reported():
        if name not in functions:
            registry.find(name, (*functions, *keys.SECTIONS, "optimizer"))
    for found in registry.KINDS.values():
        if name in found.names():
            _print_fields(f"[bold]{name}[/] ({found.kind})", found.get(name), keys)
    if name in functions:
        kind = "optimizer" if name in optimizers.OPTIMIZERS else "schedule of a learning rate"
        console.print(f"[bold]{name}[/] ({kind}), optax.{name}\n")
        _print_rows(keys.arguments(name))


def _print_fields(title: str, cls, keys) -> None:
    console.print(f"{title}\n")
    console.print(inspect.getdoc(cls), markup=False, highlight=False, soft_wrap=True)
    console.print()
    _print_rows(keys.fields(cls))


def _print_rows(rows) -> None:
    if not rows:
        console.print("No fields.")
        return
    table = Table(title="Fields", title_justify="left")
    for column in ("field", "default", "allowed", "swept", "meaning"):
        table.add_column(column, overflow="fold", no_wrap=column == "field")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


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
    from fedjax_sec.runs.prepare import load_source

    with reported():
        spec = config_lib.apply_overrides(config_lib.read_yaml(config), overrides or ())
        experiment = config_lib.from_mapping(spec, data_overrides(data_dir))
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
    from fedjax_sec.runs.prepare import load_source

    with reported():
        spec = config_lib.apply_overrides(config_lib.read_yaml(config), overrides or ())
        experiment = config_lib.from_mapping(spec, data_overrides(data_dir))
        files.check_writable(out.absolute().parent)
        holdings = inspection.class_table(experiment)
        kind = experiment.data.partition.registered_name
        title = f"{kind}, {load_source(experiment).label}, seed {experiment.seed}"
        paths = plotting.class_table(holdings, title, out)
    console.print(f"Picture: {paths[0]}", soft_wrap=True)


@app.command()
def audit(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    surrogate: Annotated[
        Path | None, typer.Option(help="Finished run whose model transfer attacks are made on.")
    ] = None,
    eps: Annotated[
        float | None, typer.Option(help="Radius in pixels (default: the run's own training's).")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Test examples to attack.")] = 500,
    steps: Annotated[int, typer.Option(min=1, help="PGD's steps.")] = 40,
    restarts: Annotated[int, typer.Option(min=1, help="PGD's restarts.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Markdown file for the report.")] = None,
) -> None:
    """Say whether a run's robustness is believable, overstated, or due to masked gradients."""
    from fedjax_sec.report.audit import audit as look

    with reported():
        if out is not None:
            files.check_writable(out.absolute().parent)
        found = look(
            run_dir, surrogate=surrogate, eps=eps, images=images, steps=steps, restarts=restarts
        )
        text = found.to_markdown()
        print(text, end="")
        if out is not None:
            files.write_atomically(out, f"# Audit of {run_dir.name}\n\n{text}")


@app.command()
def bench(
    suite: Annotated[
        str, typer.Argument(help="aggregators, memory, rounds, scaling or fixed.")
    ] = "aggregators",
    *,
    out: Annotated[Path, typer.Option(help="JSON file for the results.")],
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only this rule, or these rounds (words of their names), or this axis."),
    ] = None,
    size: Annotated[
        list[str] | None, typer.Option(metavar="K,D", help="Clients and parameters of a stack.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=3, help="Timed calls of everything.")] = 7,
    with_peers: Annotated[
        bool, typer.Option("--peers/--no-peers", help="Time the peers too, where installed.")
    ] = True,
    data_dir: DataDir = None,
) -> None:
    """Time ourselves beside peers and the machine's limit."""
    from fedjax_sec.bench import SUITES, peers, report, timing

    with reported():
        if suite not in SUITES:
            raise ConfigError(
                f"Unknown benchmark {suite!r}.{core.suggestion(suite, SUITES)} "
                f"Known: {', '.join(SUITES)}."
            )
        shapes = [_shape(text) for text in size or ()]
        if shapes and suite not in ("aggregators", "memory"):
            raise ConfigError(
                f"--size belongs to the benchmarks 'aggregators' and 'memory', not to {suite!r}."
            )
        chosen = SUITES[suite]
        known = chosen.names()
        for name in only or ():
            if not any(name in one for one in known):
                raise ConfigError(
                    f"--only: unknown {name!r}.{core.suggestion(name, known)} "
                    f"Known: {', '.join(known)}."
                )
        if with_peers and (absent := peers.missing()):
            errors.print(f"Not installed, so not compared with: {', '.join(absent)}.")
        files.check_writable(out.absolute().parent)
        rates = timing.measure_machine()
        folder = None if data_dir is None else str(data_dir)
        rows = []
        for row in chosen.run(rates, tuple(only or ()), repeats, with_peers, folder, shapes):
            rows.append(row)  # written at once: a long benchmark that is stopped keeps what it has
            report.write(out, "fedjax-sec " + shlex.join(sys.argv[1:]), rates, rows)
    print(report.table(rows))
    console.print(
        f"Product {rates.flops / 1e9:.0f} GFLOP/s, copy {rates.bytes / 1e9:.1f} GB/s. "
        f"Results: {out}",
        soft_wrap=True,
    )


def _shape(text: str) -> tuple[int, int]:
    clients, _, dim = text.partition(",")
    if not (clients.strip().isdigit() and dim.strip().isdigit()) or int(clients) < 4:
        raise ConfigError(f"--size must be K,D such as 51,80000 with K >= 4, got {text!r}.")
    return int(clients), int(dim)


def main() -> None:
    """Entry point of the console command."""
    if len(sys.argv) > 1 and sys.argv[1] == "--version":
        from fedjax_sec import __version__

        console.print(__version__)
        return
    app()


__all__ = ["app", "main", "run_with_progress"]

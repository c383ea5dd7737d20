"""Shared parts of the commands: options, progress, errors and interruptions."""

import contextlib
import functools
import inspect
import shlex
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedjax_sec.core import ConfigError, files, plugins
from fedjax_sec.runs import config as config_lib


def _import(ctx: typer.Context, given: list[str] | None) -> list[str]:
    """Imports what `--import` names, before the command looks a component up."""
    with reported():
        named = plugins.import_all(given or [], "--import")
    known = ctx.meta.setdefault(plugins.GROUP, [])
    known += [one for one in named if one not in known]
    return named


Imports = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        metavar="MODULE_OR_FILE.py",
        callback=_import,
        help="Components of your own; repeatable.",
    ),
]


def imported(ctx: typer.Context) -> list[str]:
    """The command line's imports, before the command and behind it, files by absolute paths."""
    return list(ctx.meta.get(plugins.GROUP, ()))


class _App(typer.Typer):
    """An application each command of which has the option `--import`."""

    def command(self, *args, **kwargs):
        register = super().command(*args, **kwargs)

        def add(function):
            @functools.wraps(function)
            def command(*args, imports=None, **kwargs):
                return function(*args, **kwargs)

            signature = inspect.signature(function)
            option = inspect.Parameter(
                "imports", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Imports
            )
            command.__annotations__ = {**function.__annotations__, "imports": Imports}
            command.__signature__ = signature.replace(
                parameters=[*signature.parameters.values(), option]
            )
            register(command)
            return function

        return add


app = _App(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Attacks and defences in federated learning, batched and compiled.",
)
console = Console()
errors = Console(stderr=True)


@app.callback()
def _everywhere(imports: Imports = None) -> None:
    """Attacks and defences in federated learning, batched and compiled."""


Config = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The experiment.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Changes to it.")
]
Out = Annotated[Path, typer.Option(help="Folder for the results.")]
Log = Annotated[
    list[str] | None,
    typer.Option(
        metavar="LOGGER",
        help="tensorboard or wandb, beside the results; repeatable, or separated by commas.",
    ),
]
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


@contextlib.contextmanager
def interruptible(command: Sequence[str]) -> Iterator[None]:
    """Ends on SIGINT and SIGTERM with the command that goes on; exit status 130 and 143."""
    seen = [signal.SIGINT]

    def terminate(number, frame):
        seen.append(signal.Signals(number))
        raise KeyboardInterrupt  # which libraries let through: in Ray's calls others get lost

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt:
        number = seen[-1]
        text = f"Stopped by {number.name}; what is done is kept. To go on: {shlex.join(command)}"
        errors.print(text, markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(128 + number) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def data_overrides(data_dir: Path | None, overrides: Sequence[str] = ()) -> dict:
    """What `--data-dir` changes in an experiment; it wins over the file and the environment.

    Raises: `ConfigError` where one of the `overrides` names another place of the data.

    >>> data_overrides(Path("data"), ["rounds=3"])
    {'data.data_dir': 'data'}
    """
    if data_dir is None:
        return {}
    for text in overrides:
        spec = config_lib.apply_overrides({}, [text])
        # An experiment's own key, or one of the keys of a sweep that hold such keys.
        for part in (spec, spec.get("overrides"), spec.get("experiment")):
            part = config_lib.apply_overrides({}, part) if isinstance(part, Mapping) else {}
            if isinstance(part.get("data"), Mapping) and "data_dir" in part["data"]:
                raise ConfigError(
                    f"--data-dir {data_dir} and the override {text!r} both say where the data "
                    f"lies; leave one of the two out."
                )
    return {"data.data_dir": str(data_dir)}


def data_option(data_dir: Path | None) -> list[str]:
    return [] if data_dir is None else ["--data-dir", str(data_dir)]


def log_options(given: Sequence[str] | None) -> list[str]:
    """The options of a command that logs the same."""
    return [part for one in given or () for part in ("--log", one)]


def import_options(imports: Sequence[str]) -> list[str]:
    """The options of a command that imports the same."""
    return [part for one in imports for part in ("--import", one)]


def print_table(frame, title: str) -> None:
    table = Table(title=title)
    table.add_column(str(frame.index.name or ""))
    for column in frame.columns:
        table.add_column(str(column), justify="right", overflow="fold")
    for name, row in frame.iterrows():
        table.add_row(str(name), *(str(value) for value in row))
    console.print(table)

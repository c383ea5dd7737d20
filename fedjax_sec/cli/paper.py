"""`fedjax-sec paper NAME ITEM...`; `scripts/NAME.py` is the same command."""

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperCommand, TyperGroup

from fedjax_sec.cli.common import DataDir, Out, app, data_overrides, reported
from fedjax_sec.cli.sweep import LauncherOption, WorkersOption, launcher_of, run_with_progress

if TYPE_CHECKING:
    from fedjax_sec.report.paper import Option, Paper


class _Papers(TyperGroup):
    """A command a paper; a paper's module is imported when its command is asked for."""

    def list_commands(self, ctx: typer.Context) -> list[str]:
        from fedjax_sec import papers

        return papers.names()

    def get_command(self, ctx: typer.Context, cmd_name: str) -> TyperCommand:
        from fedjax_sec import papers

        with reported():
            return command(papers.find(cmd_name))


group = typer.Typer(cls=_Papers, no_args_is_help=True, add_completion=False)


@group.callback()
def paper() -> None:
    """Regenerate a paper's tables and figures; what is finished in OUT is kept."""


app.add_typer(group, name="paper")


def run(name: str) -> None:
    """The command of one paper as a program by itself."""
    from fedjax_sec import papers

    command(papers.find(name))()


def command(paper: "Paper") -> TyperCommand:
    """The command of a paper: its items, the options that all papers have, and its own."""
    program = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    program.command(name=paper.name)(_function(paper))
    return typer.main.get_command(program)


def _function(paper: "Paper") -> Callable[..., None]:
    """The function behind a paper's command, with the signature from which options are made."""

    def regenerate(
        items, out, scale, seeds, only, override, data_dir, launcher, workers, **options
    ) -> None:
        from fedjax_sec.report import paper as engine

        asked = [item.value for item in items]
        with reported():
            plan = paper.plan(
                scale.value,
                seeds,
                override or (),
                only or (),
                **{name: _plain(value) for name, value in options.items()},
            )
            written = engine.regenerate(
                paper,
                plan,
                list(paper.items) if "all" in asked else asked,
                out,
                run=functools.partial(
                    run_with_progress, again=_again(), launcher=launcher_of(launcher, workers)
                ),
                files=engine.Files(paper, data_overrides(data_dir, override or ())),
            )
        _show(written)

    regenerate.__doc__ = f"Regenerate the tables and figures of {paper.title}."
    regenerate.__signature__ = inspect.Signature(_parameters(paper))
    return regenerate


def _parameters(paper: "Paper") -> list[inspect.Parameter]:
    from fedjax_sec.report.paper import SCALES

    def parameter(name, annotation, default=inspect.Parameter.empty):
        keyword = inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(name, keyword, default=default, annotation=annotation)

    scale = _choice("Scale", SCALES)
    return [
        parameter(
            "items",
            Annotated[
                list[_choice("Item", (*paper.items, "all"))],
                typer.Argument(help="Tables and figures, or all."),
            ],
        ),
        parameter("out", Out),
        *(parameter(option.name, *_option(option)) for option in paper.options),
        parameter(
            "scale",
            Annotated[scale, typer.Option(help="smoke, small (CPU), paper.")],
            scale("paper"),
        ),
        parameter(
            "seeds", Annotated[int, typer.Option(min=1, help="Seeds of every row.")], paper.seeds
        ),
        parameter(
            "only",
            Annotated[
                list[str] | None,
                typer.Option(
                    help="Only these rows: ROW, or ROW / COLUMN where a table has columns, with * "
                    "for any text; repeatable."
                ),
            ],
            None,
        ),
        parameter(
            "override",
            Annotated[
                list[str] | None,
                typer.Option(
                    "--set",
                    help="KEY.PATH=VALUE for every row. It wins: file < scale < row < --set, as "
                    "captions say.",
                ),
            ],
            None,
        ),
        parameter("data_dir", DataDir, None),
        parameter("launcher", LauncherOption, None),
        parameter("workers", WorkersOption, None),
    ]


def _option(option: "Option") -> tuple:
    """The annotation and the default of one of a paper's options."""
    kind = _choice(option.name.title().replace("_", ""), option.values)
    said = typer.Option(help=option.help)
    if option.many:
        return Annotated[list[kind] | None, said], None
    if option.default is None:
        return (Annotated[kind, said],)
    return Annotated[kind, said], kind(option.default)


def _choice(name: str, values: Sequence[str]) -> type[StrEnum]:
    """An option's type for typer."""
    return StrEnum(name, {value: value for value in values})


def _plain(value):
    """The text of a choice, or of several; None where nothing was given."""
    if isinstance(value, list):
        return tuple(one.value for one in value) or None
    return value if value is None else value.value


def _again() -> list[str]:
    """This command, to be typed again."""
    program = Path(sys.argv[0])
    name = ["python", str(program)] if program.suffix == ".py" else [program.name]
    return [*name, *sys.argv[1:]]


def _show(written: Sequence[Path]) -> None:
    """Prints the tables, and where everything is."""
    for path in written:
        if path.suffix == ".md":
            typer.echo(path.read_text())
    typer.echo("\n".join(map(str, written)))

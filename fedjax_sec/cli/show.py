"""`fedjax-sec list` and `fedjax-sec show`."""

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from fedjax_sec import core
from fedjax_sec.cli.common import app, console, reported
from fedjax_sec.core import ConfigError, registry


@app.command("list")
def list_(
    kind: Annotated[
        str | None, typer.Argument(help="attacks, defenses, datasets, models, ...")
    ] = None,
) -> None:
    """List the components that a configuration can name."""
    kinds = {f"{name}s": known for name, known in registry.KINDS.items()}
    with reported():
        if kind is not None and kind not in kinds:
            raise ConfigError(
                f"Unknown kind {kind!r}.{core.suggestion(kind, kinds)} Known: {', '.join(kinds)}."
            )
    for name, known in kinds.items():
        if kind in (None, name):
            table = Table(title=name, title_justify="left", show_header=False, box=None)
            for entry in known.names():
                table.add_row(f"[bold]{entry}[/]", escape(registry.summary(known.get(entry))))
            if not known.names():
                table.add_row("none yet; one of your own comes in by --import")
            console.print(table)


@app.command()
def show(
    name: Annotated[
        str, typer.Argument(help="A component, a section (data, sweep, ...) or an optimizer.")
    ],
) -> None:
    """Show a component, a section or an optimizer: what it does, its fields and their ranges."""
    from fedjax_sec.core import optimizers
    from fedjax_sec.report import described, keys

    if name in ("optimizer", "optimizers"):
        for title, known in (
            ("optimizers", optimizers.OPTIMIZERS),
            ("schedules of a learning rate", optimizers.SCHEDULES),
        ):
            table = Table(title=title, title_justify="left", show_header=False, box=None)
            for entry in sorted(known):
                table.add_row(f"[bold]{entry}[/]", ", ".join(r.key for r in keys.arguments(entry)))
            console.print(table)
        return
    with reported():
        for one in described.every(name):
            _print_description(one)


def _print_description(one) -> None:
    if one.text == f"optax.{one.name}":
        console.print(f"[bold]{one.name}[/] ({one.kind}), {one.text}\n")
    else:
        console.print(f"[bold]{one.name}[/] ({one.kind})\n")
        console.print(one.text, markup=False, highlight=False, soft_wrap=True)
        console.print()
    _print_rows(one.rows)


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

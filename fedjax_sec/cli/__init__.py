"""The `fedjax-sec` command: thin; everything it does is a call into the package."""

import sys

from fedjax_sec.cli import (  # entered
    arena,
    audit,
    bench,
    certify,
    demo,
    draw,
    export,
    flower,
    import_fedml,
    paper,
    plan,
    reconstruct,
    report,
    run,
    show,
    status,
    sweep,
)
from fedjax_sec.cli.common import (
    DataDir,
    Out,
    app,
    console,
    data_overrides,
    errors,
    interruptible,
    reported,
)
from fedjax_sec.cli.sweep import run_with_progress


def main() -> None:
    """Entry point of the console command."""
    if len(sys.argv) > 1 and sys.argv[1] == "--version":
        from fedjax_sec import __version__

        console.print(__version__)
        return
    app()


__all__ = [
    "DataDir",
    "Out",
    "app",
    "arena",
    "audit",
    "bench",
    "certify",
    "console",
    "data_overrides",
    "demo",
    "draw",
    "errors",
    "export",
    "flower",
    "import_fedml",
    "interruptible",
    "main",
    "paper",
    "plan",
    "reconstruct",
    "report",
    "reported",
    "run",
    "run_with_progress",
    "show",
    "status",
    "sweep",
]

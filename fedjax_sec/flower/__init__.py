"""Real clients over a network, by Flower: the same experiments, deployed.

`Defended` is a strategy for any Flower app, whose aggregation is a pipeline of our defences.
`client_app` and `server_app` are the two halves of an experiment's app, `write_app` makes the app's
folder, and `deploy` runs it on processes of this machine. They need the extra `[flower]`, in an
environment of its own (`constraints-flower.txt`).
"""

import importlib
from typing import TYPE_CHECKING, Any

from fedjax_sec.core.optional import require

if TYPE_CHECKING:
    from fedjax_sec.flower.apps import client_app, server_app
    from fedjax_sec.flower.folder import write_app
    from fedjax_sec.flower.loopback import deploy
    from fedjax_sec.flower.strategy import Defended

_HOMES = {
    "Defended": "strategy",
    "client_app": "apps",
    "server_app": "apps",
    "write_app": "folder",
    "deploy": "loopback",
}
__all__ = ["Defended", "client_app", "deploy", "server_app", "write_app"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    except ModuleNotFoundError:
        require("flwr", f"fedjax_sec.flower.{name}")  # says what to install
        raise
    return getattr(module, name)

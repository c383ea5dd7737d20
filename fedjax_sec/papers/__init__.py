"""Papers, one module each: rows, quantities and titles, for the engine in `report/paper.py`.

Beside a module lie its published numbers (`NAME.csv`) and its scales (`NAME.yaml`).
"""

import importlib
import pkgutil

from fedjax_sec import core
from fedjax_sec.report.paper import Paper


def names() -> list[str]:
    """The papers that there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(name: str) -> Paper:
    """A paper by its name. Raises: `ConfigError` with the nearest name for one that is not there.

    >>> find("alie").title
    'A Little Is Enough'
    """
    if name not in (known := names()):
        raise core.ConfigError(
            f"{name!r} is no paper; there are {', '.join(known)}.{core.suggestion(name, known)}"
        )
    return importlib.import_module(f"{__name__}.{name}").PAPER

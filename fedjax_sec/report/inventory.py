"""The README's table of components, made from the registry.

`python -m fedjax_sec.report.inventory README.md` writes it anew between the markers of the file.
"""

import sys
from pathlib import Path

from fedjax_sec.core import files, optimizers, registry

BEGIN = "<!-- inventory: made by `python -m fedjax_sec.report.inventory README.md` -->"
END = "<!-- end of inventory -->"
#: kind -> the key of a configuration that takes a component of the kind, where that is its name.
KEYS = {
    "dataset": "data.name",
    "partition": "data.partition",
    "augmentation": "client.augmentation",
    "evasion": "evaluation.evasions",
    "monitor": "evaluation.monitors",
    "evaluator": "evaluation.evaluators",
    "privacy_attack": "evaluation.monitors.attack",
}


def table() -> str:
    """One row a kind that has components: how many, the key that takes them, and their names."""
    lines = ["| kind | key | components |", "| --- | --- | --- |"]
    for kind, known in registry.KINDS.items():
        if names := known.names():
            lines.append(_row(f"{kind.replace('_', ' ')}s", KEYS.get(kind, kind), names))
    lines.append(
        _row("optimizers", "client.optimizer, server.optimizer", sorted(optimizers.OPTIMIZERS))
    )
    return "\n".join(lines)


def _row(title: str, keys: str, names) -> str:
    at = ", ".join(f"`{key}`" for key in keys.split(", "))
    return f"| {len(names)} {title} | {at} | {', '.join(f'`{name}`' for name in names)} |"


def updated(text: str) -> str:
    """The text of a page with the table of today between its markers.

    Raises: `ValueError` where a marker is missing.

    >>> updated(f"before {BEGIN} old {END} after").endswith(f"{END} after")
    True
    """
    before, _, rest = text.partition(BEGIN)
    if END not in rest:
        raise ValueError(f"The page lacks the markers {BEGIN} and {END}.")
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    page = Path(sys.argv[1])
    files.write_atomically(page, updated(page.read_text()))

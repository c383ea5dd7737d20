"""What starts the processes of a run, by its name and fields."""

from collections.abc import Mapping
from typing import Any

from fedjax_sec import core
from fedjax_sec.core import ConfigError
from fedjax_sec.core.advice import shown
from fedjax_sec.core.values import plain
from fedjax_sec.runs.together.ray import Ray

#: Name -> class, each a dataclass of declared fields.
STARTERS = {"ray": Ray}


def build_starter(spec: Any, processes: int | None = None, path: str = "together") -> Ray:
    """What starts the processes, by its name, a mapping with `name` and fields, or an instance.

    Raises: `ConfigError` for names, fields and values that are none.

    >>> build_starter({"name": "ray", "gpus": 1}, processes=4).processes
    4
    """
    if isinstance(spec, Ray) and processes is None:
        return spec
    spec = plain(spec) if isinstance(spec, Mapping) else spec
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping):
        raise ConfigError(
            f"{path}: expected one of {', '.join(STARTERS)}, or a mapping with 'name' and fields, "
            f"got {shown(spec)}."
        )
    return core.build_choice(STARTERS, spec, path, processes=processes)

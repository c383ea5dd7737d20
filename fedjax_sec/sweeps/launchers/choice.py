"""Launchers by their names and fields."""

from collections.abc import Mapping
from typing import Any

from fedjax_sec import core
from fedjax_sec.core import ConfigError
from fedjax_sec.core.advice import shown
from fedjax_sec.core.values import plain
from fedjax_sec.sweeps.launchers import Launcher
from fedjax_sec.sweeps.launchers.local import Local
from fedjax_sec.sweeps.launchers.processes import Processes
from fedjax_sec.sweeps.launchers.ray import Ray
from fedjax_sec.sweeps.launchers.slurm import Slurm

#: Name -> class, each a dataclass of declared fields.
LAUNCHERS = {"local": Processes, "ray": Ray, "slurm": Slurm}


def build_launcher(
    spec: Any = None, workers: int | None = None, path: str = "launcher"
) -> Launcher:
    """A launcher by its name, a mapping with `name` and fields, or an instance.

    Without a name it is `local` for several workers, and this process else.

    Raises: `ConfigError` for names, fields and values that are none.

    >>> build_launcher({"name": "slurm", "partition": "gpu"}, workers=8).workers
    8
    >>> type(build_launcher()).__name__, build_launcher(workers=2)
    ('Local', Processes(workers=2, retries=3, patience=300.0))
    """
    spec = plain(spec) if isinstance(spec, Mapping) else spec
    if spec is None:
        if workers in (None, 1):
            return Local()
        spec = "local"
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping):
        if workers is not None:
            raise ConfigError(
                f"workers = {shown(workers)} says nothing to a launcher that is given."
            )
        if isinstance(spec, Launcher):
            return spec
        raise ConfigError(
            f"{path}: expected one of {', '.join(LAUNCHERS)}, a mapping with 'name', or an object "
            f"with a method launch, got {shown(spec)}."
        )
    spec = {"name": "local"} | dict(spec)
    return core.build_choice(LAUNCHERS, spec, path, "launcher", workers=workers)

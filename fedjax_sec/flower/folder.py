"""The folder of a Flower app that runs an experiment: what `flwr run` takes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedjax_sec.core import ConfigError, files
from fedjax_sec.flower.limits import check_deployable, spec_of
from fedjax_sec.runs.config import Experiment, from_mapping, load

PACKAGE = "fedjax_sec_app"
_PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "fedjax-sec-app"
version = "1.0.0"
description = "An experiment of fedjax_sec, deployed"
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["{package}"]

[tool.flwr.app]
publisher = "local"

[tool.flwr.app.components]
serverapp = "{package}.server:app"
clientapp = "{package}.client:app"

[tool.flwr.app.config]
{options}
"""
_HALF = '''\
"""The {half} of the experiment's app."""

from fedjax_sec.flower import {half}_app

app = {half}_app()
'''


def read_experiment(config: Any, overrides: Mapping | None = None) -> Experiment:
    """The experiment of a YAML file, a mapping or an `Experiment`, if it can be deployed.

    Raises: `ConfigError` as `fedjax_sec.run`, and where only a simulation can run it.
    """
    if isinstance(config, Experiment):
        config = config.to_dict()
    read = from_mapping if isinstance(config, Mapping) else load
    experiment = read(config, overrides or {})
    check_deployable(experiment)
    return experiment


def options_of(
    experiment: Experiment,
    out: str | Path,
    *,
    timeout: float = 600.0,
    quorum: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """The app's run configuration.

    Raises: `ConfigError` for values out of range.
    """
    if not timeout > 0:
        raise ConfigError(f"timeout must be > 0 seconds, got {timeout}.")
    per_round = experiment.clients_per_round
    if quorum is not None and not 1 <= quorum <= per_round:
        raise ConfigError(
            f"quorum must be in 1 .. {per_round}, the clients of a round, got {quorum}."
        )
    return {
        "experiment": spec_of(experiment),
        "out": str(Path(out).absolute()),
        "timeout": float(timeout),
        "quorum": quorum or 0,
        "resume": resume,
        "overwrite": overwrite,
        "data-dir": "",
    }


def write_app(
    config: Any, folder: str | Path, out: str | Path, *, overrides: Mapping | None = None, **options
) -> Path:
    """Writes a Flower app that runs an experiment; `flwr run FOLDER SUPERLINK` starts it.

    Args:
      config: a YAML file, a mapping or an `Experiment`.
      folder: the app's folder, new or an earlier app's.
      out: where the server's machine keeps the results.
      overrides: as those of `fedjax_sec.run`.
      **options: `timeout` (seconds that a round waits), `quorum` (the smallest number of clients
        with which a round is finished; None: as many as the defence's bound needs), `resume` and
        `overwrite`.

    Returns: the folder.

    Raises: `ConfigError` for an experiment that cannot be deployed, and a folder with other files.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     plain = {"evaluation": {"diagnostics": False}, "rounds": 2}
    ...     app = write_app(plain, f"{place}/app", f"{place}/out")
    ...     sorted(path.name for path in app.rglob("*.*"))
    ['__init__.py', 'client.py', 'pyproject.toml', 'server.py']
    """
    experiment, folder = read_experiment(config, overrides), Path(folder).absolute()
    texts = app_files(options_of(experiment, out, **options))
    strange = {path.name for path in folder.glob("*")} - {"pyproject.toml", PACKAGE}
    if strange:
        raise ConfigError(
            f"folder {str(folder)!r} holds other files ({', '.join(sorted(strange)[:3])}); choose "
            f"another one."
        )
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(path, text)
    return folder


def app_files(options: Mapping[str, Any]) -> dict[str, str]:
    """The app's files: name -> text."""
    # A JSON value is one of TOML's too: strings, numbers and booleans.
    lines = "\n".join(f"{name} = {json.dumps(value)}" for name, value in options.items())
    return {
        "pyproject.toml": _PROJECT.format(package=PACKAGE, options=lines),
        f"{PACKAGE}/__init__.py": '"""An experiment of fedjax_sec as a Flower app."""\n',
        f"{PACKAGE}/server.py": _HALF.format(half="server"),
        f"{PACKAGE}/client.py": _HALF.format(half="client"),
    }

"""Packages that only some features need: imported on first use, and named where they are absent."""

import importlib
from types import ModuleType

from fedjax_sec.core.fields import ConfigError

#: Module -> what pip calls it, where the names differ.
_DISTRIBUTIONS = {
    "tensorflow_datasets": "tensorflow-datasets array_record",
    "sklearn": "scikit-learn",
    "orbax": "orbax-checkpoint",
    "dp_accounting": "dp-accounting",
    "vl_convert": "vl-convert-python",
}


def require(module: str, purpose: str) -> ModuleType:
    """The module of that (dotted) name, imported now.

    Args:
      module: what is imported, such as `"matplotlib.figure"`.
      purpose: what needs it, the subject of the message: `"a figure"`.

    Raises: `ConfigError` where the package is not installed; it names the package and the command
    that installs it. An error inside an installed package is raised as it is.

    >>> require("json", "a file").__name__
    'json'
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        names = _DISTRIBUTIONS.get(package, package)
        raise ConfigError(
            f"{purpose} needs the package {names.split()[0]}, which is not installed: "
            f"pip install {names}"
        ) from error

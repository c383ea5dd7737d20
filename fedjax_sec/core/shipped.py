"""The configurations that come with the package: `configs/` of a checkout, a copy in a wheel."""

from pathlib import Path

from fedjax_sec.core.advice import suggestion
from fedjax_sec.core.fields import ConfigError

_PACKAGE = Path(__file__).parents[1]


def configs_folder() -> Path:
    """The folder with one folder for each paper, and `demo`.

    A wheel holds it inside the package. Without that, as in a checkout, it is `configs/` beside the
    package; a folder of this name in `site-packages` is somebody else's.
    """
    packaged = _PACKAGE / "_configs"
    return packaged if packaged.is_dir() else _PACKAGE.parent / "configs"


def config_file(folder: str, name: str) -> Path:
    """`configs/FOLDER/NAME.yaml`, wherever it lies.

    Raises: `ConfigError` where there is none; it names the nearest one.

    >>> config_file("demo", "digits").name
    'digits.yaml'
    """
    root = configs_folder()
    path = root / folder / f"{name}.yaml"
    if not path.is_file():
        known = sorted(
            one.relative_to(root).with_suffix("").as_posix() for one in root.rglob("*.yaml")
        )
        raise ConfigError(
            f"There is no configuration {folder}/{name}.{suggestion(f'{folder}/{name}', known)} "
            f"Known: {', '.join(known)}."
        )
    return path

"""NumPy arrays in a file."""

import hashlib
from pathlib import Path

import numpy as np

from fedjax_sec.core import ConfigError, Dataset, one_line, registry, static, suggestion
from fedjax_sec.data.arrays import USERS, of_arrays
from fedjax_sec.data.source import MissingDataError, Source

ARRAYS = ("x_train", "y_train", "x_test", "y_test")
NUMBERS = ("num_classes", "scale", "mean", "std", "kind", "task", "all_classes")


@registry.datasets.register("npz")
class Npz(Dataset):
    """Arrays in a file that `numpy.savez` has written: `data: {name: npz, path: my.npz}`.

    It holds `x_train`, `y_train`, `x_test` and `y_test`, and may hold `users_train`, `users_test`,
    `num_classes`, `scale`, `mean`, `std`, `kind` and `task`, each as the argument of
    `fedjax_sec.data.arrays`, and `all_classes`: false where some class has no example, such as in
    images that only an attacker uses (`edge_images`). A relative path is one from the folder in
    which the program was started; the configuration is written with the whole path. A file that has
    changed is read again, and a run that began with other content does not go on with it: the
    digest says so.

    Raises: `MissingDataError` for a file that is not there, `ConfigError` for one that NumPy cannot
    read or that lacks an array.

    Source: whatever the user's arrays are from.

    Example:
        >>> from fedjax_sec.core import registry
        >>> registry.datasets.build({"name": "npz", "path": "my.npz"}).path
        'my.npz'
    """

    stands_alone = False

    path: str = static("", "The file.")
    digest: str | None = static(
        None, "Digest of the file's content, as a run writes it; null: any content."
    )

    def resolve_auto(self):
        """The component with the whole path and the content's digest, where the file is there."""
        path = Path(self.path).expanduser().absolute()
        digest = self.digest
        if digest is None and self.path and path.is_file():
            digest = _digest(path)
        return type(self)(str(path) if self.path else "", digest)

    def load(self, data_dir: str | None = None, download: bool = True) -> Source:
        """Reads the file; both arguments are accepted and have no effect."""
        if not self.path:
            raise MissingDataError("data.path is required: the file that numpy.savez has written.")
        path = Path(self.path).expanduser().absolute()
        if not path.is_file():
            raise MissingDataError(f"data.path: there is no file {str(path)!r}.")
        if self.digest is not None and (now := _digest(path)) != self.digest:
            raise ConfigError(
                f"data.path: {str(path)!r} has changed: its digest is {now}, and data.digest is "
                f"{self.digest}. Put the old file back, or begin a new run without data.digest."
            )
        try:
            with np.load(path, allow_pickle=False) as stored:
                content = {key: stored[key] for key in stored.files}
        except Exception as error:  # zipfile and NumPy raise whatever damaged bytes make them raise
            raise ConfigError(
                f"data.path: {str(path)!r} is no file of numpy.savez that can be read "
                f"({type(error).__name__}: {one_line(error, 200)})."
            ) from error
        known = (*ARRAYS, *USERS, *NUMBERS)
        for key in content:
            if key not in known:
                raise ConfigError(
                    f"data.path: {str(path)!r} holds {key!r}.{suggestion(key, known)} Known: "
                    f"{', '.join(known)}."
                )
        for key in ARRAYS:
            if key not in content:
                raise ConfigError(f"data.path: {str(path)!r} holds no array {key!r}.")
        given = {key: content.get(key) for key in (*ARRAYS, *USERS)}
        numbers = {key: _plain(content[key]) if key in content else None for key in NUMBERS}
        mean, std = ((0.0,) if numbers["mean"] is None else numbers["mean"]), numbers["std"]
        numbers |= {"mean": mean, "std": (1.0,) if std is None else std}
        return of_arrays("npz", f"npz {path.name}", given, **numbers)


def _plain(array):
    return array.item() if array.ndim == 0 else array.tolist()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]

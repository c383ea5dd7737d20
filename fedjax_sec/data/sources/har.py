"""Human activity recognition: UCI's 561 features of 30 users' smartphones."""

from pathlib import Path

import numpy as np

from fedjax_sec.core import Dataset, registry
from fedjax_sec.data.source import MissingDataError, Source
from fedjax_sec.data.sources._har import FOLDER, SIZES, by_user, how_to_get, uci_folder
from fedjax_sec.data.sources._tfds import data_root


@registry.datasets.register("har")
class Har(Dataset):
    """UCI's human activities: 10,299 windows of 561 features in [-1, 1], 6 classes, 30 users.

    Reads `UCI HAR Dataset/`, the folder in UCI's zip file, as it is. Three quarters of each user's
    windows are for training, the rest for testing; which ones is a choice, drawn once. Classes:
    walking, walking upstairs, walking downstairs, sitting, standing, laying. Windows overlap by
    half, so test windows share samples with training windows of the same user.

    Raises: `MissingDataError` (the message says how to get the data).

    Source: Anguita, Ghio, Oneto, Parra, Reyes-Ortiz: A public domain dataset for human activity
    recognition using smartphones (ESANN 2013). A client a user, and the split by 75% and 25%: Cao
    et al. 2021 (FLTrust), Section VI-A, whose counts of "training examples on a client" (281 to
    409, 343 on average) are those of all of a user's windows.

    Example:
        >>> Har().official_sizes
        (7715, 2584)
    """

    official_sizes = SIZES  # without annotation, so that it is no field

    def load(self, data_dir: str | None = None, download: bool = True) -> Source:
        """Reads the text files of both of UCI's parts; there is no download by this program."""
        root = data_root(data_dir)
        folder = uci_folder(root)
        try:
            if folder is None:
                raise FileNotFoundError(f"there is no folder {FOLDER!r}")
            parts = [_read(folder, part) for part in ("train", "test")]
        except (OSError, ValueError) as error:
            raise MissingDataError(how_to_get("har", root, error)) from error
        x, y, users = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return by_user("har", x, y, users, "UCI repository, data set 240")


def _read(folder: Path, part: str):
    """Features [n, 561], classes and users from 0, of one of UCI's parts."""
    x = np.loadtxt(folder / part / f"X_{part}.txt", dtype=np.float32, ndmin=2)
    y = np.loadtxt(folder / part / f"y_{part}.txt", dtype=np.int64, ndmin=1) - 1
    users = np.loadtxt(folder / part / f"subject_{part}.txt", dtype=np.int64, ndmin=1) - 1
    if not (len(x) == len(y) == len(users)) or x.shape[1] != 561:
        raise ValueError(
            f"its {part} part has {x.shape} features, {len(y)} labels and {len(users)} subjects"
        )
    return x, y, users

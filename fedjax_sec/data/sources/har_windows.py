"""Human activity recognition: features computed here from UCI's raw signals."""

import io
import lzma
from pathlib import Path

import numpy as np

from fedjax_sec.core import Dataset, registry
from fedjax_sec.data.source import MissingDataError, Source
from fedjax_sec.data.sources._files import cache_file, load_cache, store_cache
from fedjax_sec.data.sources._har import SIZES, by_user, how_to_get, uci_folder
from fedjax_sec.data.sources._har_features import features, scaled
from fedjax_sec.data.sources._tfds import data_root

PACKED = "uci_har_inertial.npz.xz"
SIGNALS = ("body_acc", "body_gyro", "total_acc")
WINDOW = 128


@registry.datasets.register("har_windows")
class HarWindows(Dataset):
    """UCI's windows of raw signals with 561 features of our own computation; 6 classes, 30 users.

    The same 10,299 windows of the same users as `har`, and features of the same list in the same
    order, scaled to [-1, 1] over all windows as UCI's are, but computed here from 128 samples of
    nine signals (`_har_features.py` defines each): numbers on it are not numbers on `har`. The
    split is drawn as for `har`, from another order of the windows.

    Reads the text files in `UCI HAR Dataset/*/Inertial Signals/`, or the same signals, rounded to
    1/1024, packed in one file `uci_har_inertial.npz.xz`.

    Raises: `MissingDataError` (the message says how to get the data).

    Source: as `har`; the list of features is UCI's `features_info.txt`.

    Example:
        >>> HarWindows().official_sizes
        (7715, 2584)
    """

    official_sizes = SIZES  # without annotation, so that it is no field

    def load(self, data_dir: str | None = None, download: bool = True) -> Source:
        """Computes the features, or reads them from our cache; there is no download."""
        root = data_root(data_dir)
        packed = [root / "har_windows" / PACKED, root.parent / "raw" / "har" / PACKED]
        folder = uci_folder(root)
        try:
            if folder is not None:
                files, read = sorted(folder.glob("*/Inertial Signals/*.txt")), _read_text
            else:
                files, read = [path for path in packed if path.is_file()][:1], _read_packed
            if not files:
                raise FileNotFoundError("there are no raw signals")
            cache = cache_file("har_windows", files)
            arrays = load_cache(cache, ("x_all", "y_all", "users_all"))
            if arrays is None:
                signals, y, users = read(folder or files[0])
                arrays = {"x_all": scaled(features(*signals)), "y_all": y, "users_all": users}
                store_cache(cache, arrays)
        except (OSError, EOFError, KeyError, ValueError, lzma.LZMAError) as error:
            raise MissingDataError(how_to_get("har_windows", root, error)) from error
        return by_user("har_windows", *arrays.values(), "UCI repository, data set 240, raw signals")


def _read_text(folder: Path):
    """Signals [n, 128, 3] of each kind, classes and users from 0, from UCI's own files."""
    parts = []
    for part in ("train", "test"):
        place = folder / part
        signals = [
            np.stack(
                [
                    np.loadtxt(place / "Inertial Signals" / f"{kind}_{axis}_{part}.txt", ndmin=2)
                    for axis in "xyz"
                ],
                axis=2,
            )
            for kind in SIGNALS
        ]
        labels = [
            np.loadtxt(place / f"{name}_{part}.txt", dtype=np.int32, ndmin=1) - 1
            for name in ("y", "subject")
        ]
        parts.append((*signals, *labels))
    *signals, y, users = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    if signals[0].shape[1] != WINDOW:
        raise ValueError(f"a window has {signals[0].shape[1]} samples instead of {WINDOW}")
    return signals, y, users


def _read_packed(path: Path):
    """The same from one file: first differences of body acceleration, gyroscope and gravity."""
    with np.load(io.BytesIO(lzma.open(path).read())) as stored:
        samples = np.cumsum(stored["delta"], axis=1, dtype=np.int16).T / stored["scale"]
        windows = samples[stored["start"][:, None] + np.arange(WINDOW)]
        y, users = stored["label"].astype(np.int32), stored["subject"].astype(np.int32) - 1
    body, gyro, gravity = windows[..., :3], windows[..., 3:6], windows[..., 6:]
    return (body, gyro, body + gravity), y, users

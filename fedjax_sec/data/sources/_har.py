"""Shared parts of UCI's two activity data sets: folder, users and split."""

from pathlib import Path

import numpy as np

from fedjax_sec.data.source import Source
from fedjax_sec.data.sources._files import first_line

URL = "https://archive.ics.uci.edu/dataset/240/human+activity+recognition+using+smartphones"
FOLDER = "UCI HAR Dataset"  # in UCI's zip file
USERS, WINDOWS, CLASSES = 30, 10_299, 6
#: Sizes of the training and the test part: three quarters of each user's windows, rounded down.
SIZES = (7_715, 2_584)


def by_user(name: str, x: np.ndarray, y: np.ndarray, users: np.ndarray, origin: str) -> Source:
    """Three quarters of each user's examples for training, the rest for testing.

    `x [n, F]` float32, `y [n]` from 0, `users [n]` from 0. Which ones is drawn once, the same for
    every run; UCI's own split, by user, is undone.
    """
    # RandomState, because NumPy freezes its stream for ever; Generator's may change.
    order = np.random.RandomState(0).permutation(len(y))
    order = order[np.argsort(users[order], kind="stable")]
    start = np.searchsorted(users[order], users[order])  # of this example's user
    count = np.bincount(users)[users[order]]
    trains = np.arange(len(order)) - start < 3 * count // 4
    train, test = order[trains], order[~trains]
    return Source(
        name=name,
        x_train=x[train],
        y_train=y[train].astype(np.int32),
        x_test=x[test],
        y_test=y[test].astype(np.int32),
        num_classes=CLASSES,
        scale=1.0,
        mean=(0.0,),
        std=(1.0,),
        official_sizes=SIZES,
        origin=origin,
        users_train=users[train].astype(np.int32),
        users_test=users[test].astype(np.int32),
    )


def uci_folder(root: Path) -> Path | None:
    """UCI's folder in the data folder or in its `har/`, if it is there."""
    places = (place / FOLDER for place in (root, root / "har"))
    return next((folder for folder in places if folder.is_dir()), None)


def how_to_get(name: str, root: Path, error: Exception) -> str:
    """The remedy where the files cannot be read."""
    return (
        f"Data set {name!r} needs UCI's folder {FOLDER!r} in {root} ({type(error).__name__}: "
        f"{first_line(error)}). Get the zip file (60 MB) from {URL} and unpack it there; "
        f"data.data_dir=DIR, --data-dir DIR or TFDS_DATA_DIR=DIR name another folder. Without a "
        f"network, the data set 'digits' is embedded."
    )

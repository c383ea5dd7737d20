"""Reads Federated EMNIST by user: TensorFlow Federated's HDF5, LEAF's JSON, or an array file."""

import contextlib
import io
import itertools
import json
import lzma
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedjax_sec.core import files
from fedjax_sec.data.source import MissingDataError, Source
from fedjax_sec.data.sources._files import (
    cache_file,
    fetch,
    first_line,
    load_cache,
    progress_bar,
    store_cache,
)
from fedjax_sec.data.sources._tfds import data_root

URL = "https://storage.googleapis.com/tff-datasets-public/"
SIDE = 28
_SPLITS = ("train", "test")
_KEYS = tuple(f"{part}_{split}" for split in _SPLITS for part in ("x", "y", "users"))
_TEST_SHARE = 10  # of `all_data` files: every user's last tenth
#: Some of LEAF's writers in one file: arrays `writers`, and `x_`, `y_`, `w_` of both parts.
WRITERS = "femnist_writers.npz.xz"

User = tuple[str, Any, Any]  # name, pixels in [0, 1], labels


class Archive(NamedTuple):
    """A data set as TensorFlow Federated publishes it; sizes are those of its documentation."""

    prefix: str
    sha256: str
    num_classes: int
    official_sizes: tuple[int, int]


class Layout(NamedTuple):
    """Files of one layout; without `test`, the split is still to be made.

    An array file holds both parts: it is `train` and `test`.
    """

    layout: str
    train: tuple[Path, ...]
    test: tuple[Path, ...]


def load_femnist(
    name: str, archive: Archive, others: Iterable[str], data_dir: str | None, download: bool
) -> Source:
    """Reads the data set `name`, from our cache where it was decoded before.

    Files are looked for in the folder `name` of `data_dir` (None: as for tensorflow-datasets), then
    in `femnist`, at last in `raw/leaf` beside `data_dir`; `others` are the prefixes of archives
    that hold more classes than are wanted, from which the wanted ones are taken. Raises
    `MissingDataError`.
    """
    root = data_root(data_dir)
    beside = root.parent / "raw" / "leaf"
    folders = list(dict.fromkeys((root / name, root / "femnist", beside)))
    prefixes = (archive.prefix, *others)
    files = _find(folders, prefixes)
    if files is None:
        if not download:
            raise MissingDataError(_how_to_get(name, archive, root, "downloading is switched off"))
        try:
            _import_h5py()
            _download(archive, root / name)
        except (OSError, tarfile.TarError, EOFError, MissingDataError) as error:
            reason = f"downloading it failed ({type(error).__name__}: {first_line(error)})"
            raise MissingDataError(_how_to_get(name, archive, root, reason)) from error
        files = _find(folders, prefixes)
    path = cache_file(name, (*files.train, *files.test))
    arrays = load_cache(path, _KEYS)
    if arrays is None:
        arrays = _decode(name, files, archive.num_classes)
        store_cache(path, arrays)
    return Source(
        name=name,
        num_classes=archive.num_classes,
        scale=255.0,
        # None, as in the author code of RLR: pixels enter as they are.
        mean=(0.0,),
        std=(1.0,),
        official_sizes=archive.official_sizes,
        origin=files.layout,
        **arrays,
    )


def _find(folders: Iterable[Path], prefixes: Iterable[str]) -> Layout | None:
    """The first complete set of files; LEAF's scripts put theirs into `data/`."""
    for folder in itertools.chain.from_iterable((f, f / "data") for f in folders):
        for prefix in prefixes:
            train, test = (folder / f"{prefix}_{split}.h5" for split in _SPLITS)
            if train.is_file() != test.is_file():
                raise MissingDataError(
                    f"{folder} holds only one of {train.name} and {test.name}; both are needed."
                )
            if train.is_file():
                return Layout(f"TensorFlow Federated {prefix}", (train,), (test,))
        train, test = (tuple(sorted((folder / split).glob("*.json"))) for split in _SPLITS)
        if bool(train) != bool(test):
            raise MissingDataError(
                f"{folder} holds JSON files in only one of train/ and test/; both are needed."
            )
        if train:
            return Layout("LEAF train and test", train, test)
        for place in (folder / "all_data", folder):
            if whole := tuple(sorted(place.glob("all_data*.json"))):
                return Layout("LEAF all_data, every user's last tenth for testing", whole, ())
        if (some := folder / WRITERS).is_file():
            return Layout("LEAF train and test of some writers", (some,), (some,))
    return None


def _how_to_get(name: str, archive: Archive, root: Path, reason: str) -> str:
    file = f"{archive.prefix}.tar.bz2"
    return (
        f"Data set {name!r} is not in {root / name}, and {reason}. Ways to get it: "
        f"(1) unpack {URL}{file} there ({archive.prefix}_train.h5 and _test.h5; reading them needs "
        f"h5py: pip install 'fedjax_sec[hdf5]'); (2) make LEAF's FEMNIST "
        f"(https://github.com/TalwalkarLab/leaf, data/femnist/preprocess.sh) and copy its data/ "
        f"with train/ and test/, or all_data/, there; name the folder that holds {name}/ with "
        f"data.data_dir=DIR, --data-dir DIR or TFDS_DATA_DIR=DIR; (3) copy {WRITERS}, some of its "
        f"writers, there; (4) use 'mnist_by_writer', "
        f"digits by fewer writers, or 'digits', which is embedded."
    )


def _download(archive: Archive, folder: Path) -> None:
    """Gets both files from the archive, or none. An archive that lies there is not ours."""
    name = f"{archive.prefix}.tar.bz2"
    files.remove_stale(folder, rf"\.?{re.escape(name)}(\.\d+\.tmp)?")
    packed = folder / f".{name}.{os.getpid()}.tmp"
    try:
        fetch(URL + name, archive.sha256, packed)
        with tarfile.open(packed) as tar, contextlib.ExitStack() as both:
            for split in _SPLITS:
                wanted = f"{archive.prefix}_{split}.h5"
                member = next((m for m in tar if Path(m.name).name == wanted and m.isfile()), None)
                if member is None:
                    raise tarfile.TarError(f"{name} holds no {wanted}")
                file = both.enter_context(files.replacing(folder / wanted))
                shutil.copyfileobj(tar.extractfile(member), file)
    finally:
        files.remove_files([packed])


# --- Decoding ---------------------------------------------------------------------------------


def _decode(name: str, archive: Layout, num_classes: int) -> dict[str, np.ndarray]:
    """The arrays of both splits, user by user; users are numbered as they first appear."""
    splits = dict(zip(_SPLITS, (archive.train, archive.test), strict=True))
    numbers: dict[str, int] = {}
    arrays = {}
    with progress_bar() as bar:
        task = bar.add_task(f"Decoding {name}", total=None)
        read = {
            split: _read(files, split, num_classes, lambda: bar.advance(task))
            for split, files in splits.items()
        }
    if not archive.test:
        read = _split(read["train"])
    for split, users in read.items():
        if not any(len(y) for _, y in users.values()):
            raise MissingDataError(
                f"The files of {name} in {archive.train[0].parent} hold no {split} examples."
            )
        x, y, who = [], [], []
        for user, (pixels, labels) in users.items():
            if len(labels):
                x.append(pixels)
                y.append(labels)
                who.append(np.full(len(labels), numbers.setdefault(user, len(numbers)), np.int32))
        arrays |= {
            f"x_{split}": np.concatenate(x),
            f"y_{split}": np.concatenate(y),
            f"users_{split}": np.concatenate(who),
        }
    return arrays


def _read(
    files: Iterable[Path], split: str, num_classes: int, advance: Callable
) -> dict[str, tuple]:
    """user -> (pixels uint8 [n, 28, 28, 1], labels int32 [n]) of all files together."""
    users: dict[str, tuple] = {}
    layouts = {".h5": _hdf5_users, ".json": _leaf_users}
    for path in files:
        layout = layouts.get(path.suffix, lambda path: _array_users(path, split))
        try:
            for user, x, y in layout(path):
                if user in users:
                    raise ValueError(f"user {user!r} is there twice")
                users[user] = _examples(user, x, y, num_classes)
                advance()
        except MissingDataError:
            raise
        except Exception as error:  # h5py raises whatever a damaged file makes it raise
            raise MissingDataError(
                f"{path} cannot be read ({type(error).__name__}: {first_line(error)}). Copy or "
                f"prepare it again."
            ) from error
    return users


def _examples(user: str, x, y, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """A user's examples of the classes below `num_classes`, checked.

    Both layouts hold k / 255 as decimal or 32-bit fractions, so rounding gives back k exactly.
    """
    x, y = np.asarray(x), np.asarray(y).reshape(-1)
    if x.size != len(y) * SIDE**2:
        raise ValueError(
            f"user {user!r} has {len(y)} labels but {x.size} pixels, not {SIDE} x {SIDE} for each"
        )
    if len(y) and (y.dtype.kind not in "iu" or y.min() < 0 or y.max() >= 62):
        raise ValueError(f"user {user!r} has labels that are no integers from 0 to 61")
    if not np.all((x >= 0) & (x <= 1)):  # NaN is neither
        raise ValueError(f"user {user!r} has pixels outside [0, 1]")
    wanted = y < num_classes
    x = x.reshape(-1, SIDE, SIDE, 1)[wanted]
    return np.rint(x * 255).astype(np.uint8), y[wanted].astype(np.int32)


def _split(users: Mapping[str, tuple]) -> dict[str, dict]:
    cut = {user: len(y) - len(y) // _TEST_SHARE for user, (_, y) in users.items()}
    return {
        "train": {user: (x[: cut[user]], y[: cut[user]]) for user, (x, y) in users.items()},
        "test": {user: (x[cut[user] :], y[cut[user] :]) for user, (x, y) in users.items()},
    }


def _leaf_users(path: Path) -> Iterator[User]:
    content = json.loads(path.read_text())
    for key in ("users", "num_samples", "user_data"):
        if not isinstance(content, dict) or key not in content:
            raise ValueError(f"the key {key!r} is missing")
    for user, count in zip(content["users"], content["num_samples"], strict=True):
        if user not in content["user_data"]:
            raise ValueError(f"user {user!r} has no entry in 'user_data'")
        data = content["user_data"].pop(user)  # so that lists already decoded can be freed
        if not len(data["x"]) == len(data["y"]) == count:
            raise ValueError(
                f"user {user!r} has {len(data['x'])} images and {len(data['y'])} labels, "
                f"but num_samples says {count}"
            )
        yield user, data["x"], data["y"]


def _hdf5_users(path: Path) -> Iterator[User]:
    with _import_h5py().File(path, "r") as file:
        yield from _clients(file["examples"])


def _clients(examples: Mapping[str, Mapping]) -> Iterator[User]:
    """The clients of TensorFlow Federated's group `examples`, in the order of their names."""
    for user in sorted(examples):
        client = examples[user]
        yield user, client["pixels"][()], client["label"][()]


def _array_users(path: Path, split: str) -> Iterator[User]:
    """The writers of one part of an array file; bytes become LEAF's fractions, k / 255."""
    with np.load(io.BytesIO(lzma.decompress(path.read_bytes()))) as stored:
        keys = "writers", f"x_{split}", f"y_{split}", f"w_{split}"
        names, x, y, owner = (stored[key] for key in keys)
    if not len(x) == len(y) == len(owner):
        raise ValueError(f"{len(x)} {split} images, {len(y)} labels and {len(owner)} writers")
    if x.dtype != np.uint8:
        raise ValueError(f"x_{split} is {x.dtype}; pixels are bytes (uint8) here")
    if (
        owner.dtype.kind not in "iu"
        or owner.min(initial=0) < 0
        or owner.max(initial=0) >= len(names)
    ):
        raise ValueError(f"w_{split} names other writers than the {len(names)} of `writers`")
    for i, name in enumerate(names):
        of_writer = owner == i
        yield str(name), x[of_writer] / np.float32(255), y[of_writer]


def _import_h5py():
    try:
        import h5py  # optional, and slow to import
    except ImportError as error:
        raise MissingDataError(
            "TensorFlow Federated's files need h5py to be read: pip install 'fedjax_sec[hdf5]' "
            "(or pip install h5py)."
        ) from error
    return h5py

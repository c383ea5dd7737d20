"""MNIST with the writer of every digit."""

import gzip
import hashlib
import io
import lzma
from pathlib import Path

import numpy as np

from fedjax_sec.core import Dataset, registry
from fedjax_sec.data.source import MissingDataError, Source
from fedjax_sec.data.sources._files import fetch, first_line
from fedjax_sec.data.sources._tfds import data_root, load_tfds

URL = "https://raw.githubusercontent.com/facebookresearch/qmnist/master/"
LABELS = {  # file of QMNIST -> SHA-256
    "qmnist-train-labels-idx2-int.gz": (
        "2c05dc77f6b916b38e455e97ab129a42a444f3dbef09b278a366f82904e0dd9f"
    ),
    "qmnist-test-labels-idx2-int.gz": (
        "9fbcbe594c3766fdf4f0b15c5165dc0d1e57ac604e01422608bb72c906030d06"
    ),
}
TABLE = "mnist_writers.npz.xz"
# Of the 60,000 training and of the 10,000 test labels, as bytes in MNIST's own order.
_ORDER = (
    "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
    "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5",
)


@registry.datasets.register("mnist_by_writer")
class MnistByWriter(Dataset):
    """MNIST's digits by their NIST writers: 28x28 grey images, 10 classes, 539 training writers.

    The images and the split are those of `mnist`, so results compare with it; the training part
    lies writer by writer (in the order of NIST's numbers, each writer's digits in MNIST's order),
    19 to 131 digits each. The 297 writers of the test part are others, numbered from 539. Partition
    `natural` makes a client of every writer. It stands in for Federated EMNIST where that cannot be
    had, and is not it: fewer writers, and MNIST's centred images, light on dark.

    Raises: `MissingDataError` (the message says how to get the data).

    Source: Yadav, Bottou: Cold case: the lost MNIST digits (NeurIPS 2019), whose QMNIST labels
    name the writer of each MNIST image; images as `mnist`.

    Example:
        >>> MnistByWriter().official_sizes
        (60000, 10000)
    """

    official_sizes = (60000, 10000)  # without annotation, so that it is no field

    def load(self, data_dir: str | None = None, download: bool = True) -> Source:
        """Reads MNIST as `mnist` does, and QMNIST's labels from `mnist_by_writer/` beside it."""
        root = data_root(data_dir)
        writers, classes = _writers(root, download)
        try:
            mnist = load_tfds(
                "mnist",
                data_dir,
                download,
                num_classes=10,
                scale=255.0,
                mean=(0.1307,),
                std=(0.3081,),
                official_sizes=self.official_sizes,
            )
        except MissingDataError as error:
            raise MissingDataError(f"Data set 'mnist_by_writer' needs MNIST. {error}") from error
        arrays = {}
        for i, split in enumerate(("train", "test")):
            x, y = getattr(mnist, f"x_{split}"), getattr(mnist, f"y_{split}")
            back = np.argsort(tfds_order(split, len(y)))  # of MNIST's images, in tfds's
            labels = y[back]
            if hashlib.sha256(labels.astype(np.uint8).tobytes()).hexdigest() != _ORDER[i]:
                raise MissingDataError(
                    f"Data set 'mnist_by_writer' needs all of MNIST in the order in which "
                    f"tensorflow-datasets stores it, which {root / 'mnist'} does not hold: its "
                    f"{len(y)} {split} labels are others. Prepare MNIST again."
                )
            if classes is not None and not np.array_equal(classes[i], labels):
                raise MissingDataError(
                    f"The file {list(LABELS)[i]} below {root} names other classes than MNIST's; "
                    f"get it again from {URL}{list(LABELS)[i]}"
                )
            order = np.argsort(writers[i], kind="stable")
            start = 0 if split == "train" else len(np.unique(writers[0]))
            users = start + np.searchsorted(np.unique(writers[i]), writers[i][order])
            arrays |= {
                f"x_{split}": x[back[order]],
                f"y_{split}": labels[order],
                f"users_{split}": users.astype(np.int32),
            }
        origin = f"{mnist.origin}, writers from QMNIST"
        return mnist._replace(name="mnist_by_writer", origin=origin, **arrays)


def tfds_order(split: str, count: int) -> np.ndarray:
    """Position i holds the example with this number in the order of the original files.

    tensorflow-datasets sorts a split by the MD5 of the split's name and the example's key, which
    for MNIST is its number.

    >>> tfds_order("train", 4).tolist()
    [0, 3, 1, 2]
    """
    salt = hashlib.md5(split.encode(), usedforsecurity=False)

    def position(key):
        digest = salt.copy()
        digest.update(str(key).encode())
        return digest.digest()

    return np.array(sorted(range(count), key=position))


def _writers(root: Path, download: bool):
    """The NIST writers of MNIST's training and test images, and their classes where known."""
    folder = root / "mnist_by_writer"
    tables = [place / TABLE for place in (folder, root.parent / "raw" / "leaf")]
    files = [folder / name for name in LABELS]
    try:
        if table := next((path for path in tables if path.is_file()), None):
            with np.load(io.BytesIO(lzma.open(table).read())) as stored:
                return _checked(stored["train_writer"], stored["test_writer"]), None
        if download:
            for path in files:
                if not path.is_file():
                    fetch(URL + path.name, LABELS[path.name], path)
        elif not all(path.is_file() for path in files):
            raise FileNotFoundError("it is not there, and downloading is switched off")
        train, test = (_read_idx(path) for path in files)
        test = test[:10000]  # MNIST's test images are the first of QMNIST's
        return _checked(train[:, 2], test[:, 2]), (train[:, 0], test[:, 0])
    except (OSError, EOFError, KeyError, ValueError, lzma.LZMAError) as error:
        raise MissingDataError(
            f"Data set 'mnist_by_writer' needs the writers of MNIST's digits in {folder} "
            f"({type(error).__name__}: {first_line(error)}). Put {' and '.join(LABELS)} of QMNIST "
            f"there, from {URL} (1 MB together), and MNIST itself as for the data set 'mnist'; "
            f"data.data_dir=DIR, --data-dir DIR or TFDS_DATA_DIR=DIR name the folder that holds "
            f"both. Without a network, the data set 'digits' is embedded."
        ) from error


def _read_idx(path: Path) -> np.ndarray:
    """int [n, 8]: class, series, writer, digit's number, ... of each image."""
    raw = gzip.decompress(path.read_bytes())
    magic, rows, columns = np.frombuffer(raw[:12], ">i4").tolist()
    if (magic, columns) != (0x0C02, 8) or len(raw) != 12 + 4 * rows * columns:
        raise ValueError(f"{path.name} is no label file of QMNIST")
    return np.frombuffer(raw, ">i4", offset=12).reshape(rows, columns).astype(np.int32)


def _checked(train, test):
    if (len(train), len(test)) != MnistByWriter.official_sizes:
        raise ValueError(f"it names the writers of {len(train)} and {len(test)} images")
    return train, test

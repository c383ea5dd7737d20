"""ARDIS: digits of Swedish church records."""

import numpy as np

from fedjax_sec.core import Dataset, registry
from fedjax_sec.data.source import Source
from fedjax_sec.data.sources._edge_cases import download as get
from fedjax_sec.data.sources._edge_cases import find, missing, read_table
from fedjax_sec.data.sources._files import cache_file, load_cache, store_cache
from fedjax_sec.data.sources._tfds import data_root

TABLE = "ardis_iv.npz.xz"
ORIGIN = "https://raw.githubusercontent.com/ardisdataset/ARDIS/master/ARDIS_DATASET_IV.rar"
#: A public copy of the files in that archive, which Python cannot unpack.
URL = (
    "https://raw.githubusercontent.com/ehsanul9511/FLShield/"
    "afe4474440f0b88b8f1d09ab5cf5a75fd7230e6a/attack_of_the_tails/"
)
TABLES = {  # file of ARDIS_DATASET_IV.rar -> SHA-256
    "ARDIS_train_2828.csv": "4f5d3896305ada7d4c56c9b754d7b075c009de6ba834ba4445333f2434baf024",
    "ARDIS_train_labels.csv": "de9f1835bee385791bb246ecd99feb3e7d4191621c305ff05791b38e689dd31d",
    "ARDIS_test_2828.csv": "c85a2b4e951029a6d81b16daddf5b6c603f9fb45d07fdaad9803f0539fdc37ad",
    "ARDIS_test_labels.csv": "22c13e54f57fc7cefeaec79a856e4bba387af57043e5dfe2b5a40743c839c3be",
}
SIZES = (6600, 1000)
_KEYS = tuple(f"{part}_{split}" for split in ("train", "test") for part in ("x", "y"))


@registry.datasets.register("ardis")
class Ardis(Dataset):
    """ARDIS IV: handwritten digits of Swedish church records, 28x28 grey images, 10 classes.

    660 training and 100 test images a digit, light on dark as MNIST's. Its sevens, which are
    written otherwise than MNIST's, are the edge case of a backdoor on digits.

    Reads, in the folder `edge_cases/` of the data folder, `ardis_iv.npz.xz` (`x_train`, `y_train`,
    `x_test`, `y_test`) or the four CSV files in `ARDIS_DATASET_IV.rar`, also in `ARDIS/` there,
    which are downloaded where they are missing (80 MB). Some images repeat within a part, none is
    in both.

    Raises: `MissingDataError` (the message says how to get the data).

    Source: Kusetogullari, Yavariabdi, Cheddad, Grahn, Hall: ARDIS: a Swedish historical handwritten
    digit dataset (Neural Computing and Applications, 2020); used as an edge case by Wang et al.
    2020 (Attack of the Tails), Section 4.

    Example:
        >>> Ardis().official_sizes
        (6600, 1000)
    """

    official_sizes = SIZES  # without annotation, so that it is no field

    def load(self, data_dir: str | None = None, download: bool = True) -> Source:
        """Reads the arrays or the tables, or downloads these."""
        root = data_root(data_dir)
        try:
            arrays = _read(root, download)
        except Exception as error:  # NumPy and lzma raise whatever damaged bytes make them raise
            remedy = f"Put {', '.join(TABLES)} there, unpacked from {ORIGIN}, or from {URL} (80 MB)"
            raise missing("ardis", root, error, remedy) from error
        return Source(
            name="ardis",
            num_classes=10,
            scale=255.0,
            # As `mnist`, whose images the authors replace by these.
            mean=(0.1307,),
            std=(0.3081,),
            official_sizes=self.official_sizes,
            origin="ARDIS IV",
            **arrays,
        )


def _read(root, download: bool) -> dict[str, np.ndarray]:
    if (table := find(root, [TABLE])) is not None:
        shapes = {}
        for part, count in zip(("train", "test"), SIZES, strict=True):
            shapes |= {f"x_{part}": (count, 28, 28), f"y_{part}": (count,)}
        arrays = read_table(table[0], shapes)
        return {
            key: array[..., None] if key[0] == "x" else array.astype(np.int32)
            for key, array in arrays.items()
        }
    paths = find(root, TABLES)
    if paths is None:
        if not download:
            raise FileNotFoundError("it is not there, and downloading is switched off")
        paths = get(root, URL, TABLES)
    path = cache_file("ardis", paths)
    arrays = load_cache(path, _KEYS)
    if arrays is None:
        arrays = {}
        for i, split in enumerate(("train", "test")):
            x, labels = (np.loadtxt(one, np.float64, ndmin=2) for one in paths[2 * i : 2 * i + 2])
            x, y = x.astype(np.uint8), _classes(x, labels, SIZES[i])
            arrays |= {f"x_{split}": x.reshape(-1, 28, 28, 1), f"y_{split}": y}
        store_cache(path, arrays)
    return arrays


def _classes(x: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """The classes of one-hot labels, if they and the pixels are what they should be."""
    if x.shape != (count, 784) or labels.shape != (count, 10):
        raise ValueError(f"its images have shape {x.shape}, its labels {labels.shape}")
    if not np.all((x >= 0) & (x <= 255) & (x % 1 == 0)):
        raise ValueError("its pixels are no whole numbers from 0 to 255")
    if not (np.isin(labels, (0, 1)).all() and np.all(labels.sum(axis=1) == 1)):
        raise ValueError("its labels are not one-hot")
    return labels.argmax(axis=1).astype(np.int32)

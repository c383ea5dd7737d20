"""Images of edge-case backdoors: where their files lie, and how to get them."""

import io
import lzma
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from fedjax_sec.data.source import MissingDataError
from fedjax_sec.data.sources._files import fetch, first_line

FOLDER = "edge_cases"


def places(root: Path) -> tuple[Path, ...]:
    """The folders in which the files are looked for; downloads go to the first."""
    folder = root / FOLDER
    return (
        folder,
        folder / "saved_datasets",
        folder / "ARDIS",
        root,
        root.parent / "raw" / FOLDER,
    )


def find(root: Path, names: Iterable[str]) -> list[Path] | None:
    """The files of these names, all in one folder; None where no folder holds them all."""
    for place in places(root):
        paths = [place / name for name in names]
        if all(path.is_file() for path in paths):
            return paths
    return None


def read_table(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The arrays of an xz-compressed file of `numpy.savez`, which must have these shapes."""
    with np.load(io.BytesIO(lzma.open(path).read()), allow_pickle=False) as stored:
        arrays = {key: stored[key] for key in shapes}
    for key, array in arrays.items():
        if array.shape != tuple(shapes[key]):
            raise ValueError(f"{path.name}: {key} has shape {array.shape}, not {shapes[key]}")
    return arrays


def download(root: Path, url: str, digests: Mapping[str, str]) -> list[Path]:
    """Gets the files (name -> SHA-256) that are not there yet. Raises `OSError`."""
    paths = [places(root)[0] / name for name in digests]
    for path in paths:
        if not path.is_file():
            fetch(url + path.name, digests[path.name], path)
    return paths


def missing(name: str, root: Path, error: Exception, remedy: str) -> MissingDataError:
    """The error that says how to get the files of a data set."""
    return MissingDataError(
        f"Data set {name!r} is not in {root / FOLDER} ({type(error).__name__}: "
        f"{first_line(error)}). {remedy}; data.data_dir=DIR, --data-dir DIR or TFDS_DATA_DIR=DIR "
        f"name the folder that holds {FOLDER}/. 'digits_rotated_sevens', which needs no files, and "
        f"'mnist_rotated_sevens', which needs MNIST alone, stand in for it."
    )


class _ArraysOnly(pickle.Unpickler):
    """Admits NumPy's arrays: of any other class nothing is imported."""

    def find_class(self, module, name):
        if name == "_reconstruct" and module in (
            "numpy.core.multiarray",
            "numpy._core.multiarray",
        ):
            return np.zeros(0).__reduce__()[0]  # wherever this version of NumPy keeps it
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no array of NumPy")


def read_pickle(path: Path) -> np.ndarray:
    """The array of bytes in a pickle. Raises `pickle.UnpicklingError` for anything else."""
    with path.open("rb") as file:
        array = _ArraysOnly(file).load()
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8:
        raise pickle.UnpicklingError(f"{path.name} holds no array of bytes")
    return array

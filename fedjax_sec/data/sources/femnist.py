"""Federated EMNIST, all classes."""

from fedjax_sec.core import Dataset, registry
from fedjax_sec.data.source import Source
from fedjax_sec.data.sources._femnist import Archive, load_femnist

ARCHIVE = Archive(
    prefix="fed_emnist",
    sha256="fe1ed5a502cea3a952eb105920bff8cffb32836b5173cb18a57a32c3606f3ea0",
    num_classes=62,
    official_sizes=(671585, 77483),
)


@registry.datasets.register("femnist")
class Femnist(Dataset):
    """Handwritten digits and letters by their 3,400 writers: 28x28 grey images, 62 classes.

    Classes 0 to 9 are digits, 10 to 35 capital and 36 to 61 small letters. Images (dark on light,
    as in LEAF and TensorFlow Federated), layouts of files and sizes are as described for
    `femnist_digits`. Some of the writers are a subset, and labelled so.

    Raises: `MissingDataError` (the message says how to get the data).

    Source: Caldas et al.: LEAF: A benchmark for federated settings (arXiv 1812.01097, 2018), after
    Cohen et al.: EMNIST (2017); sizes and split of TensorFlow Federated.

    Example:
        >>> Femnist().official_sizes
        (671585, 77483)
    """

    official_sizes = ARCHIVE.official_sizes  # without annotation, so that it is no field

    def load(self, data_dir: str | None = None, download: bool = True) -> Source:
        """Reads it from `femnist/` in `data_dir`, or downloads it there."""
        return load_femnist("femnist", ARCHIVE, (), data_dir, download)

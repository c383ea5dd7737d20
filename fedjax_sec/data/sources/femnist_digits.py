"""Federated EMNIST, digits only."""

from fedjax_sec.core import Dataset, registry
from fedjax_sec.data.source import Source
from fedjax_sec.data.sources._femnist import Archive, load_femnist

ARCHIVE = Archive(
    prefix="fed_emnist_digitsonly",
    sha256="55333deb8546765427c385710ca5e7301e16f4ed8b60c1dc5ae224b42bd5b14b",
    num_classes=10,
    official_sizes=(341873, 40832),
)


@registry.datasets.register("femnist_digits")
class FemnistDigits(Dataset):
    """Handwritten digits by their 3,383 writers: 28x28 grey images, 10 classes.

    The images are dark on light (background 1) and neither centred nor scaled as MNIST's are; they
    are kept so. Stored fractions k / 255 become the integers k, exactly. Every user has examples in
    both parts, and partition `natural` makes a client of every user with training examples.

    Read are TensorFlow Federated's files (which are what the sizes speak of) or LEAF's, with train/
    and test/ or whole, where every user's last tenth is the test part (a choice). LEAF's numbers of
    users and examples depend on how it was called; from all 62 classes, the digits are taken. Where
    neither is there, `femnist_writers.npz.xz` is read, some of LEAF's writers with LEAF's split,
    here or in `raw/leaf/` beside the data folder.

    Raises: `MissingDataError` (the message says how to get the data).

    Source: Caldas et al.: LEAF: A benchmark for federated settings (arXiv 1812.01097, 2018), after
    Cohen et al.: EMNIST (2017); digits and split as in TensorFlow Federated, which Ozdayi et al.
    2021 (RLR) use. No normalisation, as in RLR's author code.

    Example:
        >>> FemnistDigits().official_sizes
        (341873, 40832)
    """

    official_sizes = ARCHIVE.official_sizes  # without annotation, so that it is no field

    def load(self, data_dir: str | None = None, download: bool = True) -> Source:
        """Reads it from `femnist_digits/` or `femnist/` in `data_dir`, or downloads it there."""
        others = ("fed_emnist",)
        return load_femnist("femnist_digits", ARCHIVE, others, data_dir, download)

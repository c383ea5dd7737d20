"""CIFAR-10."""

from fedjax_sec.core import Dataset, registry
from fedjax_sec.data.source import Source
from fedjax_sec.data.sources._tfds import load_tfds


@registry.datasets.register("cifar10")
class Cifar10(Dataset):
    """Objects and animals: 32x32 colour images, 10 classes.

    Source: Krizhevsky: Learning multiple layers of features from tiny images (2009).

    Example:
        >>> Cifar10().official_sizes
        (50000, 10000)
    """

    official_sizes = (50000, 10000)  # without annotation, so that it is no field

    def load(self, data_dir: str | None = None, download: bool = True) -> Source:
        """Reads it from a folder prepared by tensorflow-datasets, or downloads it.

        Raises `MissingDataError` (the message says how to get the data).
        """
        return load_tfds(
            "cifar10",
            data_dir,
            download,
            numbered=True,
            num_classes=10,
            scale=255.0,
            # As in the author code of ALIE (Baruch et al. 2019); not the true moments.
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            official_sizes=self.official_sizes,
        )

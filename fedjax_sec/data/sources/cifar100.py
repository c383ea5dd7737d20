"""CIFAR-100."""

from fedjax_sec.core import Dataset, registry
from fedjax_sec.data.source import Source
from fedjax_sec.data.sources._tfds import load_tfds


@registry.datasets.register("cifar100")
class Cifar100(Dataset):
    """Objects and animals: 32x32 colour images, 100 (fine) classes.

    Source: Krizhevsky: Learning multiple layers of features from tiny images (2009).

    Example:
        >>> Cifar100().official_sizes
        (50000, 10000)
    """

    official_sizes = (50000, 10000)  # without annotation, so that it is no field

    def load(self, data_dir: str | None = None, download: bool = True) -> Source:
        """Reads it from a folder prepared by tensorflow-datasets, or downloads it.

        Raises `MissingDataError` (the message says how to get the data).
        """
        return load_tfds(
            "cifar100",
            data_dir,
            download,
            num_classes=100,
            scale=255.0,
            mean=(0.5071, 0.4865, 0.4409),
            std=(0.2673, 0.2564, 0.2762),
            official_sizes=self.official_sizes,
        )

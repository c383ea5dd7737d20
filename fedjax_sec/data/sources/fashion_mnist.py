"""Fashion-MNIST."""

from fedjax_sec.core import Dataset, registry
from fedjax_sec.data.source import Source
from fedjax_sec.data.sources._tfds import load_tfds


@registry.datasets.register("fashion_mnist")
class FashionMnist(Dataset):
    """Articles of clothing: 28x28 grey images, 10 classes.

    Source: Xiao, Rasul, Vollgraf: Fashion-MNIST: a novel image dataset for benchmarking machine
    learning algorithms (arXiv 1708.07747, 2017).

    Example:
        >>> FashionMnist().official_sizes
        (60000, 10000)
    """

    official_sizes = (60000, 10000)  # without annotation, so that it is no field

    def load(self, data_dir: str | None = None, download: bool = True) -> Source:
        """Reads it from a folder prepared by tensorflow-datasets, or downloads it.

        Raises `MissingDataError` (the message says how to get the data).
        """
        return load_tfds(
            "fashion_mnist",
            data_dir,
            download,
            num_classes=10,
            scale=255.0,
            mean=(0.2860,),
            std=(0.3530,),
            official_sizes=self.official_sizes,
        )

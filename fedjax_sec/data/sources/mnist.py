"""MNIST."""

from fedjax_sec.core import Dataset, registry
from fedjax_sec.data.source import Source
from fedjax_sec.data.sources._tfds import load_tfds


@registry.datasets.register("mnist")
class Mnist(Dataset):
    """Handwritten digits: 28x28 grey images, 10 classes.

    Source: LeCun, Bottou, Bengio, Haffner: Gradient-based learning applied to document recognition
    (Proceedings of the IEEE, 1998).

    Example:
        >>> Mnist().official_sizes
        (60000, 10000)
    """

    official_sizes = (60000, 10000)  # without annotation, so that it is no field

    def load(self, data_dir: str | None = None, download: bool = True) -> Source:
        """Reads it from a folder prepared by tensorflow-datasets, or downloads it.

        Raises `MissingDataError` (the message says how to get the data).
        """
        return load_tfds(
            "mnist",
            data_dir,
            download,
            num_classes=10,
            scale=255.0,
            mean=(0.1307,),
            std=(0.3081,),
            official_sizes=self.official_sizes,
        )

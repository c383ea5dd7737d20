"""CH-MNIST: small grey images of tissue."""

import numpy as np

from fedjax_sec.core import Dataset, registry
from fedjax_sec.data.source import MissingDataError, Source
from fedjax_sec.data.sources._tfds import load_arrays

TFDS = "colorectal_histology"
SIDE, TRAIN = 64, 4000


@registry.datasets.register("ch_mnist")
class ChMnist(Dataset):
    """Histology tiles of colorectal cancer: 64x64 grey images, 8 classes, 4,000 and 1,000.

    tensorflow-datasets holds the 5,000 tiles in colour at 150x150 under `colorectal_histology`.
    They are made grey by luminance (ITU-R 601) and made smaller by bilinear interpolation with
    antialiasing; both are choices, since the paper only gives the result's size. "4,000 images
    selected randomly" are drawn once, the same for every run. Classes are in tfds's order.

    Source: Kather et al.: Multi-class texture analysis in colorectal cancer histology (Scientific
    Reports 6, 2016); as in Cao et al. 2021 (FLTrust), Section VI-A.

    Example:
        >>> ChMnist().official_sizes
        (4000, 1000)
    """

    official_sizes = (TRAIN, 1000)  # without annotation, so that it is no field

    def load(self, data_dir: str | None = None, download: bool = True) -> Source:
        """Reads it from a folder prepared by tensorflow-datasets, or downloads it (246 MiB).

        Raises `MissingDataError` (the message says how to get the data).
        """
        try:
            arrays, origin = load_arrays(TFDS, data_dir, download, ("train",), small_and_grey)
        except MissingDataError as error:
            raise MissingDataError(f"Data set 'ch_mnist' is made from {TFDS}. {error}") from error
        x, y = arrays["x_train"], arrays["y_train"]
        # RandomState, because NumPy freezes its stream for ever; Generator's may change.
        order = np.random.RandomState(0).permutation(len(y))
        cut = len(y) * TRAIN // sum(self.official_sizes)
        train, test = np.sort(order[:cut]), np.sort(order[cut:])
        return Source(
            name="ch_mnist",
            x_train=x[train],
            y_train=y[train],
            x_test=x[test],
            y_test=y[test],
            num_classes=8,
            scale=255.0,
            mean=(0.5,),
            std=(0.5,),
            official_sizes=self.official_sizes,
            origin=origin,
        )


def small_and_grey(image: np.ndarray) -> np.ndarray:
    """A colour image uint8 [H, W, 3] as uint8 [64, 64, 1].

    >>> small_and_grey(np.full((150, 150, 3), [255, 0, 0], np.uint8))[0, 0].tolist()
    [76]
    """
    from PIL import Image  # slow to import; tensorflow-datasets decodes with it

    grey = Image.fromarray(image).convert("L")
    return np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BILINEAR))[..., None]

"""Southwest Airlines' aeroplanes."""

import numpy as np

from fedjax_sec.core import Dataset, registry
from fedjax_sec.data.source import MissingDataError, Source
from fedjax_sec.data.sources._edge_cases import download as get
from fedjax_sec.data.sources._edge_cases import find, missing, read_pickle, read_table
from fedjax_sec.data.sources._tfds import data_root

TABLE = "southwest.npz.xz"
URL = (
    "https://raw.githubusercontent.com/ksreenivasan/OOD_Federated_Learning/"
    "90969695cf0f1c5b009744fc2ccd4fbde817b8cb/saved_datasets/"
)
PICKLES = {  # file of the authors' repository -> SHA-256
    "southwest_images_new_train.pkl": (
        "4dfb293d5bfc073cb26f9019d37b7660bb4cfbe4b8d0cf9843523e884539b26a"
    ),
    "southwest_images_new_test.pkl": (
        "cad0410ce01bd53af349fd2094799a8c58c508ae39ec1c01d038868cb1e5d64d"
    ),
}
SIZES = (784, 196)


@registry.datasets.register("southwest")
class Southwest(Dataset):
    """Aeroplanes of Southwest Airlines, 32x32 colour images, for an attacker to use on CIFAR-10.

    784 training and 196 test images, all of CIFAR-10's class 0 (aeroplane): 196 and 49 pictures,
    each with its rotations by 90, 180 and 270 degrees. One picture is in both parts: test images
    140 to 143 are also training images.

    Reads, in the folder `edge_cases/` of the data folder, `southwest.npz.xz` (`x_train`, `x_test`)
    or the authors' `southwest_images_new_train.pkl` and `_test.pkl`, also in `saved_datasets/`
    there, which are downloaded where they are missing (3 MB). Of the pickles only arrays are read.

    Raises: `MissingDataError` (the message says how to get the data).

    Source: Wang et al. 2020 (Attack of the Tails), Section 4; the images are those of the author
    code (`ksreenivasan/OOD_Federated_Learning`, `utils.py`, `load_poisoned_dataset`).

    Example:
        >>> Southwest().official_sizes
        (784, 196)
    """

    official_sizes = SIZES  # without annotation, so that it is no field

    def load(self, data_dir: str | None = None, download: bool = True) -> Source:
        """Reads the arrays or the pickles, or downloads these."""
        root = data_root(data_dir)
        try:
            x_train, x_test = _read(root, download)
            for x, count in ((x_train, SIZES[0]), (x_test, SIZES[1])):
                if x.shape != (count, 32, 32, 3) or x.dtype != np.uint8:
                    raise ValueError(f"its images are {x.dtype} {x.shape}")
        except MissingDataError:
            raise
        except Exception as error:  # pickle and lzma raise whatever damaged bytes make them raise
            remedy = f"Put {' and '.join(PICKLES)} there, from {URL} (3 MB together)"
            raise missing("southwest", root, error, remedy) from error
        return Source(
            name="southwest",
            x_train=x_train,
            y_train=np.zeros(len(x_train), np.int32),
            x_test=x_test,
            y_test=np.zeros(len(x_test), np.int32),
            num_classes=10,
            scale=255.0,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            official_sizes=self.official_sizes,
            origin="Wang et al. 2020, author code",
            all_classes=False,
        )


def _read(root, download: bool):
    if (table := find(root, [TABLE])) is not None:
        shapes = {
            f"x_{part}": (n, 32, 32, 3) for part, n in zip(("train", "test"), SIZES, strict=True)
        }
        arrays = read_table(table[0], shapes)
        return arrays["x_train"], arrays["x_test"]
    paths = find(root, PICKLES)
    if paths is None:
        if not download:
            raise FileNotFoundError("it is not there, and downloading is switched off")
        paths = get(root, URL, PICKLES)
    return tuple(read_pickle(path) for path in paths)

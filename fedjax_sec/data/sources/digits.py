"""Digits: the small data set that is always there."""

from importlib.metadata import distribution

import numpy as np

from fedjax_sec.core import Dataset, registry
from fedjax_sec.data.source import Source

FILE = "sklearn/datasets/data/digits.csv.gz"
MEAN, STD = 0.3054, 0.3759  # of the training part, in [0, 1] pixel units


@registry.datasets.register("digits")
class Digits(Dataset):
    """Handwritten digits of scikit-learn: 1797 grey images of 8x8 pixels, 10 classes.

    It is embedded in scikit-learn and needs no download, so tests and first steps use it. It has no
    official split: training and test part (1437 and 360, classes balanced as in the whole) are our
    choice, the same for every run and every seed.

    Source: Alpaydin, Kaynak: Optical recognition of handwritten digits (UCI repository, 1998), its
    test part.

    Example:
        >>> source = Digits().load()
        >>> source.x_train.shape, source.x_test.shape, int(source.x_train.max())
        ((1437, 8, 8, 1), (360, 8, 8, 1), 16)
    """

    official_sizes = (1437, 360)  # without annotation, so that it is no field

    def load(self, data_dir: str | None = None, download: bool = True) -> Source:
        """Returns the embedded images; both arguments are accepted and have no effect."""
        # Its file and not `load_digits`, for which scikit-learn is imported: two seconds.
        table = np.loadtxt(distribution("scikit-learn").locate_file(FILE), np.uint8, delimiter=",")
        x, y = table[:, :-1].reshape(-1, 8, 8, 1), table[:, -1].astype(np.int32)
        train, test = _split(y)
        return Source(
            name="digits",
            x_train=x[train],
            y_train=y[train],
            x_test=x[test],
            y_test=y[test],
            num_classes=10,
            scale=16.0,
            mean=(MEAN,),
            std=(STD,),
            official_sizes=self.official_sizes,
            origin="scikit-learn load_digits",
        )


def _split(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the training and test images, shuffled; a fifth of each class for testing."""
    # RandomState, because NumPy freezes its stream for ever; Generator's may change.
    order = np.random.RandomState(0).permutation(len(y))
    by_class = order[np.argsort(y[order], kind="stable")]
    is_test = np.zeros(len(y), bool)
    is_test[by_class[::5]] = True
    return order[~is_test[order]], order[is_test[order]]

"""Cars of CIFAR-10 with a feature that makes them a semantic backdoor."""

import numpy as np

from fedjax_sec.core import Dataset, registry, static
from fedjax_sec.data.source import MissingDataError, Source
from fedjax_sec.data.sources._edge_cases import find, missing, read_table
from fedjax_sec.data.sources._tfds import data_root

TABLE = "cifar10_semantic.npz.xz"
#: Positions in CIFAR-10's training part, in the authors' order: those trained and tested on.
INDICES = {
    "wall": ("30696 33105 33615 33907 36848 40713 41706", "330 568 3934 12336 30560"),
    "green": (
        "389 561 874 1605 3378 3678 4528 9744 19165 19500 21422 22984 32941 34287 34385 36005 "
        "37365 37533 38658 38735 39824 40138 41336",
        "41861 47001 47026 48003 48030 49163 49588",
    ),
    "racing": (
        "2180 2771 3233 4932 6241 6813 6869 9476 11395 11744 14209 14238 18716 19793 20781 21529 "
        "31311",
        "40518 40633 42119 42663 49392",
    ),
}
CAR = 1


@registry.datasets.register("cifar10_semantic")
class Cifar10Semantic(Dataset):
    """Cars of CIFAR-10 before a striped wall, green, or with racing stripes: for attackers.

    All are of CIFAR-10's training part and of class 1 (automobile): `wall` has 7 images to train
    on and 5 to test, `green` 23 and 7, `racing` 17 and 5. An attack that uses them on `cifar10`
    withholds all images of its feature from clients and server.

    Reads `cifar10_semantic.npz.xz` (`x`, `index`) in the folder `edge_cases/` of the data folder,
    or takes the images out of CIFAR-10 itself, which must then hold all of them.

    Raises: `MissingDataError` (the message says how to get the data).

    Source: Bagdasaryan et al. 2020 (How to backdoor federated learning), Section 5; the images of
    the author code, `utils/params.yaml` (wall, with its split) and `utils/params_runner.yaml` (all
    three, trained and tested on the same images). The split of `green` and `racing`, the last
    quarter for testing, is a choice.

    Example:
        >>> from fedjax_sec.core import registry
        >>> registry.datasets.build({"name": "cifar10_semantic", "feature": "wall"}).feature
        'wall'
    """

    feature: str = static("wall", "What the cars have in common.", choices=tuple(INDICES))

    def load(self, data_dir: str | None = None, download: bool = True) -> Source:
        """Reads the images of the feature."""
        root = data_root(data_dir)
        wanted = [np.array(ids.split(), np.int32) for ids in INDICES[self.feature]]
        try:
            ids, x = _read(root, data_dir, download)
            places = {number: place for place, number in enumerate(ids.tolist())}
            if lost := [i for part in wanted for i in part.tolist() if i not in places]:
                raise ValueError(f"image {lost[0]} of the training part is not among those there")
        except Exception as error:  # NumPy and lzma raise whatever damaged bytes make them raise
            remedy = f"Put {TABLE} there, or all of CIFAR-10 as for the data set 'cifar10'"
            raise missing("cifar10_semantic", root, error, remedy) from error
        train, test = (x[[places[i] for i in part.tolist()]] for part in wanted)
        return Source(
            name="cifar10_semantic",
            x_train=train,
            y_train=np.full(len(train), CAR, np.int32),
            x_test=test,
            y_test=np.full(len(test), CAR, np.int32),
            num_classes=10,
            scale=255.0,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            official_sizes=(len(train), len(test)),
            origin=f"CIFAR-10, {self.feature} cars of Bagdasaryan et al. 2020",
            ids_train=wanted[0],
            ids_test=wanted[1],
            taken_from="cifar10",
            all_classes=False,
        )


def _read(root, data_dir, download: bool) -> tuple[np.ndarray, np.ndarray]:
    """Positions in CIFAR-10's training part, and the images there."""
    if (table := find(root, [TABLE])) is not None:
        count = sum(len(ids.split()) for both in INDICES.values() for ids in both)
        arrays = read_table(table[0], {"x": (count, 32, 32, 3), "index": (count,)})
        return arrays["index"], arrays["x"]
    cifar = registry.datasets.build("cifar10").load(data_dir, download)
    if cifar.ids_train is None:
        raise MissingDataError("CIFAR-10 was prepared without the numbers of its images")
    return cifar.ids_train, cifar.x_train

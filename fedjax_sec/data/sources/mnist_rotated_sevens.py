"""MNIST's sevens, thickened and rotated."""

from fedjax_sec.core import Dataset, registry, static
from fedjax_sec.data.source import MissingDataError, Source
from fedjax_sec.data.sources._rotated import rotated_sevens


@registry.datasets.register("mnist_rotated_sevens")
class MnistRotatedSevens(Dataset):
    """MNIST's sevens, thickened and rotated: an edge case made of MNIST alone, for attackers.

    It stands in for ARDIS's sevens where these cannot be had, and is not them. Training images are
    made of MNIST's training part, test images of its test part; the clients keep the upright ones.

    Raises: `MissingDataError` (the message says how to get MNIST).

    Source: none, a choice, as are rotation and thickening (each pixel becomes the largest of itself
    and its four neighbours).

    Example:
        >>> from fedjax_sec.core import registry
        >>> registry.datasets.build("mnist_rotated_sevens").degrees
        45.0
    """

    degrees: float = static(45.0, "Rotation, counter-clockwise.", low=-180, high=180)
    thick: bool = static(True, "Thicken the strokes before the rotation.")

    def load(self, data_dir: str | None = None, download: bool = True) -> Source:
        """Reads MNIST as `mnist` does."""
        try:
            mnist = registry.datasets.build("mnist").load(data_dir, download)
        except MissingDataError as error:
            raise MissingDataError(
                f"Data set 'mnist_rotated_sevens' needs MNIST. {error}"
            ) from error
        return rotated_sevens(mnist, "mnist_rotated_sevens", self.degrees, self.thick)

"""The embedded digits' sevens, rotated."""

from fedjax_sec.core import Dataset, registry, static
from fedjax_sec.data.source import Source
from fedjax_sec.data.sources._rotated import rotated_sevens


@registry.datasets.register("digits_rotated_sevens")
class DigitsRotatedSevens(Dataset):
    """Sevens of the data set `digits`, rotated: an edge case that needs no files, for attackers.

    Training images are made of its training part, test images of its test part; the clients keep
    the upright ones.

    Source: none, a choice, as is the rotation.

    Example:
        >>> source = DigitsRotatedSevens().load()
        >>> source.x_train.shape, set(source.y_train.tolist())
        ((143, 8, 8, 1), {7})
    """

    degrees: float = static(45.0, "Rotation, counter-clockwise.", low=-180, high=180)

    def load(self, data_dir: str | None = None, download: bool = True) -> Source:
        """Returns the images; both arguments are accepted and have no effect."""
        digits = registry.datasets.build("digits").load()
        return rotated_sevens(digits, "digits_rotated_sevens", self.degrees, thick=False)

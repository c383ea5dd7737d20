"""NumPy arrays that were given from Python."""

from fedjax_sec.core import Dataset, registry, static
from fedjax_sec.data.arrays import NAME, given_by
from fedjax_sec.data.source import MissingDataError, Source


@registry.datasets.register(NAME)
class Arrays(Dataset):
    """Arrays given from Python: `fedjax_sec.run(config, data=fedjax_sec.data.arrays(...))`.

    A configuration holds a digest of their content, not the arrays: they are there in the process
    that gave them, and a run that is taken up again needs the same ones, to the last bit.

    Raises: `MissingDataError` where arrays with this digest have not been given.

    Source: whatever the user's arrays are from.

    Example:
        >>> import numpy as np
        >>> import fedjax_sec
        >>> x, y = np.eye(4, dtype=np.float32), np.arange(4) % 2
        >>> data = fedjax_sec.data.arrays(x, y, x, y)
        >>> config = {"data": {"num_clients": 2}, "client": {"batch_size": 2}, "rounds": 1}
        >>> fedjax_sec.run(config, data=data).experiment.data.name
        'arrays'
    """

    stands_alone = False

    digest: str = static("", "Digest of the arrays' content, as `run` writes it.")

    def load(self, data_dir: str | None = None, download: bool = True) -> Source:
        """The arrays; both arguments are accepted and have no effect."""
        source = given_by(self.digest)
        if source is None:
            named = f"with the digest {self.digest!r} " if self.digest else ""
            raise MissingDataError(
                f"data: arrays {named}are not in this process; give them again: "
                f"fedjax_sec.run(config, data=fedjax_sec.data.arrays(x_train, y_train, x_test, "
                f"y_test, ...)), with the same content."
            )
        return source

"""Data sets as plain NumPy arrays, and their packing into padded client arrays `[N, M, ...]`.

One file a data set; `_tfds` reads the prepared folders of tensorflow-datasets without TensorFlow,
`packing` turns a partition of the training set into arrays, `arrays` makes a data set of a user's.
"""

from fedjax_sec.data.arrays import arrays
from fedjax_sec.data.source import MissingDataError, Source, checked, take

__all__ = ["MissingDataError", "Source", "arrays", "checked", "take"]

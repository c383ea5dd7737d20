"""Digits rotated and thickened: what stands in for an edge case where its files are absent."""

import numpy as np

from fedjax_sec.data.source import Source

LABEL = 7


def rotated(images: np.ndarray, degrees: float) -> np.ndarray:
    """The images [n, H, W, C] rotated counter-clockwise about their centres, zero around them.

    Pixels are interpolated between the four nearest ones.

    >>> image = np.arange(4, dtype=np.uint8).reshape(1, 2, 2, 1)
    >>> rotated(image, 90.0)[0, :, :, 0].tolist()
    [[1, 3], [0, 2]]
    """
    height, width = images.shape[1:3]
    middle = (height - 1) / 2, (width - 1) / 2
    rows, columns = np.indices((height, width))
    rows, columns = rows - middle[0], columns - middle[1]
    angle = np.deg2rad(degrees)
    cosine, sine = np.round([np.cos(angle), np.sin(angle)], 12)
    at_row = cosine * rows + sine * columns + middle[0]
    at_column = -sine * rows + cosine * columns + middle[1]
    padded = np.pad(images.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    low_row, low_column = np.floor(at_row), np.floor(at_column)
    out = np.zeros(images.shape)
    for row in (0, 1):
        for column in (0, 1):
            r, c = low_row + row, low_column + column
            share = (1 - np.abs(at_row - r)) * (1 - np.abs(at_column - c))
            r = np.clip(r + 1, 0, height + 1).astype(int)  # beyond the frame all is zero
            c = np.clip(c + 1, 0, width + 1).astype(int)
            out += share[None, :, :, None] * padded[:, r, c]
    return np.rint(out).astype(images.dtype)


def thickened(images: np.ndarray) -> np.ndarray:
    """Each pixel becomes the largest of itself and its four neighbours.

    >>> thickened(np.eye(3, dtype=np.uint8)[None, :, :, None])[0, :, :, 0].tolist()
    [[1, 1, 0], [1, 1, 1], [0, 1, 1]]
    """
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = (padded[:, 1:-1, 2:], padded[:, 1:-1, :-2], padded[:, 2:, 1:-1], padded[:, :-2, 1:-1])
    return np.maximum.reduce([images, *shifted])


def rotated_sevens(source: Source, name: str, degrees: float, thick: bool) -> Source:
    """The sevens of both parts of a data set, thickened and rotated."""
    arrays = {}
    for part in ("train", "test"):
        chosen = getattr(source, f"y_{part}") == LABEL
        images = getattr(source, f"x_{part}")[chosen]
        images = rotated(thickened(images) if thick else images, degrees)
        arrays |= {
            f"x_{part}": images,
            f"y_{part}": np.full(len(images), LABEL, np.int32),
        }
    sizes = len(arrays["y_train"]), len(arrays["y_test"])
    how = f"thickened and rotated by {degrees:g}" if thick else f"rotated by {degrees:g}"
    return source._replace(
        name=name,
        origin=f"sevens of {source.label}, {how} degrees",
        official_sizes=sizes,
        all_classes=False,
        **arrays,
    )

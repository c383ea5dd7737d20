"""Shapes of trigger patterns: lists of pixels (row, column), and drawn marks."""

import numpy as np

#: Row, column (upper left corner) and size where the authors put a pattern, by the images' height.
#: Sources: RLR author code, `src/utils.py`, `add_pattern_bd` (Fashion-MNIST and CIFAR10).
PLACES = {
    ("plus", 28): (5, 3, 5),
    ("plus", 32): (5, 2, 7),
    ("square", 28): (21, 21, 5),
}


def default_place(pattern: str, height: int, width: int) -> tuple[int, int, int]:
    """The authors' place and size; for other images that of 28 x 28 ones, scaled (a choice).

    >>> default_place("plus", 28, 28), default_place("plus", 8, 8)
    ((5, 3, 5), (1, 1, 3))
    """
    if height == width and (pattern, height) in PLACES:
        return PLACES[pattern, height]
    row, column, size = (part / 28 for part in PLACES[pattern, 28])
    side = min(height, width)
    if pattern == "plus":  # odd, to have a centre
        size = 2 * max(round((size * side - 1) / 2), 1) + 1
    else:
        size = max(round(size * side), 1)
    return min(round(row * height), height - size), min(round(column * width), width - size), size


def plus(row: int, column: int, size: int) -> list[tuple[int, int]]:
    """A plus in the square at (row, column): down the vertical bar, the left arm, the right arm.

    >>> plus(0, 0, 3)
    [(0, 1), (1, 1), (2, 1), (1, 0), (1, 2)]
    """
    half = size // 2
    vertical = [(row + i, column + half) for i in range(size)]
    return vertical + [(row + half, column + i) for i in range(size) if i != half]


def square(row: int, column: int, size: int) -> list[tuple[int, int]]:
    """A filled square, row by row."""
    return [(row + i, column + j) for i in range(size) for j in range(size)]


def author_parts(row: int, column: int, size: int) -> list[list[tuple[int, int]]]:
    """The four parts of a plus in the RLR author code: they overlap around its centre.

    Upper vertical with the centre, lower vertical, left horizontal beyond the centre, right
    horizontal from the centre on.

    >>> [len(part) for part in author_parts(5, 2, 7)]
    [4, 3, 5, 4]
    """
    half, quarter = size // 2, (size - 1) // 4
    vertical = [(row + i, column + half) for i in range(size)]
    horizontal = [(row + half, column + i) for i in range(size)]
    return [
        vertical[: half + 1],
        vertical[half + 1 :],
        horizontal[: half + quarter + 1],
        horizontal[half - quarter + 1 :],
    ]


def cut(pixels: list, parts: int) -> list[list]:
    """The list in `parts` consecutive pieces whose lengths differ by at most one.

    >>> cut([1, 2, 3, 4, 5], 2)
    [[1, 2, 3], [4, 5]]
    """
    ends = np.cumsum([len(pixels) // parts + (i < len(pixels) % parts) for i in range(parts)])
    return [pixels[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def draw(name: str, height: int, width: int) -> np.ndarray:
    """A mark over the whole image, [H, W] in [0, 1] with soft edges.

    `copyright` is a ring around a letter C, `apple` a bitten fruit with a leaf; both are our own
    drawings, on a canvas of 28 x 28 that is stretched to the image.
    """
    rows = (np.arange(height)[:, None] + 0.5) * 28 / height
    columns = (np.arange(width)[None, :] + 0.5) * 28 / width

    def disc(row, column, radius):  # signed distance, negative inside
        return np.hypot(rows - row, columns - column) - radius

    def arc(radius, thickness):
        return np.abs(disc(14, 14, radius)) - thickness / 2

    if name == "copyright":
        letter = np.where(columns - 14 > 1.2 * np.abs(rows - 14), 28.0, arc(5.5, 2.4))
        distance = np.minimum(arc(11.5, 2.0), letter)
    else:
        body = np.minimum(disc(17, 10.5, 7.0), disc(17, 17.0, 7.0))
        body = np.maximum(body, -disc(15, 24.5, 4.5))
        leaf = np.maximum(disc(9.5, 13.0, 6.5), disc(3.0, 19.0, 6.0))
        distance = np.minimum(body, leaf)
    scale = min(height, width) / 28
    return np.clip(0.5 - distance * scale, 0.0, 1.0).astype(np.float32)

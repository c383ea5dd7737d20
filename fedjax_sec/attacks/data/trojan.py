"""Trojan backdoor: a pattern on images of one class, whole or shared out among the adversary."""

import jax.numpy as jnp
import numpy as np

from fedjax_sec.attacks.data._patterns import author_parts, cut, default_place, draw, plus, square
from fedjax_sec.core import COUNT, ConfigError, Trigger, numeric, registry, static

PLACED, DRAWN = ("plus", "square"), ("copyright", "apple")


@registry.attacks.register("trojan")
class Trojan(Trigger):
    r"""Stamps a pattern on images of class `base`, which are to be read as class `target`.

    Every malicious client stamps floor(`fraction` * n) of its n images of the class, the same ones
    in every round, and relabels them. Success is the share of all test images of the class,
    stamped with the whole pattern, that are read as `target`. Images are [B, H, W, C] in [0, 1].

    `plus` and `square` set their pixels to `value`, and so does `pixels`, a list of your own; with
    `added` they add it to what is there. The marks `copyright` and `apple` cover the image and are
    added: x + (2 value - 1) mark, so value 1 adds and value 0 subtracts. Sums are clipped to
    [0, 1].

    Distributed backdoor: with `split` > 1 the pattern falls into so many parts, and malicious
    client number r (by client id, from 0) stamps part r mod `split`. The parts are consecutive
    pieces of the list of pixels (of a plus: vertical bar downwards, left arm, right arm; so 4 parts
    are its arms), and bands of rows of a mark.

    Inside `alie_backdoor` the attacker trains on `num_images` images drawn from the data it sees;
    those of the class are stamped with the whole pattern, the others stay as they are.

    Raises: `ConfigError` for a pattern that does not fit the images, a class that is its own
    target or that does not exist, more parts than malicious clients, and fields that would do
    nothing.

    Source: Ozdayi, Kantarcioglu, Gel 2021 (robust learning rate), Section 4 and Figure 1; places,
    values, square and marks from the author code (`src/utils.py`, `add_pattern_bd`). Fashion-MNIST:
    a plus on rows 5 to 9 of column 5 and columns 3 to 7 of row 7, white, 5 -> 7. CIFAR10: rows 5 to
    11 of column 5, columns 2 to 8 of row 8, black, 5 -> 7. Federated EMNIST (dark on light):
    `place: [8, 6]`, `size: 5`, `value: 0`, 1 -> 7; use value 1 where digits are light on dark, as
    in MNIST. The marks are our drawings in place of the author's image files, whose uint8 sum
    wraps around: `overflow: wrap`. Distributed: Xie et al. 2019; `parts: author` are the RLR
    code's four parts of a plus, which overlap. `added`: CRFL's author code (AI-secure/CRFL,
    `utils/image_helper.py`, `add_pixel_pattern`), which adds delta / sqrt(number of pixels) to
    each, so that delta is the norm of the pattern. Defaults of `base`, `target` are choices.

    Example:
        >>> import jax.numpy as jnp
        >>> from fedjax_sec.core import registry
        >>> trojan = registry.attacks.build({"name": "trojan", "place": [0, 0], "size": 3})
        >>> print(trojan.trigger((), jnp.zeros((1, 4, 4, 1)))[0, :, :, 0])
        [[0. 1. 0. 0.]
         [1. 1. 1. 0.]
         [0. 1. 0. 0.]
         [0. 0. 0. 0.]]
    """

    inputs = frozenset({"pixels"})
    pattern: str = static(
        "plus", "Its shape; `pixels`: the list of that name.", choices=(*PLACED, *DRAWN, "pixels")
    )
    base: int | None = static(
        None, "Class of the images that are stamped (null: all).", low=0, high=COUNT
    )
    target: int = static(0, "The attacker's label.", low=0, high=COUNT)
    fraction: float = numeric(
        0.5, "P, share of a malicious client's images of the class.", above=0, high=1
    )
    place: tuple[int, ...] | None = static(
        None,
        "[row, column] of the upper left corner of plus or square (null: the author's for images "
        "of 28 and 32 pixels, else scaled).",
        low=0,
        high=1023,
    )
    size: int | None = static(
        None, "Height and width of plus or square (null: as `place`).", low=1, high=1023
    )
    pixels: tuple[tuple[int, ...], ...] | None = static(
        None, "A list of [row, column], for pattern `pixels`.", low=0, high=1023
    )
    value: float | None = numeric(
        None, "Pixel value (null: 1 on grey images, 0 on coloured ones).", low=0, high=1
    )
    added: float | None = numeric(
        None,
        "Added to the pixels of plus, square or `pixels`, which are not set then (null: set).",
        low=-1,
        high=1,
    )
    overflow: str = static(
        "clip", "Sums of image and mark: `clip`, or `wrap` modulo 256.", choices=("clip", "wrap")
    )
    split: int = static(1, "Parts that the malicious clients share out.", low=1, high=COUNT)
    parts: str = static(
        "equal", "Parts of equal length, or the `author`'s of a plus.", choices=("equal", "author")
    )
    num_images: int = static(
        1000, "Images an `alie_backdoor` trains on in a round.", low=1, high=10**6
    )

    def check(self, path, setting):
        self._check_fields(path)
        if self.base == self.target:
            raise ConfigError(
                f"{path}.target must differ from base, the images' own class; both are {self.base}."
            )
        if setting.num_malicious is not None and self.split > setting.num_malicious:
            raise ConfigError(
                f"{path}.split must be <= {setting.num_malicious}, the malicious clients, got "
                f"{self.split}; the other parts would be stamped by nobody."
            )
        if setting.num_classes is not None:
            for name, label in (("base", self.base), ("target", self.target)):
                if label is not None and label >= setting.num_classes:
                    raise ConfigError(
                        f"{path}.{name} must be < {setting.num_classes}, the number of classes, "
                        f"got {label}."
                    )
        if setting.example_shape is not None:
            self._check_fits(path, setting.example_shape)

    def _check_fields(self, path):
        if (self.pattern == "pixels") != (self.pixels is not None):
            raise ConfigError(
                f"{path}.pixels belongs to pattern 'pixels', and to that only; got pattern="
                f"{self.pattern!r}, pixels={self.pixels}."
            )
        for i, pixel in enumerate(self.pixels or ()):
            if len(pixel) != 2:
                raise ConfigError(f"{path}.pixels[{i}] must be [row, column], got {list(pixel)}.")
        if self.pixels is not None and len(set(self.pixels)) < max(len(self.pixels), 1):
            raise ConfigError(f"{path}.pixels must hold pixels, each once, got {self.pixels}.")
        if self.pattern not in PLACED:
            for name in ("place", "size"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"{path}.{name} is read by the patterns {', '.join(PLACED)} only, got "
                        f"pattern={self.pattern!r}."
                    )
        elif (self.place is None) != (self.size is None):
            raise ConfigError(
                f"{path}: give both of place and size or neither, got place={self.place}, "
                f"size={self.size}."
            )
        elif self.place is not None and len(self.place) != 2:
            raise ConfigError(f"{path}.place must be [row, column], got {list(self.place)}.")
        if (
            self.pattern == "plus"
            and self.size is not None
            and (self.size < 3 or not self.size % 2)
        ):
            raise ConfigError(f"{path}.size of a plus must be odd and >= 3, got {self.size}.")
        if self.added is not None and (self.pattern in DRAWN or self.value is not None):
            raise ConfigError(
                f"{path}.added is added to the pixels of plus, square or 'pixels', in place of "
                f"value; got pattern={self.pattern!r}, value={self.value}."
            )
        if self.overflow == "wrap" and self.pattern not in DRAWN:
            raise ConfigError(
                f"{path}.overflow is read by the patterns {', '.join(DRAWN)} only, got pattern="
                f"{self.pattern!r}."
            )
        if self.parts == "author" and (self.pattern != "plus" or self.split != 4):
            raise ConfigError(
                f"{path}.parts 'author' are 4 parts of a plus, got pattern={self.pattern!r}, "
                f"split={self.split}."
            )

    def _check_fits(self, path, shape):
        if len(shape) != 3:
            raise ConfigError(f"{path}: trojan needs images [H, W, C], got examples {shape}.")
        height, width, _ = shape
        pieces = self._pieces(height, width)
        for row, column in (pixel for piece in pieces for pixel in piece):
            if not (0 <= row < height and 0 <= column < width):
                raise ConfigError(
                    f"{path}: the pattern {self.pattern!r} reaches pixel [{row}, {column}] and "
                    f"does not fit images of {height} x {width} pixels; change place and size, "
                    f"or pixels."
                )
        if min(len(piece) for piece in pieces) == 0:
            total = sum(len(piece) for piece in pieces)
            raise ConfigError(
                f"{path}.split must be <= {total}, what the pattern can be cut into, got "
                f"{self.split}."
            )

    def _pieces(self, height, width) -> list[list[tuple[int, int]]]:
        """The pixels of each part; of a mark, the band that it covers."""
        if self.pattern == "pixels":
            return cut(list(self.pixels), self.split)
        if self.pattern in DRAWN:
            bands = cut(list(range(height)), self.split)
            return [[(row, column) for row in band for column in range(width)] for band in bands]
        given = default_place(self.pattern, height, width)
        where = given if self.place is None else (*self.place, self.size)
        if self.parts == "author":
            return author_parts(*where)
        return cut((plus if self.pattern == "plus" else square)(*where), self.split)

    def marks(self, height, width) -> np.ndarray:
        """How strongly each part covers each pixel, in [0, 1]: [split, H, W]."""
        pieces = self._pieces(height, width)
        covers = np.zeros((len(pieces), height, width), np.float32)
        for mark, piece in zip(covers, pieces, strict=True):
            mark[tuple(np.array(piece).T)] = 1.0
        return covers * draw(self.pattern, height, width) if self.pattern in DRAWN else covers

    def trigger(self, state, x, rank=None, task=None):
        """The images with the whole pattern, or with the part of malicious client `rank`."""
        marks = self.marks(*x.shape[1:3])
        mark = marks.max(0) if rank is None else jnp.asarray(marks)[rank % len(marks)]
        mark = jnp.asarray(mark)[None, :, :, None]
        value = (1.0 if x.shape[-1] == 1 else 0.0) if self.value is None else self.value
        if self.added is not None:
            return jnp.clip(x + self.added * mark, 0.0, 1.0)
        if self.pattern not in DRAWN:
            return jnp.where(mark > 0, value, x)
        added = (2 * value - 1) * mark
        if self.overflow == "wrap":  # both as bytes, like the author's files
            return jnp.mod(jnp.round(255 * x) + jnp.round(255 * added), 256) / 255
        return jnp.clip(x + added, 0.0, 1.0)

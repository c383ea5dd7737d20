"""The arrays of a data set together with what is needed to use and to cite them honestly."""

import math
import numbers
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fedjax_sec.core import ConfigError, registry, suggestion
from fedjax_sec.core.advice import one_line, shown
from fedjax_sec.core.components import INPUTS
from fedjax_sec.core.types import InputSpec

_PARTS = ("train", "test")


class MissingDataError(FileNotFoundError, ValueError):
    """A data set that is neither on this machine nor obtainable; the message says how to get it."""


class Source(NamedTuple):
    """A labelled data set on the host, split into training and test part.

    Pixels stay integers (features of other kinds are as they are); `x / scale` lies in [0, 1], and
    `mean` and `std` (a number a channel, in those units) normalise it at the model's entry.
    `official_sizes` are those of the full data set,
    so that a result obtained on a part of it can always be told from one obtained on all of it.
    Where the data set says who made an example, `users_train` and `users_test` number its users
    from 0, the same in both parts.

    Where the data set numbers its examples, `ids_train` and `ids_test` are these numbers, in the
    order in which it is published. Images that were taken out of another data set's training part
    name it in `taken_from`, their ids being its numbers. `all_classes` is false where some classes
    have no example, as in images that only an attacker uses.

    Sequences of tokens (`kind="tokens"`) are integers [T, L] from 0 to `num_classes` - 1, and so
    are the targets `y [T, L]`, -1 where a sequence has ended; `task` is then `language_model`. With
    `task="classification"` a sequence has one class instead, `y [T]`.

    >>> source = Source(
    ...     "toy", np.zeros((6, 2, 2, 1), np.uint8), np.zeros(6, np.int32),
    ...     np.zeros((2, 2, 2, 1), np.uint8), np.zeros(2, np.int32),
    ...     num_classes=2, scale=255.0, mean=(0.5,), std=(0.5,), official_sizes=(6, 2),
    ...     origin="nowhere",
    ... )
    >>> source.is_subset, source.label
    (False, 'toy')
    """

    name: str
    x_train: np.ndarray  # [T, ...]: images uint8 [T, H, W, C], features float32 [T, F]
    y_train: np.ndarray  # int32 [T]
    x_test: np.ndarray  # [E, ...]
    y_test: np.ndarray  # int32 [E]
    num_classes: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    official_sizes: tuple[int, int]  # (train, test)
    origin: str  # where it was read from, without machine paths: 'tfds mnist/3.0.1'
    users_train: np.ndarray | None = None  # int32 [T]
    users_test: np.ndarray | None = None  # int32 [E]
    kind: str | None = None  # of the inputs: pixels, features or tokens (None: by their shape)
    task: str = "classification"  # what is learned on it, unless the configuration says otherwise
    ids_train: np.ndarray | None = None  # int32 [T]
    ids_test: np.ndarray | None = None  # int32 [E]
    taken_from: str | None = None
    all_classes: bool = True

    @property
    def inputs(self) -> InputSpec:
        """One input's kind and shape, and how it is stored."""
        shape = tuple(self.x_train.shape[1:])
        return InputSpec(self.input_kind, shape, self.scale, self.mean, self.std)

    @property
    def input_kind(self) -> str:
        """Pixels of images or bytes, else features, unless the source says `kind`."""
        if self.kind is not None:
            return self.kind
        pixels = self.x_train.ndim == 4 or self.x_train.dtype == np.uint8
        return "pixels" if pixels else "features"

    @property
    def sizes(self) -> tuple[int, int]:
        """The numbers of training and test examples that are here."""
        return len(self.y_train), len(self.y_test)

    @property
    def is_subset(self) -> bool:
        """Whether examples of the official data set are missing."""
        return self.sizes != tuple(self.official_sizes)

    @property
    def label(self) -> str:
        """The name to print beside results; it says when the data set is not whole."""
        if not self.is_subset:
            return self.name
        (train, test), (all_train, all_test) = self.sizes, self.official_sizes
        return f"{self.name} (subset: {train} of {all_train} train, {test} of {all_test} test)"

    def describe(self) -> dict:
        """Sizes and label as plain values, to be stored beside results.

        `users` are those with training examples here; only data that has users says so.
        """
        users = {} if self.users_train is None else {"users": len(np.unique(self.users_train))}
        return users | {
            "name": self.name,
            "label": self.label,
            "train": self.sizes[0],
            "test": self.sizes[1],
            "official_train": self.official_sizes[0],
            "official_test": self.official_sizes[1],
            "subset": self.is_subset,
        }


def take(source: Source, max_train: int | None = None, max_test: int | None = None) -> Source:
    """The first `max_train` training and `max_test` test examples; None keeps all of them.

    The official sizes stay, so the result is labelled a subset. Raises `ConfigError` when a number
    is below 1 or larger than what is there.

    >>> from fedjax_sec.data.sources.digits import Digits
    >>> take(Digits().load(), max_train=100).label
    'digits (subset: 100 of 1437 train, 360 of 360 test)'
    """
    for field, value, available in zip(
        ("max_train", "max_test"), (max_train, max_test), source.sizes, strict=True
    ):
        if value is not None and not 1 <= value <= available:
            raise ConfigError(
                f"data.{field} must be between 1 and {available}, the number of examples of "
                f"{source.label} that are here, got {value!r}."
            )
    kept = {
        field: array[: max_train if field.endswith("train") else max_test]
        for field, array in source._asdict().items()
        if field.endswith(("_train", "_test")) and array is not None
    }
    return source._replace(**kept)


# --- Checks ---------------------------------------------------------------------------------------


def checked(source: Any, name: str) -> Source:
    """The source that the data set `name` loads, if an experiment can use it.

    Labels become int32 (whole numbers of any type do), pixels uint8 (integers from 0 to 255) and
    features float32. Raises `ConfigError` with the array and the remedy for anything else: lengths
    and shapes that do not fit together, labels other than 0 to C - 1, NaN, images outside
    [0, scale], a class without examples in data that says it is whole.

    >>> toy = Source(
    ...     "toy", np.zeros((2, 4)), [1.0, 2.0], np.zeros((2, 4)), [1, 2], 2, 1.0, (0.0,), (1.0,),
    ...     (2, 2), "nowhere",
    ... )
    >>> checked(toy, "toy")
    Traceback (most recent call last):
        ...
    fedjax_sec.core.fields.ConfigError: Data set 'toy': y_train holds labels from 1 to 2, and
    num_classes is 2; relabel 0 to 1, such as by numpy.unique(y, return_inverse=True)[1].
    """
    at = f"Data set {name!r}"
    if not isinstance(source, Source):
        raise ConfigError(
            f"{at}: load must return a fedjax_sec.data.Source, got {type(source).__name__}."
        )
    if source.name != name or not isinstance(source.origin, str):
        raise ConfigError(
            f"{at}: its Source must have the name under which it is registered and a text that "
            f"says where it is from, got name={shown(source.name)}, "
            f"origin={shown(source.origin)}."
        )
    if source.kind is not None and source.kind not in INPUTS:
        raise ConfigError(
            f"{at}: kind must be one of {', '.join(sorted(INPUTS))}, got {shown(source.kind)}."
            f"{suggestion(source.kind, INPUTS)}"
        )
    registry.tasks.get(source.task, f"{at}: task")
    if source.kind == "tokens":
        return _checked_tokens(source, at)
    classes = source.num_classes
    if not _is_whole(classes) or classes < 2:
        raise ConfigError(f"{at}: num_classes must be an integer >= 2, got {shown(classes)}.")
    arrays = {}
    for part in _PARTS:
        x = _inputs(getattr(source, f"x_{part}"), f"{at}: x_{part}")
        y = _whole(getattr(source, f"y_{part}"), f"{at}: y_{part}", "label", len(x))
        _check_labels(y, int(classes), f"{at}: y_{part}")
        arrays |= {f"x_{part}": x, f"y_{part}": y}
        users = getattr(source, f"users_{part}")
        if users is not None:
            users = _whole(users, f"{at}: users_{part}", "user", len(x))
            if users.min() < 0:
                raise ConfigError(
                    f"{at}: users_{part} must number users from 0, got {users.min()}."
                )
        arrays[f"users_{part}"] = users
        ids = getattr(source, f"ids_{part}")
        arrays[f"ids_{part}"] = (
            None if ids is None else _whole(ids, f"{at}: ids_{part}", "id", len(x))
        )
    train, test = arrays["x_train"], arrays["x_test"]
    if train.shape[1:] != test.shape[1:] or train.dtype != test.dtype:
        raise ConfigError(
            f"{at}: x_train and x_test must agree in type and in the shape of an example, got "
            f"{train.dtype} {train.shape[1:]} and {test.dtype} {test.shape[1:]}."
        )
    scale, mean, std = _check_scale(source, arrays, at)
    official = source.official_sizes
    if not _is_sequence(official) or len(official) != 2 or not all(map(_is_whole, official)):
        raise ConfigError(
            f"{at}: official_sizes must be the numbers of training and test examples of the whole "
            f"data set, such as {(len(train), len(test))}, got {shown(official)}."
        )
    sound = source._replace(
        **arrays,
        num_classes=int(classes),
        scale=scale,
        mean=mean,
        std=std,
        official_sizes=tuple(map(int, official)),
    )
    there = np.union1d(sound.y_train, sound.y_test)
    if sound.all_classes and not sound.is_subset and len(there) < classes:
        missing = np.setdiff1d(np.arange(classes), there)[0]
        raise ConfigError(
            f"{at}: num_classes is {classes}, but class {missing} has no example; relabel 0 to "
            f"{len(there) - 1} and set num_classes to {len(there)}."
        )
    return sound


def _checked_tokens(source: Source, at: str) -> Source:
    """The source with int32 (or uint8) tokens and int32 targets, if they fit the vocabulary."""
    size, arrays = source.num_classes, {}
    if not _is_whole(size) or size < 2:
        raise ConfigError(f"{at}: num_classes, the vocabulary, must be >= 2, got {shown(size)}.")
    for part in _PARTS:
        x, y = (
            _as_array(getattr(source, f"{name}_{part}"), f"{at}: {name}_{part}") for name in "xy"
        )
        if x.ndim != 2 or 0 in x.shape or x.dtype.kind not in "iu":
            raise ConfigError(
                f"{at}: x_{part} must hold at least one sequence of whole numbers [n, L], got "
                f"{x.dtype} with shape {x.shape}."
            )
        classes = source.task == "classification"
        shape = x.shape[:1] if classes else x.shape
        if y.shape != shape or y.dtype.kind not in "iu":
            what = "one class for each sequence" if classes else "the next token at every place"
            raise ConfigError(
                f"{at}: y_{part} must hold {what}, whole numbers of shape "
                f"{shape}, got {y.dtype} with shape {y.shape}."
            )
        for name, array, low in (("x", x, 0), ("y", y, 0 if classes else -1)):
            if array.min() < low or array.max() >= size:
                raise ConfigError(
                    f"{at}: {name}_{part} holds tokens from {array.min()} to {array.max()}, and "
                    f"with num_classes = {size} they are {low} to {size - 1}."
                )
        kept = x if x.dtype == np.uint8 else x.astype(np.int32)  # many windows: a byte each
        arrays |= {f"x_{part}": kept, f"y_{part}": y.astype(np.int32)}
        users = getattr(source, f"users_{part}")
        if users is not None:
            users = _whole(users, f"{at}: users_{part}", "user", len(x))
        arrays[f"users_{part}"] = users
    return source._replace(**arrays, official_sizes=tuple(map(int, source.official_sizes)))


def _is_whole(value) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_sequence(value) -> bool:
    return isinstance(value, (tuple, list, np.ndarray)) and np.ndim(value) == 1


def _as_array(value, at) -> np.ndarray:
    if isinstance(value, np.ma.MaskedArray):
        raise ConfigError(f"{at} is a masked array; leave out or fill what is masked.")
    try:
        array = np.asarray(value)
    except Exception as error:  # an object's own conversion raises whatever it likes
        raise ConfigError(f"{at} cannot be read as an array ({one_line(error, 200)}).") from error
    if array.dtype.kind not in "biuf":
        kind = "text" if array.dtype.kind in "SU" else str(array.dtype)
        raise ConfigError(
            f"{at} must hold numbers, got {kind}; number what is text, such as by "
            f"numpy.unique(values, return_inverse=True)[1]."
        )
    return array


def _inputs(value, at) -> np.ndarray:
    """Examples [n, ...]: uint8, or finite float32."""
    x = _as_array(value, at)
    if x.ndim < 2 or 0 in x.shape:
        raise ConfigError(
            f"{at} must hold at least one example, features [n, F] or images [n, H, W, C], got "
            f"shape {x.shape}."
        )
    if x.dtype.kind == "f":
        with np.errstate(over="ignore"):
            x = x.astype(np.float32, copy=False)
        bad = ~np.isfinite(x).reshape(len(x), -1).all(axis=1)
        if bad.any():
            raise ConfigError(
                f"{at} holds NaN, infinity or what float32 cannot hold in {bad.sum()} of {len(x)} "
                f"examples, first in number {bad.argmax()}; repair or remove them."
            )
        return x
    if x.dtype.kind == "b" or x.min() < 0 or x.max() > 255:
        raise ConfigError(
            f"{at} holds {x.dtype} from {x.min()} to {x.max()}; images are integers from 0 to 255 "
            f"(uint8), features are floats: x.astype(numpy.float32)."
        )
    return x.astype(np.uint8, copy=False)


def _whole(value, at, what, count) -> np.ndarray:
    """int32 [n] from whole numbers of any type, one for each example."""
    y = _as_array(value, at)
    if y.ndim != 1:
        remedy = "y.ravel()" if y.ndim == 2 and y.shape[1] == 1 else "y.argmax(axis=1) of one-hot"
        raise ConfigError(
            f"{at} must hold one class number for each example, [n], got shape {y.shape}; give "
            f"{remedy}."
            if what == "label"
            else f"{at} must be [n], got shape {y.shape}."
        )
    if len(y) != count:
        raise ConfigError(
            f"{at} holds {len(y)} {what}s for {count} examples; there must be one {what} for each "
            f"example."
        )
    if y.dtype.kind == "b":
        raise ConfigError(f"{at} holds true and false; give whole numbers: y.astype(numpy.int32).")
    wrong = ~((y >= -(2**31)) & (y < 2**31))  # NaN too
    if y.dtype.kind == "f":
        wrong |= y % 1 != 0
    if wrong.any():
        raise ConfigError(
            f"{at} must hold whole numbers, got {y[wrong.argmax()]} for example {wrong.argmax()}."
        )
    return y.astype(np.int32)


def _check_labels(y, classes, at) -> None:
    low, high = y.min(), y.max()
    if low < 0 or high >= classes:
        remedy = "such as by numpy.unique(y, return_inverse=True)[1]"
        if low >= 0 and high >= classes and 0 in y:
            remedy = f"or set num_classes to {high + 1}"
        raise ConfigError(
            f"{at} holds labels from {low} to {high}, and num_classes is {classes}; relabel 0 to "
            f"{classes - 1}, {remedy}."
        )


def _check_scale(source, arrays: Mapping, at):
    """`scale`, `mean` and `std` as Python numbers, if they fit the inputs."""
    scale = source.scale
    if not _is_number(scale) or not 0 < scale < math.inf:
        raise ConfigError(f"{at}: scale must be a finite number > 0, got {shown(scale)}.")
    for part in _PARTS:
        x = arrays[f"x_{part}"]
        if (x.ndim == 4 or x.dtype == np.uint8) and not (x.min() >= 0 and x.max() <= scale):
            raise ConfigError(
                f"{at}: x_{part} holds {x.min():.6g} to {x.max():.6g}, and images divided by scale "
                f"= {scale:.6g} must lie in [0, 1]; set scale (255.0 for bytes), and leave the "
                f"normalisation to mean and std."
            )
    channels, numbers = arrays["x_train"].shape[-1], {}
    for field in ("mean", "std"):
        given = getattr(source, field)
        if (
            not _is_sequence(given)
            or len(given) not in (1, channels)
            or not all(_is_number(v) and math.isfinite(v) for v in given)
            or (field == "std" and min(given) <= 0)
        ):
            raise ConfigError(
                f"{at}: {field} must be a tuple of finite numbers{' > 0' * (field == 'std')}, one "
                f"for all or one for each of {channels} channels, got {shown(given)}."
            )
        numbers[field] = tuple(map(float, given))
    if len(numbers["mean"]) != len(numbers["std"]):
        raise ConfigError(f"{at}: mean and std must have equally many numbers.")
    return float(scale), numbers["mean"], numbers["std"]


def _is_number(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))

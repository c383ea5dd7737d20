"""Data sets given as NumPy arrays from Python."""

import hashlib
from typing import Any

import numpy as np

from fedjax_sec.core import ConfigError
from fedjax_sec.core.advice import shown
from fedjax_sec.data.source import Source, checked

#: digest -> the source that `arrays` made, for as long as the process lives.
_GIVEN: dict[str, Source] = {}

NAME = "arrays"
USERS = ("users_train", "users_test")


def arrays(
    x_train: Any,
    y_train: Any,
    x_test: Any,
    y_test: Any,
    *,
    users_train: Any = None,
    users_test: Any = None,
    num_classes: int | None = None,
    scale: float | None = None,
    mean: Any = (0.0,),
    std: Any = (1.0,),
    kind: str | None = None,
    task: str | None = None,
) -> Source:
    """A data set for `fedjax_sec.run(config, data=...)`, checked.

    Args:
      x_train, x_test: examples, images [n, H, W, C] of integers 0 to 255 or of numbers in
        [0, scale], features [n, F], or sequences of tokens [n, L].
      y_train, y_test: class numbers from 0, [n]; of tokens the next ones, [n, L], -1 where a
        sequence has ended.
      users_train, users_test: who made each example, numbered from 0, for the partition `natural`.
      num_classes: C, or the size of the vocabulary (None: the largest number there is, plus 1).
      scale: `x / scale` is what components see (None: 255 for integers, else 1).
      mean, std: normalise what components see, a number or one for each channel.
      kind: `pixels`, `features` or `tokens` (None: pixels for images and integers, else features).
      task: what is learned (None: `language_model` of tokens, else `classification`).

    The arrays stay in memory until the process ends, under a digest of their content, by which a
    configuration names them.

    Returns: the `Source`. Raises: `ConfigError` for what no experiment can use.

    >>> x, y = np.zeros((4, 3), np.float32), np.array([0, 1, 1, 0])
    >>> source = arrays(x, y, x[:2], y[:2])
    >>> source.num_classes, source.sizes
    (2, (4, 2))
    """
    given = {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}
    given |= {"users_train": users_train, "users_test": users_test}
    source = of_arrays(
        NAME, "arrays given in Python", given, num_classes, scale, mean, std, kind, task
    )
    digest = digest_of(source)
    _GIVEN[digest] = source
    return source


def of_arrays(
    name, origin, given, num_classes, scale, mean, std, kind, task, all_classes=None
) -> Source:
    """The checked source `name` of arrays; see `arrays` for what may be None."""
    given = {
        key: None if value is None and key in USERS else _array(value, f"Data set {name!r}: {key}")
        for key, value in given.items()
    }
    x, labels = given["x_train"], [given["y_train"], given["y_test"]]
    whole = x.dtype.kind in "iu"
    if num_classes is None:
        numbers = labels + ([x, given["x_test"]] if kind == "tokens" else [])
        numbers = [array for array in numbers if array.size and array.dtype.kind in "iuf"]
        num_classes = max([1, *(int(np.nanmax(array)) for array in numbers)]) + 1
    if scale is None:
        scale = 255.0 if whole and kind != "tokens" else 1.0
    if task is None:
        task = "language_model" if kind == "tokens" else "classification"
    source = Source(
        name=name,
        num_classes=num_classes,
        scale=scale,
        mean=_numbers(mean),
        std=_numbers(std),
        official_sizes=(len(x), len(given["x_test"])),
        origin=origin,
        kind=kind,
        task=task,
        all_classes=all_classes is None or bool(all_classes),
        **given,
    )
    return checked(source, name)


def _array(value, at) -> np.ndarray:
    if isinstance(value, np.ma.MaskedArray):
        raise ConfigError(f"{at} is a masked array; leave out or fill what is masked.")
    try:
        array = np.array(value)  # a copy, so that the digest stays true
    except Exception as error:  # an object's own conversion raises whatever it likes
        raise ConfigError(f"{at} cannot be read as an array ({type(error).__name__}).") from error
    if array.ndim == 0:
        raise ConfigError(f"{at} must be an array with one entry an example, got {shown(value)}.")
    return array


def _numbers(value) -> Any:
    if np.ndim(value) == 0 and isinstance(value, (int, float, np.number)):
        return (float(value),)
    return tuple(np.asarray(value).tolist()) if np.ndim(value) == 1 else value


def digest_of(source: Source) -> str:
    """A digest of everything in a source.

    Fields that came later count where they are set, so digests of earlier versions stay true.
    """
    digest, later = hashlib.sha256(), ("ids_train", "ids_test", "taken_from", "all_classes")
    for key, value in sorted(source._asdict().items()):
        if key in later and value is Source._field_defaults[key]:
            continue
        if isinstance(value, np.ndarray):
            digest.update(repr((key, value.dtype.str, value.shape)).encode())
            digest.update(np.ascontiguousarray(value).data)
        else:
            digest.update(repr((key, value)).encode())
    return digest.hexdigest()[:16]


def named(source: Source) -> dict[str, str]:
    """The keys of `data` that name what `arrays` has returned.

    Raises: `ConfigError` for a source that it has not returned, or that was changed since.
    """
    digest = digest_of(source)
    if given_by(digest) is None:
        raise ConfigError(
            "data must be what fedjax_sec.data.arrays(x_train, y_train, x_test, y_test) returns, "
            "unchanged; call it again with the other arrays."
        )
    return {"name": NAME, "digest": digest}


def given_by(digest: str) -> Source | None:
    """The source that `arrays` made with this digest in this process."""
    return _GIVEN.get(digest)

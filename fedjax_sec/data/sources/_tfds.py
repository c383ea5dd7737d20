"""Reads image data sets prepared by tensorflow-datasets (array_record), without TensorFlow."""

import contextlib
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fedjax_sec.core import ConfigError
from fedjax_sec.core.optional import require
from fedjax_sec.data.source import MissingDataError, Source
from fedjax_sec.data.sources._files import (
    cache_file,
    first_line,
    load_cache,
    progress_bar,
    store_cache,
)

_SPLITS = ("train", "test")
_BATCH = 1000  # examples decoded between two updates of the progress bar
_PROBE_SECONDS = 3.0
# Messages about speed that do not matter to us: we read sequentially, once, and keep the result.
_HARMLESS = ("was created with group size", "OpenCV is not installed")


def load_tfds(
    name: str, data_dir: str | None, download: bool, numbered: bool = False, **meta
) -> Source:
    """Reads both splits of the data set `name`, from our cache where it was decoded before.

    `data_dir` None means the environment variable TFDS_DATA_DIR, else `~/tensorflow_datasets`.
    `numbered`: its examples have the feature `id`, such as "train_00012", which numbers them.
    `meta` are the remaining fields of `Source` (`num_classes`, `scale`, `mean`, `std`,
    `official_sizes`). Raises `MissingDataError` when the prepared folder is absent and cannot be
    downloaded, or cannot be read.
    """
    arrays, origin = load_arrays(name, data_dir, download, numbered=numbered)
    if numbered and any(arrays[f"ids_{split}"].min() < 0 for split in _SPLITS):
        arrays |= {f"ids_{split}": None for split in _SPLITS}
    return Source(name=name, origin=origin, **arrays, **meta)


def load_arrays(
    name: str,
    data_dir: str | None,
    download: bool,
    splits: tuple[str, ...] = _SPLITS,
    convert: Callable[[np.ndarray], np.ndarray] | None = None,
    numbered: bool = False,
) -> tuple[dict[str, np.ndarray], str]:
    """The arrays `x_SPLIT` and `y_SPLIT` of tfds's data set `name`, and where they are from.

    `convert` is applied to every image before it is kept. `numbered` adds `ids_SPLIT`, the numbers
    in the examples' ids, -1 where an example has none.
    """
    root = data_root(data_dir)
    folder = _prepared_folder(root, name)
    if folder is None:
        if not download:
            raise MissingDataError(_how_to_get(name, root, "downloading is switched off"))
        _download(name, root)
        folder = _prepared_folder(root, name)
        if folder is None:
            raise MissingDataError(_how_to_get(name, root, "the download left no prepared folder"))
    parts = ("x", "y", "ids") if numbered else ("x", "y")
    label = f"{name}-{folder.name}-ids" if numbered else f"{name}-{folder.name}"
    path = cache_file(label, folder.glob("*array_record*"))
    arrays = load_cache(path, [f"{part}_{split}" for split in splits for part in parts])
    if arrays is None:
        arrays = _decode(name, folder, splits, convert)
        arrays = {key: array for key, array in arrays.items() if key.partition("_")[0] in parts}
        store_cache(path, arrays)
    return arrays, f"tfds {name}/{folder.name}"


def data_root(data_dir: str | None) -> Path:
    """The folder that holds one folder for each data set."""
    chosen = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(chosen).expanduser()


def _prepared_folder(root: Path, name: str) -> Path | None:
    """The newest complete version folder; tfds's unfinished ones do not match `1.2.3` exactly."""
    versions = [
        path
        for path in (root / name).glob("*")
        if re.fullmatch(r"\d+\.\d+\.\d+", path.name) and (path / "dataset_info.json").is_file()
    ]
    return max(versions, key=lambda p: tuple(map(int, p.name.split("."))), default=None)


def _how_to_get(name: str, root: Path, reason: str) -> str:
    return (
        f"Data set {name!r} is not in {root / name}, and {reason}. Ways to get it: "
        f"(1) copy a folder prepared by tensorflow-datasets in array_record format and name the "
        f"folder that holds {name}/ with data.data_dir=DIR, --data-dir DIR or TFDS_DATA_DIR=DIR; "
        f"(2) run once on a machine with a network, with data.download=true, and copy what it "
        f"prepares; (3) use the data set 'digits', which is embedded."
    )


def _tfds(name: str):
    """tensorflow-datasets: slow to import, and cached data does not need it."""
    try:
        for module in ("array_record", "tensorflow_datasets"):
            tfds = require(module, f"Data set {name!r}")
    except ConfigError as error:
        raise MissingDataError(str(error)) from error
    return tfds


# --- Download ---------------------------------------------------------------------------------


def _download(name: str, root: Path) -> None:
    tfds = _tfds(name)
    try:
        builder = tfds.builder(name, data_dir=root, file_format="array_record")
        _probe_network(list(builder.url_infos or ()))
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:  # tfds raises whatever its parts raise; the cause is chained
        reason = f"downloading it failed ({type(error).__name__}: {first_line(error)})"
        raise MissingDataError(_how_to_get(name, root, reason)) from error


def _probe_network(urls: list[str]) -> None:
    """Raises at once where there is no network: tfds itself retries silently for minutes."""
    if not urls:
        return
    import requests  # a dependency of tfds; it honours the same proxy settings as the download

    # A refusal of the request (4xx) passes, because the download reports it at once; on a failing
    # server or proxy (5xx) tfds would retry too.
    try:
        response = requests.head(urls[0], timeout=_PROBE_SECONDS)
        if response.status_code >= 500:
            response.raise_for_status()
    except requests.RequestException as error:
        raise ConnectionError(f"no answer from {urls[0]}; is there a network?") from error


# --- Cache ------------------------------------------------------------------------------------


# --- Decoding ---------------------------------------------------------------------------------


def _decode(name: str, folder: Path, splits, convert) -> dict[str, np.ndarray]:
    """Decodes every image of the splits; takes about 0.15 ms an MNIST image."""
    root = folder.parent.parent
    file_format = json.loads((folder / "dataset_info.json").read_text()).get("fileFormat")
    if not any(folder.glob("*array_record*")):
        raise MissingDataError(
            f"{folder} is prepared in the format {file_format!r}, which needs TensorFlow to be "
            f"read. Prepare it in array_record format: "
            f"tfds.builder({name!r}).download_and_prepare(file_format='array_record')."
        )
    tfds = _tfds(name)
    try:
        with _without_harmless_messages(), progress_bar() as bar:
            sources = {
                split: tfds.data_source(
                    f"{name}:{folder.name}", split=split, data_dir=root, download=False
                )
                for split in splits
            }
            total = sum(len(s) for s in sources.values())
            task = bar.add_task(f"Decoding {name}", total=total)
            arrays = {}
            for split, examples in sources.items():
                advance = lambda done: bar.advance(task, done)  # noqa: E731
                x, y, ids = _decode_split(examples, convert, advance)
                arrays |= {f"x_{split}": x, f"y_{split}": y, f"ids_{split}": ids}
    except Exception as error:  # the readers raise whatever the damaged file makes them raise
        raise MissingDataError(
            f"The prepared folder {folder} cannot be read ({type(error).__name__}: "
            f"{first_line(error)}). Copy or prepare it again; it must hold the record files of "
            f"{' and '.join(splits)}, dataset_info.json and features.json."
        ) from error
    return arrays


def _decode_split(examples, convert, advance) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    total = len(examples)
    x, y, ids = None, np.empty(total, np.int32), np.empty(total, np.int32)
    for start in range(0, total, _BATCH):
        stop = min(start + _BATCH, total)
        for i, example in enumerate(examples.__getitems__(range(start, stop)), start):
            image = example["image"] if convert is None else convert(example["image"])
            if x is None:
                x = np.empty((total, *image.shape), np.uint8)
            x[i], y[i], ids[i] = image, example["label"], _number(example.get("id", b""))
        advance(stop - start)
    if x is None:
        raise ValueError("a split has no examples")
    return x, y, ids


def _number(name: bytes | str) -> int:
    """The number at the end of an example's id; -1 without one.

    >>> _number(b"train_00012"), _number(b"")
    (12, -1)
    """
    text = name.decode() if isinstance(name, bytes) else str(name)
    number = text.rpartition("_")[2]
    return int(number) if number.isascii() and number.isdigit() else -1


@contextlib.contextmanager
def _without_harmless_messages():
    """Drops exactly the two messages of `_HARMLESS` while decoding; all others pass."""
    # array_record and tfds log through absl, and open files lazily, so the filter has to be in
    # place during the reads.
    absl = logging.getLogger("absl")

    def keep(record: logging.LogRecord) -> bool:
        return not any(text in str(record.msg) for text in _HARMLESS)

    absl.addFilter(keep)
    try:
        yield
    finally:
        absl.removeFilter(keep)

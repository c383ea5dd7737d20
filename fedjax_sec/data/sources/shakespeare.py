"""Shakespeare's plays, a client a role: next-character prediction."""

import json
import lzma
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fedjax_sec.core import COUNT, ConfigError, Dataset, registry, static
from fedjax_sec.data.source import MissingDataError, Source
from fedjax_sec.data.sources._femnist import URL, Archive, _download, _import_h5py
from fedjax_sec.data.sources._files import first_line
from fedjax_sec.data.sources._tfds import data_root

ARCHIVE = Archive(
    "shakespeare", "0285be9906cb5f268092eee4edeeacfc2af4574f2941f7cc2f08a321d7f5c707", 90, (0, 0)
)
#: The vocabulary of McMahan et al.'s and TensorFlow Federated's experiments: 86 characters.
CHARACTERS = (
    "dhlptx@DHLPTX $(,048cgkoswCGKOSW[_#'/37;?bfjnrvzBFJNRVZ\"&*.26:\naeimquyAEIMQUY]!%)-159\r"
)
#: Tokens around the characters: padding, any other character, the beginning and the end of a text.
PAD, OTHER, BEGIN, END = 0, len(CHARACTERS) + 1, len(CHARACTERS) + 2, len(CHARACTERS) + 3
SIZE = len(CHARACTERS) + 4  # 90


#: Examples of LEAF's Shakespeare, train and test together (its Table 1).
LEAF_EXAMPLES = 4_226_158


@registry.datasets.register("shakespeare")
class Shakespeare(Dataset):
    """All of Shakespeare by role, cut into sequences of `length` characters: 715 users, 90 tokens.

    With `targets="every"`, for the task `language_model`, every text of a role is a beginning, its
    characters and an end, cut into pieces of `length` characters; the targets of a piece are the
    same characters shifted by one. A last piece that is shorter is filled with padding, whose
    targets are -1 and count nowhere. An example has no class, so label partitions and attacks on
    classes are refused; `natural` makes a client of a role.

    With `targets="last"`, for the task `classification`, an example is a window of `length`
    characters of a role's whole text, and its class is the character that follows. Line ends and
    runs of spaces are one space, and a window begins at every `stride`-th character, in the test
    part at every `test_stride`-th, so that all roles stay in a smaller test part. A role whose
    text is not longer than a window has no example, unless `padded`: then each character of the
    role's whole text is a target, and windows that begin before it are filled with padding (token
    0) on the left. Padding is never a target. With a larger stride the data set is labelled a
    subset.

    Roles keep the split of the source, which puts the last part of each role's text into the test
    part. Read are, in the folder `shakespeare/` of the data folder, the first of

    - TensorFlow Federated's HDF5 files `shakespeare_train.h5` and `_test.h5`, which are downloaded
      where nothing is there (1.3 MB; reading them needs `pip install 'fedjax_sec[hdf5]'`);
    - the same texts as JSON, `roles_train.json` and `roles_test.json`, also with `.xz`:
      `{"user_data": {role: {"x": [text, ...]}}}`, here or in `raw/shakespeare/` beside the data
      folder;
    - LEAF's JSON files in `train/` and `test/`, whose windows of 80 characters serve `last` only.

    Raises: `MissingDataError` (the message says how to get the data); `ConfigError` for `stride` or
    `padded` without `last`.

    Source: McMahan et al. 2017, Section 3, by LEAF (Caldas et al. 2018) and TensorFlow Federated,
    `shakespeare.load_data`; vocabulary and sequences of 80 as in Reddi et al. 2021 (Adaptive
    federated optimization), Appendix C.3. `last`: LEAF, `shake_utils.py` of its
    `data/shakespeare/preprocess`, with stride 1; its texts end in a line end, so that each role has
    one more window there, whose target is a space. `padded` is a choice: an earlier version of LEAF
    put spaces before every line. FedML's `shakespeare` reads LEAF's files with this vocabulary, but
    numbers characters from 0, so that its padding is the letter d.

    Example:
        >>> from fedjax_sec.core import registry
        >>> registry.datasets.build("shakespeare").length
        80
    """

    official_sizes = (16_068, 2_356)  # texts; without annotation, so that it is no field

    length: int = static(80, "Characters in a sequence.", low=1, high=COUNT)
    max_users: int | None = static(
        None, "Only the roles with the most training text (null: all).", low=1, high=COUNT
    )
    targets: str = static(
        "every",
        "What is predicted: `every` next character of a sequence, or the one behind its `last`.",
        choices=("every", "last"),
    )
    stride: int = static(
        1, "Characters from one window to the next, with `last`.", low=1, high=COUNT
    )
    test_stride: int | None = static(
        None,
        "Characters from one window to the next of the test part, with `last` (null: `stride`).",
        low=1,
        high=COUNT,
    )
    padded: bool = static(
        False, "Predict the first characters of a text too, from padded windows, with `last`."
    )

    def load(self, data_dir: str | None = None, download: bool = True) -> Source:
        """Reads both parts and cuts them."""
        if self.targets == "every" and (self.stride > 1 or self.test_stride or self.padded):
            raise ConfigError(
                f"data: stride, test_stride and padded belong to targets 'last', got "
                f"stride={self.stride}, test_stride={self.test_stride}, padded={self.padded} with "
                f"'every'."
            )
        root = data_root(data_dir)
        folder = root / "shakespeare"
        folders = (folder, root.parent / "raw" / "shakespeare")
        archive = _find(folders)
        if archive is None:
            if not download:
                raise MissingDataError(_how_to_get(root, "downloading is switched off"))
            try:
                _import_h5py()
                _download(ARCHIVE, folder)
            except (OSError, tarfile.TarError, EOFError, MissingDataError) as error:
                reason = f"downloading it failed ({type(error).__name__}: {first_line(error)})"
                raise MissingDataError(_how_to_get(root, reason)) from error
            archive = _find(folders)
        read, paths = archive
        try:
            train, test = (read(path) for path in paths)
            if not any(train.values()):
                raise ValueError("no role has a text")
        except Exception as error:  # h5py and json raise whatever a damaged file makes them raise
            raise MissingDataError(
                f"{paths[0].parent} cannot be read ({type(error).__name__}: {first_line(error)}). "
                f"Copy or prepare it again."
            ) from error
        if read is _leaf:
            return self._windows_of_leaf(train, test)
        return self._source(train, test)

    def _roles(self, train: dict) -> list[str]:
        """The roles that are asked for; users are numbered in the order of their names."""
        if self.max_users is None:
            return sorted(train)
        length = {role: sum(map(len, train[role])) for role in train}
        return sorted(sorted(sorted(train), key=lambda role: -length[role])[: self.max_users])

    def _source(self, train: dict, test: dict) -> Source:
        """The arrays of role -> texts."""
        roles, last = self._roles(train), self.targets == "last"
        arrays, full = {}, []
        for part, texts in (("train", train), ("test", test)):
            if last:
                pieces = [self._windows(texts.get(role, []), self._step(part)) for role in roles]
            else:
                pieces = [self._cut(texts.get(role, [])) for role in roles]
            tokens = np.concatenate(pieces)
            x, y = tokens[:, :-1], tokens[:, -1 if last else slice(1, None)]
            arrays[f"x_{part}"] = x
            arrays[f"y_{part}"] = y.astype(np.int32) if last else np.where(y == PAD, -1, y)
            counts = [len(one) for one in pieces]
            arrays[f"users_{part}"] = np.repeat(np.arange(len(roles), dtype=np.int32), counts)
            full.append(sum(self._places(texts.get(role, [])) for role in texts))
        sizes = len(arrays["x_train"]), len(arrays["x_test"])
        if not last:
            # Of the roles that are asked for, all sequences are here; fewer roles are a part.
            full = sizes if self.max_users is None else (sizes[0] + 1, sizes[1] + 1)
        return self._made(arrays, tuple(full), "TensorFlow Federated shakespeare")

    def _made(self, arrays: dict, official: tuple[int, int], origin: str) -> Source:
        last = self.targets == "last"
        if not all(len(arrays[f"x_{part}"]) for part in ("train", "test")):
            raise ConfigError(
                f"data: with length {self.length} and targets {self.targets!r} a part of "
                f"'shakespeare' holds no example; lower length, or set padded to true."
            )
        return Source(
            name="shakespeare",
            num_classes=SIZE,
            scale=1.0,
            mean=(0.0,),
            std=(1.0,),
            official_sizes=official,
            origin=origin,
            kind="tokens",
            task="classification" if last else "language_model",
            **arrays,
        )

    def _cut(self, texts) -> np.ndarray:
        """[pieces, length + 1] tokens: a piece begins with the last token of the one before."""
        pieces = []
        for text in texts:
            tokens = [BEGIN, *_numbers(text), END]
            for start in range(0, len(tokens) - 1, self.length):
                piece = tokens[start : start + self.length + 1]
                pieces.append(piece + [PAD] * (self.length + 1 - len(piece)))
        return np.array(pieces, np.int32).reshape(-1, self.length + 1)

    def _step(self, part: str) -> int:
        """Characters from one window to the next."""
        return (part == "test" and self.test_stride) or self.stride

    def _windows(self, texts, step: int) -> np.ndarray:
        """[windows, length + 1] tokens of a role's whole text: the last one is the target."""
        tokens = np.array([PAD] * (self.length * self.padded) + _numbers(_whole(texts)), np.uint8)
        if len(tokens) <= self.length:
            return np.zeros((0, self.length + 1), np.uint8)
        windows = np.lib.stride_tricks.sliding_window_view(tokens, self.length + 1)
        return windows[::step]

    def _places(self, texts) -> int:
        """The windows of a role's text with a stride of one."""
        characters = len(_whole(texts))
        return characters if self.padded else max(characters - self.length, 0)

    def _windows_of_leaf(self, train: dict, test: dict) -> Source:
        """The arrays of role -> (windows, characters behind them), as LEAF cut them."""
        widths = {len(x) for part in (train, test) for xs, _ in part.values() for x in xs}
        if self.targets != "last" or self.padded or widths != {self.length}:
            raise ConfigError(
                f"data: LEAF's files of 'shakespeare' hold windows of {sorted(widths)} characters "
                f"and the one that follows; they need targets 'last', that length and no padding, "
                f"got targets={self.targets!r}, length={self.length}, padded={self.padded}."
            )
        roles = self._roles({role: xs for role, (xs, _) in train.items()})
        arrays, none = {}, ([], [])
        for part, windows in (("train", train), ("test", test)):
            rows, owners = [], []
            for number, role in enumerate(roles):
                pairs = list(zip(*windows.get(role, none), strict=True))[:: self._step(part)]
                rows += [_numbers(x) + _numbers(y) for x, y in pairs]
                owners += [number] * len(pairs)
            tokens = np.array(rows, np.uint8).reshape(-1, self.length + 1)
            arrays[f"x_{part}"], arrays[f"y_{part}"] = (
                tokens[:, :-1],
                tokens[:, -1].astype(np.int32),
            )
            arrays[f"users_{part}"] = np.array(owners, np.int32)
        train_size, test_size = len(arrays["x_train"]), len(arrays["x_test"])
        # LEAF's split depends on how it was called: what is missing is counted as training.
        official = max(LEAF_EXAMPLES - test_size, train_size), test_size
        return self._made(arrays, official, "LEAF shakespeare, train and test")


_NUMBERS = {letter: i + 1 for i, letter in enumerate(CHARACTERS)}


def _numbers(text: str) -> list[int]:
    return [_NUMBERS.get(letter, OTHER) for letter in text]


def _whole(texts) -> str:
    """A role's texts as one: line ends and runs of spaces are one space, as in LEAF."""
    return re.sub(r"  +", " ", "\n".join(texts).replace("\n", " "))


def _find(folders) -> tuple[Callable, tuple[Path, Path]] | None:
    """How to read the files of a layout, and both of them; the first layout that is complete."""
    for folder in folders:
        for read, pattern in (
            (_hdf5, "shakespeare_{}.h5"),
            (_json, "roles_{}.json"),
            (_json, "roles_{}.json.xz"),
        ):
            paths = tuple(folder / pattern.format(part) for part in ("train", "test"))
            if all(path.is_file() for path in paths):
                return read, paths
        parts = tuple(folder / part for part in ("train", "test"))
        if all(any(part.glob("*.json")) for part in parts):
            return _leaf, parts
    return None


def _hdf5(path: Path) -> dict[str, list[str]]:
    """role -> texts of TensorFlow Federated's file."""
    with _import_h5py().File(path, "r") as file:
        return {
            role: [text.decode("utf-8") for text in one["snippets"][()]]
            for role, one in file["examples"].items()
        }


def _json(path: Path) -> dict[str, list[str]]:
    """role -> texts of a JSON file, packed or not."""
    raw = path.read_bytes()
    content = json.loads(lzma.decompress(raw) if path.suffix == ".xz" else raw)
    return {role: list(one["x"]) for role, one in content["user_data"].items()}


def _leaf(folder: Path) -> dict[str, tuple[list[str], list[str]]]:
    """role -> (windows, the characters behind them) of LEAF's JSON files."""
    roles = {}
    for path in sorted(folder.glob("*.json")):
        for role, one in json.loads(path.read_text())["user_data"].items():
            if role in roles or len(one["x"]) != len(one["y"]):
                raise ValueError(f"role {role!r} is there twice, or with more windows than targets")
            roles[role] = one["x"], one["y"]
    return roles


def _how_to_get(root: Path, reason: str) -> str:
    return (
        f"Data set 'shakespeare' is not in {root / 'shakespeare'}, and {reason}. Unpack "
        f"{URL}shakespeare.tar.bz2 there (shakespeare_train.h5 and _test.h5; reading them needs "
        f"h5py: pip install 'fedjax_sec[hdf5]'), or copy LEAF's train/ and test/ there, which "
        f"serve targets 'last', and name the folder that holds shakespeare/ with "
        f"data.data_dir=DIR, --data-dir DIR or TFDS_DATA_DIR=DIR. Without a network, the data set "
        f"'digits' is embedded."
    )

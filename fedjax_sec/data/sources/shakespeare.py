"""Shakespeare's plays, a client a role: next-character prediction."""

import json
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fedjax_sec.core import COUNT, Dataset, registry, static
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


@registry.datasets.register("shakespeare")
class Shakespeare(Dataset):
    """All of Shakespeare by role, cut into sequences of `length` characters: 715 users, 90 tokens.

    Every text of a role is a beginning, its characters and an end, cut into pieces of `length`
    characters; the targets of a piece are the same characters shifted by one. A last piece that is
    shorter is filled with padding, whose targets are -1 and count nowhere. Roles keep the split of
    the source, which puts the last part of each role's text into the test part. An example has no
    class, so label partitions and attacks on classes are refused; `natural` makes a client of a
    role.

    Reads, in the folder `shakespeare/` of the data folder, TensorFlow Federated's HDF5 files
    `shakespeare_train.h5` and `_test.h5`, which are downloaded where they are missing (1.3 MB;
    reading them needs `pip install 'fedjax_sec[hdf5]'`), or the same texts as JSON,
    `roles_train.json` and `roles_test.json`, also with `.xz`: `{"user_data": {role: {"x": [text,
    ...]}}}`.

    Raises: `MissingDataError` (the message says how to get the data).

    Source: McMahan et al. 2017, Section 3, by LEAF (Caldas et al. 2018) and TensorFlow Federated,
    `shakespeare.load_data`; vocabulary and sequences of 80 as in Reddi et al. 2021 (Adaptive
    federated optimization), Appendix C.3.

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

    def load(self, data_dir: str | None = None, download: bool = True) -> Source:
        """Reads both parts and cuts them."""
        root = data_root(data_dir)
        folder = root / "shakespeare"
        archive = _find(folder)
        if archive is None:
            if not download:
                raise MissingDataError(_how_to_get(root, "downloading is switched off"))
            try:
                _import_h5py()
                _download(ARCHIVE, folder)
            except (OSError, tarfile.TarError, EOFError, MissingDataError) as error:
                reason = f"downloading it failed ({type(error).__name__}: {first_line(error)})"
                raise MissingDataError(_how_to_get(root, reason)) from error
            archive = _find(folder)
        read, paths = archive
        try:
            train, test = (read(path) for path in paths)
            if not any(train.values()):
                raise ValueError("no role has a text")
        except Exception as error:  # h5py and json raise whatever a damaged file makes them raise
            raise MissingDataError(
                f"{folder} cannot be read ({type(error).__name__}: {first_line(error)}). Copy or "
                f"prepare it again."
            ) from error
        return self._source(train, test)

    def _source(self, train: dict, test: dict) -> Source:
        """The arrays of role -> texts; users are numbered in the order of their names."""
        whole = self.max_users is None
        roles = sorted(train)
        if not whole:
            length = {role: sum(map(len, train[role])) for role in roles}
            roles = sorted(sorted(roles, key=lambda role: -length[role])[: self.max_users])
        arrays = {}
        for part, texts in (("train", train), ("test", test)):
            pieces = [self._cut(texts.get(role, [])) for role in roles]
            tokens = np.concatenate(pieces)
            x, y = tokens[:, :-1], tokens[:, 1:]
            arrays[f"x_{part}"], arrays[f"y_{part}"] = x, np.where(y == PAD, -1, y)
            counts = [len(one) for one in pieces]
            arrays[f"users_{part}"] = np.repeat(np.arange(len(roles), dtype=np.int32), counts)
        sizes = len(arrays["x_train"]), len(arrays["x_test"])
        return Source(
            name="shakespeare",
            num_classes=SIZE,
            scale=1.0,
            mean=(0.0,),
            std=(1.0,),
            # Of the roles that are asked for, all sequences are here; fewer roles are a part.
            official_sizes=sizes if whole else (sizes[0] + 1, sizes[1] + 1),
            origin="TensorFlow Federated shakespeare",
            kind="tokens",
            task="language_model",
            **arrays,
        )

    def _cut(self, texts) -> np.ndarray:
        """[pieces, length + 1] tokens: a piece begins with the last token of the one before."""
        numbers = {letter: i + 1 for i, letter in enumerate(CHARACTERS)}
        pieces = []
        for text in texts:
            tokens = [BEGIN, *(numbers.get(letter, OTHER) for letter in text), END]
            for start in range(0, len(tokens) - 1, self.length):
                piece = tokens[start : start + self.length + 1]
                pieces.append(piece + [PAD] * (self.length + 1 - len(piece)))
        return np.array(pieces, np.int32).reshape(-1, self.length + 1)


def _find(folder: Path) -> tuple[Callable, tuple[Path, Path]] | None:
    """How to read the files of a layout, and both of them; the first layout that is complete."""
    for read, pattern in (
        (_hdf5, "shakespeare_{}.h5"),
        (_json, "roles_{}.json"),
        (_json, "roles_{}.json.xz"),
    ):
        paths = tuple(folder / pattern.format(part) for part in ("train", "test"))
        if all(path.is_file() for path in paths):
            return read, paths
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


def _how_to_get(root: Path, reason: str) -> str:
    return (
        f"Data set 'shakespeare' is not in {root / 'shakespeare'}, and {reason}. Unpack "
        f"{URL}shakespeare.tar.bz2 there (shakespeare_train.h5 and _test.h5; reading them needs "
        f"h5py: pip install 'fedjax_sec[hdf5]'), and name the folder that holds shakespeare/ with "
        f"data.data_dir=DIR, --data-dir DIR or TFDS_DATA_DIR=DIR. Without a network, the data set "
        f"'digits' is embedded."
    )

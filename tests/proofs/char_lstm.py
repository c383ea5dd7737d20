"""A next-character LSTM, and Shakespeare's roles cut into sequences."""

import json
import lzma
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sec.core import COUNT, registry, static
from fedjax_sec.core.types import Model
from fedjax_sec.data import MissingDataError, Source

ALPHABET = [chr(code) for code in range(32, 127)]  # and one token for all else


@registry.datasets.register("roles")
class Roles:
    """Sequences of `length` characters, each with the next ones as targets; a user a role."""

    length: int = static(20, "Characters in a sequence.", low=1, high=COUNT)
    roles: int = static(20, "The roles with the most text.", low=1, high=COUNT)

    def load(self, data_dir=None, download=True):
        parts, names = {}, None
        for part in ("train", "test"):
            path = Path(data_dir or ".") / "raw" / "shakespeare" / f"roles_{part}.json.xz"
            if not path.is_file():
                raise MissingDataError(f"There is no {path}.")
            texts = json.loads(lzma.decompress(path.read_bytes()))["user_data"]
            joined = {role: "\n".join(text["x"]) for role, text in texts.items()}
            if names is None:
                names = sorted(joined, key=lambda role: (-len(joined[role]), role))[: self.roles]
            parts[part] = [self._cut(joined.get(role, "")) for role in names]
        arrays = {}
        for part, rows in parts.items():
            arrays[f"x_{part}"] = np.concatenate([x[:, :-1] for x in rows])
            arrays[f"y_{part}"] = np.concatenate([x[:, 1:] for x in rows])
            arrays[f"users_{part}"] = np.repeat(np.arange(len(rows)), [len(x) for x in rows])
        sizes = len(arrays["x_train"]), len(arrays["x_test"])
        return Source(
            "roles",
            **arrays,
            num_classes=len(ALPHABET) + 1,
            scale=1.0,
            mean=(0.0,),
            std=(1.0,),
            official_sizes=sizes,
            origin="Shakespeare's roles",
            kind="tokens",
            task="language_model",
        )

    def _cut(self, text):
        numbers = {letter: i for i, letter in enumerate(ALPHABET)}
        tokens = np.array([numbers.get(letter, len(ALPHABET)) for letter in text], np.int32)
        count = max((len(tokens) - 1) // self.length, 0)
        starts = self.length * np.arange(count)[:, None]
        return tokens[starts + np.arange(self.length + 1)]


class _Network(nn.Module):
    size: int
    width: int

    @nn.compact
    def __call__(self, x):
        h = nn.Embed(self.size, 8)(x)
        h = nn.RNN(nn.OptimizedLSTMCell(self.width))(h)
        return nn.Dense(self.size)(h)


@registry.models.register("next_character")
class NextCharacter:
    """Tokens [B, L] -> logits [B, L, V]."""

    width: int = static(32, "Numbers of the LSTM's state.", low=1, high=COUNT)

    def make(self, input_shape, num_classes):
        network = _Network(num_classes, self.width)

        def init(key):
            return network.init(key, jnp.zeros((1, *input_shape), jnp.int32))

        def apply(variables, x, *, train=False, key=None):
            return network.apply(variables, x)

        return Model(jax.jit(init), apply)

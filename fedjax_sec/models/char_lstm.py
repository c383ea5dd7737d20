"""The next-character LSTM of federated averaging's Shakespeare experiments."""

import jax.numpy as jnp
from flax import linen as nn

from fedjax_sec.core import COUNT, Network, registry, static
from fedjax_sec.models._common import flax_model


class _Network(nn.Module):
    vocabulary: int
    embedding: int
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        h = nn.Embed(self.vocabulary, self.embedding, name="embedding")(x)
        for i, width in enumerate(self.hidden):
            h = nn.RNN(nn.OptimizedLSTMCell(width), name=f"lstm_{i}")(h)
        return nn.Dense(self.vocabulary, name="output")(h)


@registry.models.register("char_lstm")
class CharLstm(Network):
    """Reads a sequence character by character and predicts the next one at every place.

    Tokens `x [B, L] -> logits [B, L, V]`: an embedding of 8 numbers, two LSTM layers of 256, a
    linear layer. With V = 90 it has 822,018 parameters; McMahan et al. count 866,578 for theirs,
    whose vocabulary they do not give.

    Source: McMahan et al. 2017, Section 3: "embedding each of these into a learned 8 dimensional
    space ... 2 LSTM layers, each with 256 nodes"; LEAF (Caldas et al. 2018) uses the same network.
    The initialisation is flax's.

    Example:
        >>> import jax
        >>> from fedjax_sec.core import registry
        >>> model = registry.models.build({"name": "char_lstm", "hidden": [4]}).make((5,), 10)
        >>> variables = model.init(jax.random.key(0))
        >>> model.apply(variables, jax.numpy.zeros((2, 5), int)).shape
        (2, 5, 10)
    """

    inputs = frozenset({"tokens"})
    embedding: int = static(8, "Numbers for each character.", low=1, high=COUNT)
    hidden: tuple[int, ...] = static((256, 256), "Widths of the LSTM layers.", low=1, high=COUNT)

    def make(self, input_shape, num_classes):
        network = _Network(num_classes, self.embedding, self.hidden)
        return flax_model(network, input_shape, dtype=jnp.int32)

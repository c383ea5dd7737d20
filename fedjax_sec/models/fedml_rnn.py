"""FedML's recurrent network for Shakespeare's next character."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedjax_sec.core import COUNT, ConfigError, Network, registry, static
from fedjax_sec.models._common import bias_init, flax_model, kernel_init


def _uniform(width: int):
    """PyTorch's initial values of a recurrent layer: U(-1/sqrt(H), 1/sqrt(H)) for all of them."""
    bound = 1 / math.sqrt(width)
    return lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)


class _Embedding(nn.Module):
    """A table of rows, of which the first, for padding, begins at zero and never learns."""

    vocabulary: int
    width: int

    @nn.compact
    def __call__(self, x):
        def init(key, shape):
            return jax.random.normal(key, shape).at[0].set(0.0)

        table = self.param("embedding", init, (self.vocabulary, self.width))
        padding = (jnp.arange(self.vocabulary) == 0)[:, None]
        table = jnp.where(padding, jax.lax.stop_gradient(table), table)
        # A product with one-hot rows, whose gradient needs no scatter.
        return jax.nn.one_hot(x, self.vocabulary) @ table


class _Lstm(nn.Module):
    """One direction of an LSTM layer: x [B, L, E] -> hidden states [B, L, H], gates i, f, g, o.

    With `last` the state at the last place alone, [B, 1, H].
    """

    width: int
    two_biases: bool
    reverse: bool
    last: bool = False

    @nn.compact
    def __call__(self, x):
        if self.last and self.reverse:  # which has seen nothing before
            x = x[:, -1:]
        init = _uniform(self.width)
        inner = self.param("weight_ih", init, (x.shape[-1], 4 * self.width))
        outer = self.param("weight_hh", init, (self.width, 4 * self.width))
        bias = self.param("bias_ih", init, (4 * self.width,))
        if self.two_biases:
            bias = bias + self.param("bias_hh", init, (4 * self.width,))
        # The part that does not depend on the state is one product for all places.
        fed = (x @ inner + bias[None, None]).swapaxes(0, 1)

        def step(carry, now):
            h, c = carry
            i, f, g, o = jnp.split(now + h @ outer, 4, axis=-1)
            c = nn.sigmoid(f) * c + nn.sigmoid(i) * jnp.tanh(g)
            h = nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zeros = jnp.zeros((x.shape[0], self.width))
        (last, _), states = jax.lax.scan(step, (zeros, zeros), fed, reverse=self.reverse)
        return last[:, None] if self.last else states.swapaxes(0, 1)


class _Network(nn.Module):
    vocabulary: int
    embedding: int
    hidden: tuple[int, ...]
    bidirectional: bool
    two_biases: bool
    predicts: str

    @nn.compact
    def __call__(self, x):
        h = _Embedding(self.vocabulary, self.embedding, name="embedding")(x)
        for i, width in enumerate(self.hidden):
            last = self.predicts == "last" and i == len(self.hidden) - 1
            layer = functools.partial(_Lstm, width, self.two_biases, last=last)
            directions = [layer(reverse=False, name=f"lstm_{i}")(h)]
            if self.bidirectional:
                directions.append(layer(reverse=True, name=f"lstm_{i}_back")(h))
            h = jnp.concatenate(directions, axis=-1)
        if self.predicts == "last":
            h = h[:, -1]
        init, bias = kernel_init("pytorch"), bias_init("pytorch", h.shape[-1])
        return nn.Dense(self.vocabulary, kernel_init=init, bias_init=bias, name="output")(h)


@registry.models.register("fedml_rnn")
class FedmlRnn(Network):
    r"""Two LSTM layers that read a sequence of characters and predict the one that follows it.

    Tokens `x [B, L] -> logits [B, V]`: an embedding of 8 numbers (the row of token 0, padding, is
    zero and does not learn), LSTM layers of 256,

    .. math:: (i, f, g, o) = W_x x_t + b_x + W_h h_{t-1} + b_h, \quad
              c_t = \sigma(f) c_{t-1} + \sigma(i) \tanh(g), \quad h_t = \sigma(o) \tanh(c_t),

    and a linear layer on the state at the last place. With V = 90 these are 822,570 parameters with
    PyTorch's two biases b_x and b_h, 820,522 with one. `predicts="every"` applies the linear layer
    at every place, logits `[B, L, V]`, for the task `language_model`.

    FedSecurity's text calls it a bidirectional LSTM, its code is unidirectional: `bidirectional`
    follows the text, 2,168,618 parameters. The state at the last place is then what PyTorch gives
    there, forward and backward: the backward direction has seen the last character only, so
    `predicts="every"` would let a place see the character that it is to predict (a choice: the code
    with `bidirectional=True` and no other change).

    Raises: `ConfigError` for a bidirectional network that predicts at every place.

    Source: FedML, `python/fedml/model/nlp/rnn.py`, `RNN_OriginalFedAvg` (last place) and
    `RNN_FedShakespeare` (every), with PyTorch's initialisation; FedSecurity (Han et al. 2024),
    Section 5, uses it on Shakespeare. After McMahan et al. 2017, Section 3.

    Example:
        >>> import jax
        >>> from fedjax_sec.core import registry
        >>> def parameters(**fields):
        ...     model = registry.models.build({"name": "fedml_rnn", **fields}).make((80,), 90)
        ...     shapes = jax.eval_shape(model.init, jax.random.key(0))
        ...     return sum(leaf.size for leaf in jax.tree.leaves(shapes))
        >>> parameters(), parameters(two_biases=False), parameters(bidirectional=True)
        (822570, 820522, 2168618)
    """

    inputs = frozenset({"tokens"})
    embedding: int = static(8, "Numbers for each character.", low=1, high=COUNT)
    hidden: tuple[int, ...] = static((256, 256), "Widths of the LSTM layers.", low=1, high=COUNT)
    bidirectional: bool = static(False, "Read backwards, too, as FedSecurity's text says.")
    two_biases: bool = static(True, "PyTorch's two biases a gate, or one.")
    predicts: str = static(
        "last",
        "Where the linear layer stands: at the `last` place, or at `every` place.",
        choices=("last", "every"),
    )

    def make(self, input_shape, num_classes):
        if self.bidirectional and self.predicts == "every":
            raise ConfigError(
                "model: a bidirectional fedml_rnn with predicts 'every' would see the character "
                "that it is to predict; set predicts to 'last', or bidirectional to false."
            )
        network = _Network(
            num_classes,
            self.embedding,
            self.hidden,
            self.bidirectional,
            self.two_biases,
            self.predicts,
        )
        return flax_model(network, input_shape, dtype=jnp.int32)

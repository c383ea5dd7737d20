"""Robbing the Fed (Fowl, Geiping, Czaja, Goldblum and Goldstein, ICLR 2022)."""

import math

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm

from fedjax_sec.attacks.privacy import _first_layer, _labels, _matching, _planting
from fedjax_sec.core import Guess, PrivacyAttack, numeric, registry, static


@registry.privacy_attacks.register("imprint")
class Imprint(PrivacyAttack):
    r"""A malicious server's layer whose units each count the inputs above a value, in order.

    The server puts a dense layer in front of the network (`inserted_layer`). All its units measure
    the same, :math:`\langle h, x \rangle` of the normalised input, and unit i is above zero where
    that is above :math:`c_i`, the edges of `bins` of equal probability:

    .. math:: W_{\cdot i} = h, \qquad b_i = - c_i, \qquad V = 1 / U, \qquad
              \hat x_i = \frac{\nabla_{W_{\cdot i}} - \nabla_{W_{\cdot i + 1}}}
              {\nabla_{b_i} - \nabla_{b_{i + 1}}}

    which is an example itself where it alone falls between two edges: of n examples that are more,
    the more bins there are. The n differences are returned that lie within the valid
    range and have the largest gradients of a bias. `x [n, ...]`, clipped to it, `y [n]`.

    h is a cosine over the flat input (`dct` of `mode`), their mean, or `random`, of length 1, so
    that inputs of independent numbers of variance 1 measure 1; real ones do not: `location` and
    `deviation` are what the server expects, Laplace-distributed for `dct` and else normal. It may
    have them from any data that look like the clients'. Of several local steps it is approximate.

    Raises: `ConfigError` for clients that do not take plain gradient steps.

    Source: Fowl et al. 2022, Section 3 and Equation 3; DCT of mode 32, the distributions and 64
    bins: breaching (Geiping et al.), `imprint.py`, whose h is not of length 1 and whose V is 1: the
    sum of many units saturates the loss, and examples without a gradient stay hidden. What is
    expected of inputs is a choice there too.

    Example:
        >>> from fedjax_sec.core import registry
        >>> registry.privacy_attacks.build({"name": "imprint", "bins": 128}).tampers
        True
    """

    tampers = True
    inputs = frozenset({"pixels", "features"})
    needs_labels = True
    bins: int = static(64, "Units of the layer.", low=2, high=10**6)
    measure: str = static(
        "dct", "What the units measure of an input.", choices=("dct", "mean", "random")
    )
    mode: int = static(32, "Frequency of the cosine.", low=1, high=10**6)
    location: float = numeric(0.0, "Expected centre of what they measure.", low=-1e6, high=1e6)
    deviation: float = numeric(1.0, "Expected deviation of it.", above=0, high=1e6)
    labels: str = static("bias", "Where labels are from.", choices=(*_labels.STRATEGIES, "known"))

    def insert(self, network):
        return _planting.inserted(network, self.bins, "linear")

    def edges(self, units: int):
        """c [U], ascending: the first one is below every input."""
        shares = jnp.arange(1, units) / units
        if self.measure == "dct":
            inner = -jnp.sign(shares - 0.5) * jnp.log1p(-2 * jnp.abs(shares - 0.5)) / math.sqrt(2)
        else:
            inner = norm.ppf(shares)
        low = jnp.full((1,), -10.0)
        return self.location + self.deviation * jnp.concatenate([low, inner])

    def query(self, key, features: int):
        """h [F], of length 1."""
        place = jnp.arange(features)
        if self.measure == "dct":
            h = jnp.cos(math.pi / features * (place + 0.5) * self.mode)
        elif self.measure == "mean":
            h = jnp.ones(features)
        else:
            h = jax.random.normal(key, (features,))
        return h / jnp.linalg.norm(h)

    def plant(self, key, params, task):
        layer = _first_layer.first_dense_name(task)
        features, units = task.space.shapes[f"{layer}/kernel"]
        edges = self.edges(units)
        kernel = self.query(key, features)[:, None]
        back = jnp.full((), 1.0 / units), jnp.zeros(())
        return _planting.planted(params, task, kernel, -edges, back)

    def reconstruct(self, key, message, params, task, known):
        slope = _matching.slope_of(message, params, task, known)
        labels = _labels.labels_of(self.labels, slope, params, task, known)
        kernel, bias = _first_layer.first_dense(slope, params, task)
        nothing = jnp.zeros((kernel.shape[0], 1))
        kernel = kernel - jnp.concatenate([kernel[:, 1:], nothing], axis=1)
        bias = bias - jnp.concatenate([bias[1:], jnp.zeros(1)])
        return Guess(_first_layer.most_certain(kernel, bias, task, known.count), labels)

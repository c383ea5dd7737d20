"""When the curious abandon honesty (Boenisch, Dziedzic, Schuster, Shamsabadi and others, 2023)."""

import jax
import jax.numpy as jnp

from fedjax_sec.attacks.privacy import _first_layer, _labels, _matching, _planting
from fedjax_sec.core import COUNT, Guess, PrivacyAttack, numeric, registry, static


@registry.privacy_attacks.register("curious_abandon_honesty")
class CuriousAbandonHonesty(PrivacyAttack):
    r"""A malicious server's trap weights: units of the first layer that few inputs pass.

    Each unit of the first dense layer gets weights of which half, at random places, are negative,
    and the other half their opposites a little smaller,

    .. math:: w^-_k = - |z_k|, \quad z_k \sim \mathcal{N}(0, std^2), \qquad
              w^+_k = - scale \cdot w^-_k, \qquad b = 0

    so that for inputs in [0, 1] it is rarely above zero, and then often for one example of a batch,
    which its gradient then is. `x [n, ...]`, clipped to the valid range, `y [n]`.

    `units: null` uses the network's own first layer, if it is a dense one with ReLU on the input
    itself, such as that of `mlp`, and returns the n inputs that most units give alike, as
    `analytic` does. A number inserts a layer of so many (`inserted_layer`, connection `addition`),
    in which an example has one derivative for all units that it passes: the n inputs with the
    smallest gradients of the bias are returned, but for mixtures of them (a choice).

    Raises: `ConfigError` for clients that do not take plain gradient steps, and for a network whose
    first layer is no such one where `units` is null.

    Source: Boenisch et al. 2023, Section 4.2 and Algorithm 1: halves, 0.5 and 0.95 as in breaching
    (Geiping et al.), `imprint.py`, `CuriousAbandonHonesty`.

    Example:
        >>> from fedjax_sec.core import registry
        >>> registry.privacy_attacks.build("curious_abandon_honesty").scale
        0.95
    """

    tampers = True
    inputs = frozenset({"pixels", "features"})
    needs_labels = True
    units: int | None = static(
        None, "Units of a layer that is inserted (null: the network's own).", low=1, high=COUNT
    )
    std: float = numeric(0.5, "Deviation of the weights.", above=0, high=1e6)
    scale: float = numeric(0.95, "By how much positive weights are smaller.", above=0, high=1e6)
    labels: str = static("bias", "Where labels are from.", choices=(*_labels.STRATEGIES, "known"))

    def insert(self, network):
        if self.units is None:
            return network
        return _planting.inserted(network, self.units, "addition")

    def plant(self, key, params, task):
        layer = _first_layer.first_dense_name(task)
        features, units = task.space.shapes[f"{layer}/kernel"]

        def column(key):
            place_key, weight_key = jax.random.split(key)
            half = features // 2
            size = jnp.abs(self.std * jax.random.normal(weight_key, (features - half,)))
            column = jnp.concatenate([self.scale * size[:half], -size])
            return jax.random.permutation(place_key, column)

        kernel = jax.vmap(column, out_axes=1)(jax.random.split(key, units))
        return _planting.planted(params, task, kernel, jnp.zeros(()))

    def reconstruct(self, key, message, params, task, known):
        slope = _matching.slope_of(message, params, task, known)
        labels = _labels.labels_of(self.labels, slope, params, task, known)
        kernel, bias = _first_layer.first_dense(slope, params, task)
        shared = self.units is not None
        return Guess(_first_layer.most_certain(kernel, bias, task, known.count, shared), labels)

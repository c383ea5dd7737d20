"""Inverting gradients (Geiping, Bauermeister, Dröge and Moeller, NeurIPS 2020)."""

import jax
import jax.numpy as jnp
import optax

from fedjax_sec.attacks.privacy import _labels, _matching, _search
from fedjax_sec.core import PrivacyAttack, numeric, registry, static


@registry.privacy_attacks.register("inverting_gradients")
class InvertingGradients(PrivacyAttack):
    r"""Searches images whose gradient has the client's direction and that vary little.

    With g the gradient of the client's step, over all layers together,

    .. math:: \min_x \; 1 - \frac{\langle \nabla_w \ell(x, y), g \rangle}
              {\|\nabla_w \ell(x, y)\| \, \|g\|} + \alpha \, TV(x)

    with TV the mean absolute difference of neighbouring pixels. Adam takes `iterations` steps, of
    the gradient's sign where `signed`, from normal noise in normalised units; the rate falls to a
    tenth after 1/2.667, 1/1.6 and 1/1.142 of them, rounded down; x is clipped to the valid pixels
    in every step where `boxed`. Of `restarts`, side by side, the lowest loss is kept. `x [n, H, W,
    C]`, `y [n]`. Of several local steps the whole update is matched, through unrolled steps on the
    guessed examples; with several batches their order is guessed to be that of the examples.

    Labels are read from the last layer, or `known`. The network computes as in evaluation.

    Raises: `ConfigError` for clients that do not take plain gradient steps, for inputs that are no
    images, and for a model whose head is no dense layer.

    Source: Geiping et al. 2020, Sections 4 and 6, Equation 4; author code
    (`reconstruct_image.py`, `inversefed/reconstruction_algorithms.py`): rate 0.1; 24,000
    iterations, alpha 1e-4 and signs in its script, which are the defaults here; 4,800, 0.1 and no
    signs in its class. For FedAvg (`loss: update`) it takes rate 1.

    Example:
        >>> from fedjax_sec.core import registry
        >>> attack = {"name": "inverting_gradients", "iterations": 4800, "total_variation": 0.1}
        >>> registry.privacy_attacks.build(attack).signed
        True
    """

    inputs = frozenset({"pixels"})
    needs_labels = True
    iterations: int = static(24_000, "Steps of Adam.", low=8, high=10**7)
    learning_rate: float = numeric(0.1, "Its rate.", above=0, high=1e6)
    total_variation: float = numeric(1e-4, "alpha, weight of the variation.", low=0, high=1e6)
    signed: bool = static(True, "Adam gets the signs of the gradient.")
    boxed: bool = static(True, "x is clipped to the valid pixels in every step.")
    restarts: int = static(
        1, "Independent starts, of which the lowest loss is kept.", low=1, high=10**6
    )
    labels: str = static("bias", "Where labels are from.", choices=(*_labels.STRATEGIES, "known"))
    snapshots: int = static(0, "Inputs to keep on the way, evenly spaced.", low=0, high=1000)

    def reconstruct(self, key, message, params, task, known):
        slope = _matching.slope_of(message, params, task, known)
        labels = _labels.labels_of(self.labels, slope, params, task, known)
        targets = jax.nn.one_hot(labels, task.num_classes)
        (mean, std), (low, high) = _matching.units(task), _matching.limits(task)
        bounds = [int(self.iterations // part) for part in (2.667, 1.6, 1.142)]
        rate = optax.piecewise_constant_schedule(self.learning_rate, dict.fromkeys(bounds, 0.1))
        optimizer = optax.adam(rate)

        def loss(x):
            made = _matching.simulate(params, x * std + mean, targets, task, known)
            variation = _matching.total_variation(x)
            return _matching.cosine_distance(made, slope) + self.total_variation * variation

        def gradient_of(step, x):
            gradient = jax.grad(loss)(x)
            return jnp.sign(gradient) if self.signed else gradient

        def search(key):
            x = jax.random.normal(key, (known.count, *task.inputs.shape))
            box = (low, high) if self.boxed else None
            x, trail = _search.descend(
                gradient_of, x, optimizer, self.iterations, self.snapshots, box
            )
            return _matching.guess_of(x, labels, loss(x), task, trail)

        return _matching.best_of(jax.vmap(search)(jax.random.split(key, self.restarts)))

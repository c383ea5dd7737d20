"""Deep leakage from gradients (Zhu, Liu and Han, NeurIPS 2019)."""

import dataclasses

import jax
import jax.flatten_util
import jax.numpy as jnp

from fedjax_sec.attacks.privacy import _labels, _matching
from fedjax_sec.core import PrivacyAttack, numeric, registry, static
from fedjax_sec.ops import lbfgs


@dataclasses.dataclass(frozen=True)
class _Dlg(PrivacyAttack):
    """Inputs, and labels where they are guessed, whose gradient is nearest to the client's."""

    inputs = frozenset({"pixels", "features"})
    needs_labels = True
    steps: int = static(300, "Calls of L-BFGS.", low=1, high=10**6)
    iterations: int = static(20, "Its iterations in a call.", low=1, high=10**6)
    memory: int = static(100, "The steps that it remembers.", low=1, high=10**4)
    learning_rate: float = numeric(1.0, "Length of its steps.", above=0, high=1e6)
    restarts: int = static(
        1, "Independent starts, of which the lowest loss is kept.", low=1, high=10**6
    )

    def _search(self, key, slope, params, task, known, labels=None):
        """The guess of the lowest loss; `labels` [n] are those that are not guessed along."""
        mean, std = _matching.units(task)
        shape = (known.count, *task.inputs.shape)
        start = (jnp.zeros(shape), jnp.zeros((known.count, task.num_classes)))
        vector, unravel = jax.flatten_util.ravel_pytree(start if labels is None else start[:1])

        def guess(vector):
            x, *scores = unravel(vector)
            if labels is None:
                return x * std + mean, jax.nn.softmax(scores[0])
            return x * std + mean, jax.nn.one_hot(labels, task.num_classes)

        def loss(vector):
            made = _matching.simulate(params, *guess(vector), task, known)
            return _matching.squared_distance(made, slope)

        def search(key):
            begin = jax.random.normal(key, vector.shape)
            end, value = lbfgs.minimize(
                loss, begin, self.steps, self.iterations, self.memory, self.learning_rate
            )
            x, *scores = unravel(end)
            y = labels if labels is not None else jnp.argmax(scores[0], axis=1).astype(jnp.int32)
            return _matching.guess_of(x, y, value, task)

        return _matching.best_of(jax.vmap(search)(jax.random.split(key, self.restarts)))


@registry.privacy_attacks.register("dlg")
class Dlg(_Dlg):
    r"""Searches inputs and labels together, by L-BFGS from random ones.

    With g the gradient of the client's step and :math:`\sigma` the softmax,

    .. math:: \min_{x, z} \; \| \nabla_w \, CE(w; x, \sigma(z)) - g \|^2, \qquad
              x, z \sim \mathcal{N}(0, 1) \text{ at first}

    where the loss is the mean over the n examples. x is searched in normalised units, and what is
    returned is clipped to the valid range, `x [n, ...]`, with the labels :math:`\arg\max z`, `y
    [n]`. Of several local steps the sum of their gradients is matched, by unrolled steps. The
    search fails from many starts: `restarts` of them run side by side, and the lowest loss is kept.

    Raises: `ConfigError` for clients that do not take plain gradient steps.

    Source: Zhu et al. 2019, Algorithm 1 and Equation 4; author code `main.py`: L-BFGS with rate 1,
    300 calls, and its optimizer's defaults of 20 iterations a call and 100 remembered steps,
    without a line search. It starts x in the units of its pixels, which it does not normalise.

    Example:
        >>> from fedjax_sec.core import registry
        >>> registry.privacy_attacks.build({"name": "dlg", "restarts": 4}).steps
        300
    """

    def reconstruct(self, key, message, params, task, known):
        slope = _matching.slope_of(message, params, task, known)
        return self._search(key, slope, params, task, known)


@registry.privacy_attacks.register("idlg")
class Idlg(_Dlg):
    r"""Reads the label from the last layer's gradient, and searches the inputs by L-BFGS.

    .. math:: y = \arg\min_c \sum_j \frac{\partial \ell}{\partial W_{jc}}, \qquad
              \min_x \; \| \nabla_w \, CE(w; x, y) - g \|^2

    exact for one example where the features before the last layer are not negative. `labels` gives
    a batch's labels another way. All else as in `dlg`.

    Raises: `ConfigError` for clients that do not take plain gradient steps, and for a model whose
    head is no dense layer.

    Source: Zhao, Mopuri, Bilen 2020 (iDLG), Section 3 and Algorithm 1; author code
    `iDLG.py`: rate 1, 300 calls.

    Example:
        >>> from fedjax_sec.core import registry
        >>> registry.privacy_attacks.build("idlg").labels
        'sign'
    """

    labels: str = static("sign", "Where labels are from.", choices=(*_labels.STRATEGIES, "known"))

    def reconstruct(self, key, message, params, task, known):
        slope = _matching.slope_of(message, params, task, known)
        labels = _labels.labels_of(self.labels, slope, params, task, known)
        return self._search(key, slope, params, task, known, labels)

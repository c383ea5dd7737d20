"""The inputs of a first dense layer, read from its gradient."""

from fedjax_sec.attacks.privacy import _first_layer, _labels, _matching
from fedjax_sec.core import Guess, PrivacyAttack, registry, static


@registry.privacy_attacks.register("analytic")
class Analytic(PrivacyAttack):
    r"""Divides the gradient of the first dense layer's kernel by that of its bias.

    A unit i whose layer takes the normalised input itself has

    .. math:: \frac{\partial \ell / \partial W_{\cdot i}}{\partial \ell / \partial b_i}
              = \frac{\sum_e \delta_{ei} x_e}{\sum_e \delta_{ei}}

    with :math:`\delta_{ei}` the derivative of example e's loss by the unit: x itself where one
    example alone moves the unit, a mixture else. Each unit that moves gives an input. The n that
    most units give alike are returned, then those within the valid range, then those with the
    largest gradients of their bias, and mixtures of those before last (choices: mixtures differ
    from unit to unit). `x [n, ...]`, clipped to the range, `y [n]`.

    Raises: `ConfigError` for a model whose first layer is not a dense one with a bias on the input
    itself.

    Source: Phong et al. 2018 (Privacy-preserving deep learning via additively homomorphic
    encryption), Section III; for deep networks Geiping et al. 2020, Proposition 3.1.

    Example:
        >>> from fedjax_sec.core import registry
        >>> registry.privacy_attacks.build("analytic").labels
        'bias'
    """

    inputs = frozenset({"pixels", "features"})
    needs_labels = True
    labels: str = static("bias", "Where labels are from.", choices=(*_labels.STRATEGIES, "known"))

    def reconstruct(self, key, message, params, task, known):
        slope = _matching.slope_of(message, params, task, known)
        labels = _labels.labels_of(self.labels, slope, params, task, known)
        kernel, bias = _first_layer.first_dense(slope, params, task)
        return Guess(_first_layer.most_certain(kernel, bias, task, known.count), labels)

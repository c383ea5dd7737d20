"""Labels of a batch, read from the gradient of the last layer."""

from fedjax_sec.attacks.privacy import _labels, _matching
from fedjax_sec.core import Guess, PrivacyAttack, registry, static


@registry.privacy_attacks.register("labels")
class Labels(PrivacyAttack):
    r"""Reads the n labels of a batch in closed form, and no inputs.

    With :math:`\nabla_W` [F, C] and :math:`\nabla_b` [C] the gradients of the last layer, of a
    batch of n examples:

    - `bias`: every class with a negative entry of :math:`\nabla_b` is there; with m the sum of
      these entries over n, m is taken off one for each time its class is named, and the class with
      the lowest entry is named until there are n. Labels may repeat.
    - `sign`: the n classes with the lowest sums of columns of :math:`\nabla_W`; exact for one
      example where features are not negative.
    - `minimum`: the n classes whose columns hold the lowest entries.

    `y [n]`. `label_bag` solves linear programs instead.

    Raises: `ConfigError` for clients that do not take plain gradient steps, for a model whose head
    is no dense layer, and for `bias` where it has none.

    Source: `bias`: breaching (Geiping et al.), `base_attack.py`, `bias-corrected`; `sign`: Zhao,
    Mopuri, Bilen 2020 (iDLG), Section 3; `minimum`: Yin et al. 2021, Section 3.2.

    Example:
        >>> from fedjax_sec.core import registry
        >>> registry.privacy_attacks.build({"name": "labels", "strategy": "sign"}).strategy
        'sign'
    """

    inputs = frozenset({"pixels", "features"})
    needs_labels = True
    strategy: str = static("bias", "How labels are read.", choices=tuple(_labels.STRATEGIES))

    def reconstruct(self, key, message, params, task, known):
        slope = _matching.slope_of(message, params, task, known)
        return Guess(None, _labels.labels_of(self.strategy, slope, params, task, known))

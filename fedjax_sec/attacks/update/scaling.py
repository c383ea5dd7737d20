"""Scaling attack: a backdoor learned from added examples, and multiplied (Bagdasaryan et al.)."""

from typing import Any

from fedjax_sec.attacks.update._replacement import Replacement
from fedjax_sec.core import ConfigError, component, registry, static

#: Gu et al.'s pattern of four pixels at the lower right corner of images of 28 x 28.
CORNER = {
    "name": "trojan",
    "pattern": "pixels",
    "pixels": [[26, 26], [24, 26], [26, 24], [25, 25]],
    "value": 1.0,
    "target": 0,
}


@registry.attacks.register("scaling")
class Scaling(Replacement):
    r"""Malicious clients add poisoned copies to their data, and send their updates times a factor.

    A share p of a malicious client's examples, `backdoor.fraction`, is copied, triggered and
    relabelled; the client trains on its own examples and on the copies, and sends

    .. math:: u_{mal} = \lambda u

    `updates [K, D] -> [K, D]`. The number of examples that it reports is that of its own.
    `accounts_for: weights_and_rate` computes lambda from all clients' numbers of examples and the
    server's learning rate, as `boost` does.

    Raises: `ConfigError` when `backdoor` is no attack on data or does not fit the data; for
    `accounts_for` as `boost`.

    Source: Bagdasaryan et al. 2020 (How to backdoor federated learning); as described in Cao et al.
    2021 (FLTrust), Section VI-A, where lambda is n. For MNIST "the same pattern trigger in [Gu et
    al.]", target 0: the pixels of the default are those of FLDetector's code; the network
    `fltrust_cnn` sees one of the four. The text gives no p: the default, half, is a choice, and so
    is what is reported.

    Example:
        >>> from fedjax_sec.core import registry
        >>> registry.attacks.build("scaling").backdoor.target
        0
    """

    backdoor: Any = component("attack", CORNER, "What to teach, an attack on data.")
    copies: bool = static(
        True, "Poison copies that are added to the data (false: the examples themselves)."
    )

    @property
    def needs(self):
        return super().needs | {"task"}

    def check(self, path, setting):
        self.check_factor(path)
        if self.backdoor.stage != "data":
            raise ConfigError(
                f"{path}.backdoor must be an attack on data such as 'trojan' or "
                f"'feature_trigger', got {self.backdoor.registered_name!r}."
            )

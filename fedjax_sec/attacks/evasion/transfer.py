"""Black-box transfer: inputs made on another model."""

from typing import Any

from fedjax_sec.core import ConfigError, Evasion, component, registry, static


@registry.evasions.register("transfer")
class Transfer(Evasion):
    """Inputs that an attack makes on a surrogate, a model trained on its own, not on the victim.

    `x [B, ...] -> x' [B, ...]`. The surrogate is the final model of a finished run, named by its
    folder, on the same data and with any network; it has to keep its parameters
    (`checkpoint.keep_params`). Nothing of the victim is used.

    Raises: `ConfigError` for a folder without a finished run.

    Source: Papernot et al.: Practical black-box attacks against machine learning (2017); as in
    Zizzo et al. 2020 (FAT), Section 3.2 and 4.2, which does not describe its surrogate.

    Example:
        >>> from fedjax_sec.core import registry
        >>> spec = {"name": "transfer", "surrogate": "results/other", "attack": {"eps": 0.1}}
        >>> registry.evasions.build(spec).attack.eps
        0.1
    """

    needs = frozenset({"surrogate"})
    surrogate: str = static("", "Folder of a finished run.")
    attack: Any = component("evasion", "pgd", "How the surrogate is attacked.")

    def check(self, path, setting):
        if "surrogate" in self.attack.needs:
            raise ConfigError(
                f"{path}.attack is made on the surrogate itself and cannot be "
                f"{self.attack.registered_name!r}; choose an attack such as 'pgd'."
            )

    def apply(self, key, logits, x, y, surrogate=None):
        if surrogate is None:
            raise ValueError("transfer needs the surrogate's logits, surrogate(x) -> [B, C].")
        return self.attack.apply(key, surrogate, x, y)

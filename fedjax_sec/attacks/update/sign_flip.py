"""Sign flipping: the malicious clients send their own update reversed."""

from fedjax_sec.core import ANY_SCALE, UpdateAttack, numeric, registry


@registry.attacks.register("sign_flip")
class SignFlip(UpdateAttack):
    r"""Every malicious client sends its own honest update times a negative factor.

    .. math:: u_{mal} = -scale \cdot u_{honest}

    `updates [K, D] -> [K, D]`.

    Source: the "flip" mode of FedSecurity's Byzantine attack (Han et al. 2023), whose factor is 1.

    Example:
        >>> import fedjax_sec
        >>> print(fedjax_sec.attack([[1.0], [2.0]], "sign_flip", malicious=[True, False])[:, 0])
        [-1.  2.]
    """

    separable = True
    scale: float = numeric(1.0, "Factor of the reversed update.", above=0, unbounded=ANY_SCALE)

    def apply(self, key, updates, state, view):
        return -self.scale * updates, state, {}

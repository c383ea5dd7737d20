"""Boosting: the malicious clients multiply their updates."""

from fedjax_sec import registry
from fedjax_sec.schema import numeric


@registry.attacks.register("boost")
class Boost:
    r"""Every malicious client sends its update times a large factor.

    .. math:: u_{mal} = factor \cdot u

    A factor K lets one client's update survive the mean over K clients of equal weight. It follows
    an attack on data, `attack: [label_flip, boost]`: what the clients learn from poisoned examples
    is boosted. `updates [K, D] -> [K, D]`.

    Source: Bhagoji et al. 2019 (Analyzing Federated Learning through an Adversarial Lens), explicit
    boosting: the factor is 1 / alpha, alpha being the client's weight in the mean. Named, without a
    value, in Ozdayi, Kantarcioglu, Gel 2021, Section 5.

    Example:
        >>> import fedjax_sec
        >>> print(fedjax_sec.attack([[1.0], [2.0]], "boost", malicious=[True, False])[:, 0])
        [2. 2.]
    """

    stage = "update"
    factor: float | None = numeric(
        None, "What updates are multiplied by (null: K, the clients of the round).", above=0
    )

    def idle(self, setting):
        if (setting.num_clients if self.factor is None else self.factor) == 1:
            return (
                "boost would do nothing: its factor is 1"
                + (", the clients of a round" if self.factor is None else "")
                + "; give another factor, or leave boost out."
            )
        return None

    def init(self, num_clients, dim):
        return ()

    def apply(self, key, updates, state, view):
        factor = updates.shape[0] if self.factor is None else self.factor
        return factor * updates, state, {}

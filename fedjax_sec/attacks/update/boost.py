"""Boosting: the malicious clients multiply their updates."""

from fedjax_sec.attacks.update._replacement import Replacement
from fedjax_sec.core import registry


@registry.attacks.register("boost")
class Boost(Replacement):
    r"""Every malicious client sends its update times a large factor.

    .. math:: u_{mal} = factor \cdot u

    A factor K lets one client's update survive the mean over K clients of equal weight, summed by a
    server with learning rate 1. `accounts_for: weights_and_rate` makes it survive in any weighted
    mean and at any rate: with M the malicious clients of the round, w the numbers of examples and
    :math:`\eta` the server's learning rate,

    .. math:: factor = \frac{\sum_i w_i}{\eta \sum_{i \in M} w_i}

    so that the new global model is the (weighted mean) model of M plus what honest updates add. An
    adversary that does not see the others takes the mean of its own clients' weights for theirs.
    On a stack (`fedjax_sec.attack`) all weights are equal and the rate is 1.

    It follows an attack on data, `attack: [label_flip, boost]`: what the clients learn from
    poisoned examples is boosted. `updates [K, D] -> [K, D]`.

    Raises: `ConfigError` for a factor of 1, which does nothing; for `accounts_for` beside a factor,
    or with a server whose step is not a rate times the aggregate.

    Source: Bhagoji et al. 2019 (Analyzing Federated Learning through an Adversarial Lens), explicit
    boosting: the factor is 1 / alpha, alpha being the client's weight in the mean. Named, without a
    value, in Ozdayi, Kantarcioglu, Gel 2021, Section 5. `weights_and_rate`: Bagdasaryan et al. 2020
    (How to backdoor federated learning), Equation 3, whose factor for one client of n equal ones is
    :math:`n / \eta`.

    Example:
        >>> import fedjax_sec
        >>> print(fedjax_sec.attack([[1.0], [2.0]], "boost", malicious=[True, False])[:, 0])
        [2. 2.]
    """

    def check(self, path, setting):
        self.check_factor(path)

    def idle(self, setting):
        factor = setting.num_clients if self.factor is None else self.factor
        if factor == 1 and self.accounts_for == "clients":
            return (
                "boost would do nothing: its factor is 1"
                + (", the clients of a round" if self.factor is None else "")
                + "; give another factor, or leave boost out."
            )
        return None

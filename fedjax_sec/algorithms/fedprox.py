"""FedProx: Li et al., MLSys 2020."""

from fedjax_sec.algorithms._averaging import Averaging
from fedjax_sec.core import Hooks, numeric, registry


@registry.algorithms.register("fedprox")
class FedProx(Averaging):
    r"""FedAvg whose clients are pulled towards the global parameters.

    Each local step descends the client's loss plus

    .. math:: \frac{\mu}{2} \|w - w_t\|^2

    that is, the gradient g becomes :math:`g + \mu \delta`, where :math:`\delta` is the update so
    far. The term is added to the trained parameters only, behind clipping and L2, before the
    optimizer. `mu = 0` is FedAvg, to the bit.

    Source: Li et al. 2020 (Federated optimization in heterogeneous networks), Equation 2 and
    Algorithm 2; the text tries mu in {0.001, 0.01, 0.1, 1}, the default 0.01 is a choice. The
    clients' inexactness is their number of local steps, `client.steps` or `client.epochs`.

    Example:
        >>> from fedjax_sec.core import registry
        >>> registry.algorithms.build({"name": "fedprox", "mu": 0.1}).mu
        0.1
    """

    mu: float = numeric(0.01, "Weight of the distance to the global model.", low=0, high=1e6)

    def hooks(self, params):
        return Hooks(correct=lambda gradient, delta: gradient + self.mu * delta)

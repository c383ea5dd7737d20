"""Federated averaging: McMahan et al., AISTATS 2017."""

from fedjax_sec.algorithms._averaging import Averaging
from fedjax_sec.core import registry


@registry.algorithms.register("fedavg")
class FedAvg(Averaging):
    r"""Clients send their updates; the server steps along the aggregate.

    With the defence in place of the weighted mean,

    .. math:: w_{t+1} = w_t + step(\mathrm{agg}(u_1, \dots, u_K)), \qquad u_i = w_i - w_t

    where `client` is the local training and step the `server.optimizer`, whose gradient is minus
    the aggregate (SGD with rate 1: the mean of the local models). With one local step it is FedSGD.

    Source: McMahan et al. 2017, Algorithm 1; server optimizers: Reddi et al. 2021 (Adaptive
    federated optimization), Algorithm 2.

    Example:
        >>> import fedjax_sec
        >>> result = fedjax_sec.run({"algorithm": "fedavg", "rounds": 1})
        >>> result.experiment.algorithm.registered_name
        'fedavg'
    """

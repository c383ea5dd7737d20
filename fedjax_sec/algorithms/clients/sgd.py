"""Local SGD (FedSGD with one step, FedAvg with more): McMahan et al., AISTATS 2017."""

from fedjax_sec.algorithms.clients._local_sgd import LocalSgd
from fedjax_sec.core import registry


@registry.clients.register("sgd")
class Sgd(LocalSgd):
    r"""Minibatch training with one of optax's optimizers, for a number of steps or epochs.

    Step s of a round changes the client's parameters by the optimizer's update for the gradient
    of

    .. math:: \frac{1}{|B_s|} \sum_{(x, y) \in B_s} CE(w; x, y) + \frac{l2}{2} \|w\|^2 .

    The update sent to the server, delta [D], is the sum of these changes. An epoch visits each
    local example once, in an order shuffled anew for every epoch (`sampling="epoch"`), the last
    batch being smaller where the batch size does not divide the number of examples (`drop_last`
    leaves it out, as FedML's loaders of CIFAR do); with `steps`, epochs run on across rounds, so
    that round t continues where round t - 1 stopped.

    With `max_norm` M, training is projected: after each step delta becomes
    :math:`\delta \min(1, M / \|\delta\|)`, so no client's update is ever longer than M, also on the
    way. With `clip_gradient` c each batch's gradient g becomes :math:`g \min(1, c / \|g\|)`; the L2
    term is added afterwards and the optimizer comes last, as in PyTorch.

    With an `augmentation` each batch's inputs are changed at random first, by draws of their own:
    the same run without it has the same batches and dropout masks.

    Raises: `ConfigError` unless exactly one of `steps` and `epochs` is given, or when the batch
    size exceeds the examples of the largest client.

    Source: McMahan et al. 2017, Algorithm 1. Batches without replacement and the smaller last
    batch follow PyTorch's data loader, as used by ALIE's author code; `uniform` is a choice.
    Projection: Ozdayi et al. 2021 (RLR), Section 4, whose code (`agent.py`, `local_train`) also
    clips gradients to norm 10 and leaves the momentum as it is when it projects, as here.

    Example:
        >>> from fedjax_sec.core import registry
        >>> client = registry.clients.build({"name": "sgd", "steps": 1, "batch_size": 83})
        >>> client.steps, client.batch_size
        (1, 83)
    """

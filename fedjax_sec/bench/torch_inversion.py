"""Inverting gradients in plain PyTorch, one message after another, as breaching does it.

The same steps as its `OptimizationBasedAttacker` with `invertinggradients.yaml`, without its
bookkeeping: a test holds them against what breaching itself gave. Imported only where PyTorch is
installed.
"""

import torch
from torch.nn import functional


def invert(model, gradient, labels, start, iterations: int, mean, std, variation: float):
    """The images after so many signed steps of Adam, [n, C, H, W] in normalised units.

    Args:
        model: the network, in evaluation mode.
        gradient: of every parameter, the mean over the n images.
        labels: [n].
        start: where the search begins.
        iterations: steps of Adam, whose rate of 0.1 falls to a tenth three times.
        mean, std: of the normalisation, [1, C, 1, 1].
        variation: the weight of the total variation.
    """
    x = start.clone().requires_grad_()
    weights = list(model.parameters())
    optimizer = torch.optim.Adam([x], lr=0.1)
    milestones = [int(iterations // part) for part in (2.667, 1.6, 1.142)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, 0.1)
    low, high = -mean / std, (1 - mean) / std
    length = sum((g * g).sum() for g in gradient).sqrt()
    for _ in range(iterations):
        loss = functional.cross_entropy(model(x), labels)
        made = torch.autograd.grad(loss, weights, create_graph=True)
        product = sum((a * b).sum() for a, b in zip(made, gradient, strict=True))
        value = 1 - product / (sum((a * a).sum() for a in made).sqrt() * length)
        if variation:
            down, right = x.diff(dim=2).abs().mean(), x.diff(dim=3).abs().mean()
            value = value + variation * (down + right)
        (x.grad,) = torch.autograd.grad(value, x)
        x.grad.sign_()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            x.copy_(torch.maximum(torch.minimum(x, high), low))
    return x.detach()

"""A plain PyTorch simulator of the benchmarked rounds: a loop over clients, as one would write it.

Honest work: data in memory as one tensor, gradients straight into the rows of one stack, no copies
that the round does not need, all of PyTorch's threads. Imported only where PyTorch is installed.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional


def network(name: str) -> nn.Sequential:
    """The networks that the benchmarks train, for 28 x 28 grey images and 10 classes."""
    if name == "mlp":
        layers = [nn.Flatten(), nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10)]
    elif name == "fltrust_cnn":
        layers = [
            nn.Conv2d(1, 30, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(30, 50, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(1250, 100),
            nn.ReLU(),
            nn.Linear(100, 10),
        ]
    elif name == "rlr_cnn":
        layers = [
            nn.Conv2d(1, 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(9216, 128),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(128, 10),
        ]
    else:
        raise ValueError(f"no PyTorch version of the network {name!r}")
    return nn.Sequential(*layers)


def load_parameters(model: nn.Sequential, variables: dict) -> None:
    """Copies our network's parameters, a flax tree, into the PyTorch one."""
    layers = iter(variables["params"].items())
    channels = None
    with torch.no_grad():
        for module in model:
            if not isinstance(module, (nn.Conv2d, nn.Linear)):
                continue
            _, ours = next(layers)
            kernel = np.array(ours["kernel"])
            if isinstance(module, nn.Conv2d):
                kernel, channels = kernel.transpose(3, 2, 0, 1), kernel.shape[3]
            elif channels is not None:  # ours flattens [H, W, C], PyTorch [C, H, W]
                side = round((kernel.shape[0] // channels) ** 0.5)
                kernel = kernel.reshape(side, side, channels, -1).transpose(2, 0, 1, 3)
                kernel, channels = kernel.reshape(-1, kernel.shape[-1]).T, None
            else:
                kernel = kernel.T
            module.weight.copy_(torch.from_numpy(kernel.copy()))
            module.bias.copy_(torch.from_numpy(np.array(ours["bias"])))


class Simulator:
    """Rounds of K clients that train one after another.

    Args:
        model: the network, holding the global weights.
        x, y: all training images as stored (0 to 255) [T, 28, 28, 1] and labels [T].
        parts: the indices of each client's examples.
        batch_size, steps: local steps of a round; with `epochs`, passes over the client's data.
        learning_rate, momentum: of the local SGD.
        aggregate: [K, D] -> [D], of the updates.
        attack: rewrites the stack in place; None for nothing.
        pgd: the fields of our `adversarial` client; None for ordinary training.
        mean, std: normalisation at the network's entry.
        device: where all of it lies.
    """

    def __init__(
        self,
        model,
        x,
        y,
        parts,
        *,
        batch_size,
        steps=None,
        epochs=None,
        learning_rate=0.1,
        momentum=0.0,
        aggregate: Callable,
        attack: Callable | None = None,
        pgd=None,
        mean=0.0,
        std=1.0,
        device="cpu",
        seed=0,
    ):
        self.device = torch.device(device)
        self.model = model.to(self.device).train()
        self.x = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))).to(self.device)
        self.y = torch.from_numpy(y.astype(np.int64)).to(self.device)
        self.parts = [torch.from_numpy(np.asarray(part)).to(self.device) for part in parts]
        self.batch_size, self.steps, self.epochs = batch_size, steps, epochs
        self.learning_rate, self.momentum = learning_rate, momentum
        self.aggregate, self.attack, self.pgd = aggregate, attack, pgd
        self.mean, self.std = mean, std
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.weights = list(self.model.parameters())
        dim = sum(w.numel() for w in self.weights)
        self.stack = torch.zeros(len(parts), dim, device=self.device)
        self.start = [torch.empty_like(w) for w in self.weights]

    def batches(self, part):
        """Indices of the local steps' batches."""
        if self.epochs is None:
            for _ in range(self.steps):
                yield self.shuffled(part)[: self.batch_size]
            return
        for _ in range(self.epochs):
            yield from self.shuffled(part).split(self.batch_size)

    def shuffled(self, part):
        """A client's examples in a new order."""
        return part[torch.randperm(len(part), generator=self.generator, device=self.device)]

    def loss(self, x, y):
        """Mean cross-entropy for inputs in pixel units."""
        return functional.cross_entropy(self.model((x - self.mean) / self.std), y)

    def adversarial(self, x, y):
        """The batch with its first examples replaced by PGD's."""
        k = round(self.pgd["fraction"] * len(x))
        clean, labels = x[:k], y[:k]
        low = (clean - self.pgd["eps"]).clamp(min=0)
        high = (clean + self.pgd["eps"]).clamp(max=1)
        moved = clean
        if self.pgd["random_start"]:
            noise = torch.empty_like(clean).uniform_(-1, 1, generator=self.generator)
            moved = torch.clamp(clean + self.pgd["eps"] * noise, low, high)
        for _ in range(self.pgd["pgd_steps"]):
            moved.requires_grad_(True)
            (gradient,) = torch.autograd.grad(self.loss(moved, labels), moved)
            moved = torch.clamp(moved.detach() + self.pgd["step_size"] * gradient.sign(), low, high)
        return torch.cat([moved, x[k:]])

    def local_gradient(self, index):
        x, y = self.x[index].float().div_(255), self.y[index]
        if self.pgd:
            x = self.adversarial(x, y)
        return torch.autograd.grad(self.loss(x, y), self.weights)

    def train_all(self):
        """Every client's update, into the stack."""
        for row, part in zip(self.stack, self.parts, strict=True):
            self.train(row, part)

    def train(self, row, part):
        """One client's update, into a row of the stack."""
        if self.epochs is None and self.steps == 1:  # no weights change before the gradient
            (index,) = self.batches(part)
            gradients = self.local_gradient(index)
            torch.cat([g.flatten() for g in gradients], out=row)
            row.mul_(-self.learning_rate)
            return
        optimizer = torch.optim.SGD(self.weights, self.learning_rate, self.momentum)
        for index in self.batches(part):
            for weight, gradient in zip(self.weights, self.local_gradient(index), strict=True):
                weight.grad = gradient
            optimizer.step()
        with torch.no_grad():
            torch.cat([w.flatten() for w in self.weights], out=row)
            row.sub_(torch.cat([w.flatten() for w in self.start]))
            for weight, start in zip(self.weights, self.start, strict=True):
                weight.copy_(start)

    def round(self) -> None:
        """Every client trains, the adversary acts, the server aggregates and steps."""
        with torch.no_grad():
            for start, weight in zip(self.start, self.weights, strict=True):
                start.copy_(weight)
        self.train_all()
        with torch.no_grad():
            if self.attack is not None:
                self.attack(self.stack)
            step = self.aggregate(self.stack)
            at = 0
            for weight in self.weights:
                weight += step[at : at + weight.numel()].view_as(weight)
                at += weight.numel()
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Vectorised(Simulator):
    """The same rounds with all clients side by side, by `torch.func.vmap`; as many steps for each.

    Every client has weights [K, ...] of its own, and one call gives the gradients of all.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.names = [name for name, _ in self.model.named_parameters()]
        options = {"randomness": "different"}  # dropout
        self.gradients = torch.func.vmap(torch.func.grad(self.loss_of), **options)
        inputs = torch.func.grad(lambda x, weights, y: self.loss_of(weights, x, y))
        self.input_gradients = torch.func.vmap(inputs, **options)

    def loss_of(self, weights, x, y):
        """One client's loss at its weights."""
        scaled = (x - self.mean) / self.std
        logits = torch.func.functional_call(
            self.model, dict(zip(self.names, weights, strict=True)), (scaled,)
        )
        return functional.cross_entropy(logits, y)

    def attacked(self, weights, x, y):
        """`adversarial` for all clients, [K, B, ...]."""
        k = round(self.pgd["fraction"] * x.shape[1])
        clean, labels, eps = x[:, :k], y[:, :k], self.pgd["eps"]
        low, high = (clean - eps).clamp(min=0), (clean + eps).clamp(max=1)
        moved = clean
        if self.pgd["random_start"]:
            noise = torch.empty_like(clean).uniform_(-1, 1, generator=self.generator)
            moved = torch.clamp(clean + eps * noise, low, high)
        for _ in range(self.pgd["pgd_steps"]):
            gradient = self.input_gradients(moved, weights, labels)
            moved = torch.clamp(moved + self.pgd["step_size"] * gradient.sign(), low, high)
        return torch.cat([moved, x[:, k:]], 1)

    def train_all(self):
        """Every client's update, into the stack."""
        count = len(self.parts)
        weights = [w.detach().expand(count, *w.shape).clone() for w in self.weights]
        buffers = [torch.zeros_like(w) for w in weights]
        for indices in zip(*(self.batches(part) for part in self.parts), strict=True):
            index = torch.stack(indices)
            x, y = self.x[index].float().div_(255), self.y[index]
            if self.pgd:
                x = self.attacked(weights, x, y)
            gradients = list(self.gradients(weights, x, y))
            if self.momentum:
                torch._foreach_mul_(buffers, self.momentum)
                torch._foreach_add_(buffers, gradients)
                gradients = buffers
            torch._foreach_add_(weights, gradients, alpha=-self.learning_rate)
        torch._foreach_sub_(
            weights, [s.expand_as(w) for s, w in zip(self.start, weights, strict=True)]
        )
        torch.cat([w.flatten(1) for w in weights], dim=1, out=self.stack)


def alie(num_malicious: int, z: float) -> Callable:
    """A Little Is Enough on the first rows: z std off the malicious updates' mean, as ours."""

    def attack(stack):
        rows = stack[:num_malicious]
        stack[:num_malicious] = rows.mean(0) + z * rows.std(0, correction=0)

    return attack

"""Shared parts of test files: trace counting, small experiments, a perceptron in float64."""

import functools

import numpy as np

from fedjax_sec.core import registry
from fedjax_sec.testing import (
    CLASSES,
    HIDDEN,
    MEAN,
    SHAPE,
    STD,
    close,
    materials,
    same_bits,
    sample,
    tiny_pool,
    tiny_task,
)

__all__ = [
    "CLASSES",
    "CLIENT_OF_TWENTY",
    "HIDDEN",
    "MEAN",
    "SHAPE",
    "STD",
    "NumpyMlp",
    "close",
    "count_traces",
    "same_bits",
    "sample",
    "shallow",
    "small",
    "tiny_mlp",
    "tiny_pool",
    "tiny_task",
]


def count_traces(fn):
    """`fn` and a list that grows by one entry whenever JAX traces it."""
    traces = []

    @functools.wraps(fn)
    def counted(*args, **kwargs):
        traces.append(None)
        return fn(*args, **kwargs)

    return counted, traces


def shallow(name, **fields):
    """A registered network, of the least depth if it has one: deep ones compile for minutes."""
    return materials.shallow(registry.models.build({"name": name} | fields))


def small(**changes):
    """A quick experiment on the digits: 5 clients with 9 or 8 examples, a perceptron 64-6-10.

    `changes` are top-level keys; `data` and `threat` are merged with what is there.
    """
    base = {
        "data": {"num_clients": 5, "max_train": 43},
        "model": {"name": "mlp", "hidden": [6]},
        "client": {
            "name": "sgd",
            "steps": 1,
            "batch_size": 9,
            "optimizer": {"name": "sgd", "learning_rate": 0.2},
        },
        "evaluation": {"every": 1},
        "rounds": 3,
    }
    for key, value in changes.items():
        base[key] = base[key] | value if key in ("data", "evaluation") else value
    return base


#: Local training where `small` has 20 clients, with two or three examples each.
CLIENT_OF_TWENTY = {
    "name": "sgd",
    "steps": 1,
    "batch_size": 2,
    "optimizer": {"name": "sgd", "learning_rate": 0.2},
}


class NumpyMlp:
    """A perceptron with one hidden ReLU layer on flat parameters, in float64 and by hand."""

    def __init__(self, inputs, hidden, classes, mean, std):
        self.shapes = [(hidden,), (inputs, hidden), (classes,), (hidden, classes)]
        self.mean, self.std = mean, std

    def tensors(self, flat):
        """bias, kernel of the hidden layer; bias, kernel of the output: flax's own order."""
        sizes = [int(np.prod(shape)) for shape in self.shapes]
        parts = np.split(np.asarray(flat, np.float64), np.cumsum(sizes)[:-1])
        return [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def forward(self, flat, x):
        b1, w1, b2, w2 = self.tensors(flat)
        x = (np.asarray(x, np.float64).reshape(len(x), -1) - self.mean) / self.std
        hidden = np.maximum(x @ w1 + b1, 0.0)
        return x, hidden, hidden @ w2 + b2

    def accuracy(self, flat, x, y):
        return float(np.mean(self.forward(flat, x)[2].argmax(1) == y))

    def loss_and_gradient(self, flat, x, y):
        """Mean cross-entropy and its gradient [D], by hand-written backpropagation."""
        _, _, _, w2 = self.tensors(flat)
        x, hidden, logits = self.forward(flat, x)
        logits = logits - logits.max(1, keepdims=True)
        log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        picked = log_probs[np.arange(len(y)), y]
        slope = (np.exp(log_probs) - np.eye(log_probs.shape[1])[y]) / len(y)
        back = (slope @ w2.T) * (hidden > 0)
        parts = [back.sum(0), x.T @ back, slope.sum(0), hidden.T @ slope]
        return -picked.mean(), np.concatenate([part.ravel() for part in parts])

    def gradient(self, flat, x, y):
        return self.loss_and_gradient(flat, x, y)[1]


def tiny_mlp():
    """The NumPy twin of `tiny_task`."""
    return NumpyMlp(int(np.prod(SHAPE)), HIDDEN, CLASSES, MEAN, STD)

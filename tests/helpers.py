"""What several test files share: trace counting, a tiny task, and its NumPy twin in float64."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sec.core import registry
from fedjax_sec.core.space import make_space
from fedjax_sec.core.types import InputSpec
from fedjax_sec.ops.client_axis import Layout
from fedjax_sec.round import Pool, Problem, make_task

SHAPE, CLASSES, HIDDEN = (4, 4, 1), 3, 5
MEAN, STD = 0.4, 0.5


def count_traces(fn):
    """`fn` and a list that grows by one entry whenever JAX traces it."""
    traces = []

    @functools.wraps(fn)
    def counted(*args, **kwargs):
        traces.append(None)
        return fn(*args, **kwargs)

    return counted, traces


def close(actual, expected, rtol=1e-5, atol=1e-6):
    """Asserts that two pytrees of arrays agree in structure and value."""
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=atol)


def same_bits(actual, expected):
    """Asserts that two pytrees of arrays are equal to the last bit (NaN equals NaN)."""
    chex.assert_trees_all_equal(actual, expected)


@functools.cache
def tiny_pool(count=40):
    """`count` random images as stored (0 to 255) and their labels."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (count, *SHAPE), np.uint8)
    with jax.ensure_compile_time_eval():  # the first call may come from within a trace
        return Pool(jnp.asarray(x), jnp.asarray(rng.integers(0, CLASSES, count).astype(np.int32)))


@functools.cache
def tiny_task():
    """A perceptron 16-5-3 on `tiny_pool`, made as an experiment makes its task."""
    model = registry.models.build({"name": "mlp", "hidden": [HIDDEN]}).make(SHAPE, CLASSES)
    problem = Problem(
        model=model,
        space=make_space(model),
        inputs=InputSpec("pixels", SHAPE, 255.0, (MEAN,), (STD,)),
        num_classes=CLASSES,
        num_clients=4,
        clients_per_round=4,
        omniscient=False,
        layout=Layout(4),
    )
    return make_task(problem, tiny_pool(), registry.tasks.build("classification"))


def shallow(name, **fields):
    """A registered network, of the least depth if it has one: deep ones compile for minutes."""
    built = registry.models.build({"name": name} | fields)
    depth = {f.name: f.metadata["low"] for f in dataclasses.fields(built) if f.name == "depth"}
    return dataclasses.replace(built, **depth)


def sample(key, num):
    """Draws images and labels from `tiny_pool`, as `AttackerView.sample` does."""
    pool = tiny_pool()
    rows = jax.random.randint(key, (num,), 0, pool.y.shape[0])
    return pool.x[rows].astype(jnp.float32) / 255.0, pool.y[rows]


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

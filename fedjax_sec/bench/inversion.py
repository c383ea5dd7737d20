"""Reconstructions by inverting gradients: many messages in one program, beside PyTorch."""

import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sec.bench import peers
from fedjax_sec.bench.timing import Case, Rates, take_turns
from fedjax_sec.core import Known, Message, registry
from fedjax_sec.core.types import InputSpec
from fedjax_sec.runs.reconstruct import task_of

MESSAGES, ITERATIONS, SHAPE, CLASSES = (1, 8, 64), 200, (28, 28, 1), 10
NETWORKS = ("mlp", "fltrust_cnn")
ATTACK = {"name": "inverting_gradients", "iterations": ITERATIONS, "labels": "known"}


def run(
    rates: Rates, only: Sequence[str] = (), repeats: int = 3, with_peers: bool = True
) -> Iterator[dict]:
    """One row a network and number of messages, each of one image and 200 steps of Adam."""
    for name in NETWORKS:
        if only and name not in only:
            continue
        for count in MESSAGES:
            yield _row(name, count, repeats, with_peers)


def _row(name: str, count: int, repeats: int, with_peers: bool) -> dict:
    inputs = InputSpec("pixels", SHAPE, 1.0, (0.0,), (1.0,))
    network = registry.models.build(name).make(SHAPE, CLASSES)
    task = task_of(network, inputs, CLASSES)
    variables = network.init(jax.random.key(0))
    params = task.space.split(variables)[0]
    attack = registry.privacy_attacks.build(ATTACK)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(size=(count, 1, *SHAPE)), jnp.float32)
    y = jnp.asarray(rng.integers(0, CLASSES, (count, 1)))
    known = Known(1.0, 1, 1, CLASSES, 1, None, 0.0)

    def gradient(x, y):
        def loss(weights):
            outputs = task.outputs(weights, x, train=False, mask=jnp.ones(1, bool))
            return -jax.nn.log_softmax(outputs)[0, y[0]]

        return jax.grad(loss)(params)

    slopes = jax.jit(jax.vmap(gradient))(x, y)

    def one(key, slope, labels):
        message = Message(-slope, jnp.float32(1))
        return attack.reconstruct(key, message, params, task, known._replace(labels=labels)).x

    args = jax.random.split(jax.random.key(1), count), slopes, y
    begin = time.perf_counter()
    function = jax.jit(jax.vmap(one)).lower(*args).compile()
    compiling = time.perf_counter() - begin
    cases = [Case("ours", lambda: function(*args).block_until_ready())]
    if with_peers and "torch" not in peers.missing():
        cases.append(Case("PyTorch", _torch_case(name, variables, x, y)))
    timings = take_turns(cases, repeats)
    ours = timings["ours"].median
    row = {
        "network": name,
        "messages": count,
        "iterations": ITERATIONS,
        "ours s": ours,
        "ours a minute": 60 * count / ours,
        "compile s": compiling,
    }
    if "PyTorch" in timings:
        theirs = timings["PyTorch"].median
        row |= {"PyTorch a minute": 60 * count / theirs, "faster than PyTorch": theirs / ours}
    return row


def _torch_case(name, variables, x, y):
    import torch

    from fedjax_sec.bench import torch_inversion, torch_loop

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    model = torch_loop.network(name)
    torch_loop.load_parameters(model, variables)
    model = model.to(device).eval()
    images = torch.from_numpy(np.asarray(x).transpose(0, 1, 4, 2, 3).copy()).to(device)
    labels = torch.from_numpy(np.asarray(y).astype(np.int64)).to(device)
    loss = torch.nn.functional.cross_entropy
    zero, one = (torch.full((1, 1, 1, 1), float(v), device=device) for v in (0, 1))
    weights = list(model.parameters())
    gradients = [
        torch.autograd.grad(loss(model(image), label), weights)
        for image, label in zip(images, labels, strict=True)
    ]
    start = torch.randn(1, 1, *SHAPE[:2], device=device)

    def call():
        for gradient, label in zip(gradients, labels, strict=True):
            torch_inversion.invert(model, gradient, label, start, ITERATIONS, zero, one, 1e-4)
        if device == "cuda":
            torch.cuda.synchronize()

    return call

"""The contract of clients, algorithms and tasks."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sec.core import LARGEST, NO_HOOKS, Hooks, Message, ServerView
from fedjax_sec.testing.compare import (
    both_ways,
    close,
    differs,
    expect,
    finite,
    same_bits,
    same_form,
)
from fedjax_sec.testing.fields import check_numeric_fields_are_traced
from fedjax_sec.testing.worlds import CLIENTS, complete, make_rounds, run_rounds, world


def train_locally(client, count, seed=0, row=None, state=None, kind="pixels"):
    """A client's training on `count` examples of a tiny world, from its parameters."""
    place = world(kind)
    state = client.init(place.task.dim) if state is None else state
    data = place.local_data(count, row)
    return client.apply(jax.random.key(seed), place.params(), state, data, place.task)


def _leaves(trained):
    """Of what training returns, what is an array whatever the hooks ask for."""
    return trained.delta, trained.state, trained.steps, trained.metrics


def check_client_shapes(client, kind: str) -> None:
    """A finite update [D], a state that keeps its form, the steps taken and `train_loss`."""
    dim = world(kind).task.dim
    delta, state, steps, metrics = both_ways(
        lambda n: _leaves(train_locally(client, n, kind=kind)), 7
    )
    expect(delta.shape == (dim,) and delta.dtype == jnp.float32, f"the update is {delta.shape}")
    finite(delta, "the update")
    expect(np.abs(delta).max() > 0, "the client learns nothing")
    same_form(client.init(dim), state, "the state")
    expect(jnp.shape(steps) == () and steps > 0, "`steps` says that none was taken")
    expect("train_loss" in metrics, "the metrics have no `train_loss`")
    expect(metrics["train_loss"].shape == (), "`train_loss` is no scalar")
    finite(metrics["train_loss"], "`train_loss`")


def check_client_ignores_padding(client, kind: str) -> None:
    """Padding behind a client's examples never matters; without examples there is no update."""
    run = jax.jit(lambda n, row: train_locally(client, n, row=row, kind=kind).delta)
    row = np.arange(9)
    other = np.where(row < 5, row, 30)
    same_bits(run(5, row), run(5, other))
    expect(differs(run(9, row), run(9, other)), "the client ignores its own examples")
    same_bits(run(0, row), np.zeros(world(kind).task.dim, np.float32))


def check_client_over_clients(client, kind: str) -> None:
    """vmap over clients equals a loop over them."""
    counts, seeds = jnp.array([3, 9, 6]), jnp.arange(3)
    one = lambda n, s: train_locally(client, n, s, kind=kind).delta  # noqa: E731
    run, mapped = jax.jit(one), jax.jit(jax.vmap(one))(counts, seeds)
    looped = jnp.stack([run(n, s) for n, s in zip(counts, seeds, strict=True)])
    close(mapped, looped, rtol=1e-4)


def check_client_hooks(client, kind: str) -> None:
    """Hooks are called where they say: of an algorithm, or of a defence in local training."""
    place = world(kind)

    def run(hooks):
        state, data = client.init(place.task.dim), place.local_data(7)
        key, params = jax.random.key(0), place.params()
        train = lambda: client.apply(key, params, state, data, place.task, hooks)  # noqa: E731
        return jax.jit(lambda: train().delta[place.task.space.trained])()

    stays = Hooks(after_step=lambda key, delta, gradient, memory: (0.0 * delta, memory))
    stayed = run(stays)
    same_bits(stayed, jnp.zeros_like(stayed))
    kept = run(Hooks(send=lambda key, delta: 0.0 * delta))
    same_bits(kept, jnp.zeros_like(kept))
    turned = Hooks(correct=lambda gradient, delta: -gradient)
    expect(differs(run(turned), run(NO_HOOKS)), "the client does not call `hooks.correct`")


def check_client_fields(client, kind: str) -> None:
    """Numeric fields are traced."""
    check_numeric_fields_are_traced(client, lambda one: train_locally(one, 7, kind=kind).delta)


CLIENT_CHECKS = (
    check_client_shapes,
    check_client_ignores_padding,
    check_client_over_clients,
    check_client_hooks,
    check_client_fields,
)


# --- Algorithms ---------------------------------------------------------------------------------


def _begun(algorithm, place):
    """(the complete algorithm, the server's state, one client's) before round 0."""
    algorithm = complete(algorithm)
    params = place.params()
    server = algorithm.init(jax.random.key(4), params, place.setting, place.task)
    return algorithm, server, algorithm.init_client(params, place.setting, place.task)


def _train(algorithm, server, client, place, count=7, **options):
    download = algorithm.download(server, jnp.int32(0))
    data = place.local_data(count)
    return algorithm.train(jax.random.key(6), download, client, data, place.task, **options)


def _stacked(message: Message) -> Message:
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (CLIENTS, *jnp.shape(leaf))), message)


def _view(place, params) -> ServerView:
    return ServerView(
        params=params,
        weights=jnp.ones(CLIENTS),
        client_ids=jnp.arange(CLIENTS),
        valid=jnp.ones(CLIENTS, bool),
        round=jnp.int32(0),
        members=jnp.eye(CLIENTS),
    )


def check_algorithm_message(algorithm, kind: str) -> None:
    """One client's message: a vector, a scalar weight, in the shapes that `message` says.

    What the client keeps has the form that `init_client` gives; `train_loss` is there.
    """
    place = world(kind)
    algorithm, server, client = _begun(algorithm, place)
    sent, kept, metrics = both_ways(lambda s, c: _train(algorithm, s, c, place), server, client)
    expect(isinstance(sent, Message), f"train returns {type(sent).__name__}, not a Message")
    expect(sent.vector.ndim == 1, f"the message's vector has shape {sent.vector.shape}")
    expect(jnp.shape(sent.weight) == (), "the message's weight is no scalar")
    finite(sent, "the message")
    if (told := algorithm.message(place.setting, place.task)) is not None:
        same_form(told, sent, "the message, against what `message` says,")
    same_form(client, kept, "what a client keeps")
    expect(jnp.shape(metrics.get("train_loss", (0, 0))) == (), "`train_loss` is no scalar metric")


def check_algorithm_params(algorithm, kind: str) -> None:
    """`params` are those it was given, of length D, and so are one client's own.

    A client reads the global parameters from its download.
    """
    place = world(kind)
    algorithm, server, client = _begun(algorithm, place)
    same_bits(algorithm.params(server), place.params())
    same_bits(algorithm.received(algorithm.download(server, jnp.int32(0))), place.params())
    personal = algorithm.personal(server, client, place.task)
    expect(
        personal.shape == (place.task.dim,),
        f"a client's own parameters have shape {personal.shape}",
    )


def check_algorithm_rounds(algorithm, kind: str) -> None:
    """Over two rounds the state keeps its form, and parameters move and stay finite."""
    rounds = make_rounds(world(kind), algorithm)
    state, metrics = run_rounds(rounds)
    same_form(rounds.state, state, "the round's state")
    finite((state.server, state.client), "the state after two rounds")
    finite(metrics, "a metric of a sound round")
    params = complete(algorithm).params
    expect(differs(params(state.server), params(rounds.state.server)), "nothing is learned")


def check_algorithm_zeros(algorithm, kind: str) -> None:
    """Where all clients send zeros, a server with plain SGD keeps the parameters."""
    place = world(kind)
    algorithm, server, client = _begun(algorithm, place)
    if algorithm.sends != "update":
        return
    shapes = jax.eval_shape(lambda: _train(algorithm, server, client, place)[0])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def step(server):
        view = _view(place, algorithm.params(server))
        messages = _stacked(zeros)
        return algorithm.step(jax.random.key(8), server, zeros.vector, messages, view, place.task)

    new, _ = both_ways(step, server)
    same_form(server, new, "the server's state")
    same_bits(algorithm.params(new), algorithm.params(server))


def check_algorithm_leaves_out(algorithm, kind: str) -> None:
    """A vector that is not finite, of a row that the defence left out, does not reach the server.

    Weight and extra of such rows are zero when `step` gets them, but not the vector.
    """
    place = world(kind)
    algorithm, server, client = _begun(algorithm, place)
    sent = _stacked(_train(algorithm, server, client, place)[0])
    bad = jnp.arange(CLIENTS) == 1
    blank = lambda leaf: jnp.where(bad.reshape(-1, *[1] * (leaf.ndim - 1)), 0, leaf)  # noqa: E731
    vector = jnp.where(bad[:, None], jnp.nan, sent.vector)
    messages = Message(vector, blank(sent.weight), jax.tree.map(blank, sent.extra))
    view = _view(place, algorithm.params(server))._replace(valid=~bad)
    aggregate = sent.vector[0]
    new, metrics = algorithm.step(jax.random.key(8), server, aggregate, messages, view, place.task)
    finite((algorithm.params(new), metrics), "the server beside a row that is left out")


def check_algorithm_hooks(algorithm, kind: str) -> None:
    """Hooks of a defence in local training reach it, where `train` takes them."""
    if "hooks" not in inspect.signature(algorithm.train).parameters:
        return
    place = world(kind)
    algorithm, server, client = _begun(algorithm, place)
    stays = Hooks(after_step=lambda key, delta, gradient, memory: (0.0 * delta, memory))
    messages = [_train(algorithm, server, client, place, hooks=h)[0] for h in (NO_HOOKS, stays)]
    same_form(*messages, "the message under a defence in local training")
    expect(differs(*(one.vector for one in messages)), "`train` drops the hooks that it is given")


def check_algorithm_fields(algorithm, kind: str) -> None:
    """Numeric fields are traced."""
    place = world(kind)

    def two_rounds(one):
        one, server, client = _begun(one, place)
        sent, _, _ = _train(one, server, client, place)
        view = _view(place, one.params(server))
        new, _ = one.step(jax.random.key(8), server, sent.vector, _stacked(sent), view, place.task)
        return sent.vector, one.params(new)

    check_numeric_fields_are_traced(algorithm, two_rounds)


ALGORITHM_CHECKS = (
    check_algorithm_message,
    check_algorithm_params,
    check_algorithm_rounds,
    check_algorithm_zeros,
    check_algorithm_leaves_out,
    check_algorithm_hooks,
    check_algorithm_fields,
)


# --- Tasks --------------------------------------------------------------------------------------


def _outputs_and_targets(task, kind: str):
    """Outputs of a tiny world's network and targets as the task takes them: classes where it says
    that examples have one, else the next tokens."""
    place = world(kind)
    x, y = place.sample(jax.random.key(3), 9)
    outputs = place.task.outputs(place.params(1.0), x)
    if kind == "tokens" and task.labels_of(y[:, 0]) is not None:
        return outputs.mean(axis=1), jnp.maximum(y[:, 0], 0)
    return outputs, y


def check_task_losses(task, kind: str) -> None:
    """A total and a number of units for each example, both finite; units are not negative.

    A target that is met has a smaller loss than one that is missed, on the average.
    """
    outputs, y = _outputs_and_targets(task, kind)
    total, units = both_ways(task.losses, outputs, y)
    for name, value in (("total", total), ("units", units)):
        expect(value.shape == (9,), f"{name} has shape {value.shape}, not [B]")
        finite(value, name)
    expect((units >= 0).all() and units.sum() > 0, "units count nothing, or less")
    slope = jax.grad(lambda out: task.losses(out, y)[0].sum())(outputs)
    finite(slope, "the gradient of the loss")
    expect(jnp.abs(slope).max() > 0, "the loss does not depend on the outputs")


def check_task_sums(task, kind: str) -> None:
    """Finite numerators and denominators; the mask is respected, and batches add up.

    The headline is among the metrics, and `loss`, where it is one, is the loss of the training.
    """
    outputs, y = _outputs_and_targets(task, kind)
    everything = jnp.ones(9, bool)
    sums = both_ways(task.sums, outputs, y, everything)
    expect(task.headline in sums, f"the headline {task.headline!r} is not among {sorted(sums)}")
    finite(sums, "a sum")
    some = jnp.arange(9) < 6
    spoilt = jnp.where(some.reshape(-1, *[1] * (outputs.ndim - 1)), outputs, 100.0 - outputs)
    first = task.sums(spoilt, y, some)
    close(first, task.sums(outputs[:6], y[:6], jnp.ones(6, bool)), rtol=1e-4)
    rest = task.sums(outputs, y, ~some)
    close(jax.tree.map(jnp.add, first, rest), sums, rtol=1e-4)
    if "loss" in sums:
        total, units = task.losses(outputs, y)
        top, bottom = sums["loss"]
        close(top / bottom, total.sum() / units.sum(), rtol=1e-4)
    for name, (top, bottom) in sums.items():
        expect(jnp.shape(top) == jnp.shape(bottom), f"{name}: numerator and denominator differ")
        expect(jnp.all(jnp.abs(bottom) < LARGEST), f"{name}: the denominator overflows")


def check_task_answers(task, kind: str) -> None:
    """`right` says of every target whether it is met; `labels_of` gives a label an example."""
    outputs, y = _outputs_and_targets(task, kind)
    right = both_ways(task.right, outputs, y)
    expect(right.shape == y.shape and right.dtype == bool, "`right` is no mask of the targets")
    expect(differs(right, task.right(-outputs, y)), "`right` does not depend on the outputs")
    if (labels := task.labels_of(y)) is not None:
        expect(jnp.shape(labels)[0] == y.shape[0], "`labels_of` gives another number of labels")


TASK_CHECKS = (check_task_losses, check_task_sums, check_task_answers)

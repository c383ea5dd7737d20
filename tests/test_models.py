"""The networks' behaviour beyond their number of parameters, which their doctests count."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from programs import averaging, classification, problem_of

from fedjax_sec.core import registry
from fedjax_sec.core.types import Model
from fedjax_sec.evaluation.metrics import task_metrics
from fedjax_sec.ops.client_axis import Layout, map_clients
from fedjax_sec.round import (
    Components,
    Pool,
    Population,
    Replica,
    make_task,
    train_clients,
)
from fedjax_sec.round.pipeline import Attack, Defense


def test_rlr_cnn_drops_half_of_its_activations_in_training_only():
    model = registry.models.build("rlr_cnn").make((8, 8, 1), 10)
    variables = jax.jit(model.init)(jax.random.key(0))
    x = jax.random.uniform(jax.random.key(1), (3, 8, 8, 1))
    plain = model.apply(variables, x)
    np.testing.assert_array_equal(plain, model.apply(variables, x, key=jax.random.key(2)))
    train = jax.jit(jax.vmap(lambda key: model.apply(variables, x, train=True, key=key)))
    dropped = train(jax.random.split(jax.random.key(3), 400))
    assert np.ptp(np.asarray(dropped), axis=0).min() > 1e-3  # another mask for every key
    # Kept activations are doubled, and the last layer is linear in those of its own dropout.
    np.testing.assert_allclose(dropped.mean(axis=0), plain, atol=0.05)


# Dropout layers of each network, and the smallest image that leaves something to flatten.
DROPOUTS = {"rlr_cnn": (2, 6), "rlr_cifar10": (3, 22)}
#: Widths that are quick without optimisation.
NARROW = {"rlr_cnn": {}, "rlr_cifar10": {"channels": [8, 16, 16], "hidden": [16, 16]}}


def one_path_a_logit(variables):
    """The network with logit j fed by one unit of each dense layer only, all of them positive."""

    def chain(path, leaf):
        layer, kind = path[-2].key, path[-1].key
        if layer.startswith("conv"):
            return jnp.zeros_like(leaf) if kind == "kernel" else jnp.ones_like(leaf)
        return jnp.eye(*leaf.shape) if kind == "kernel" else jnp.zeros_like(leaf)

    return jax.tree_util.tree_map_with_path(chain, variables)


@pytest.mark.slow
@pytest.mark.parametrize("name", DROPOUTS)
def test_every_dropout_layer_acts(name):
    layers, side = DROPOUTS[name]
    model = registry.models.build(name).make((side, side, 1), 10)
    variables = one_path_a_logit(model.init(jax.random.key(0)))
    x = jnp.zeros((200, side, side, 1))
    np.testing.assert_array_equal(model.apply(variables, x), 1.0)
    dropped = model.apply(variables, x, train=True, key=jax.random.key(1))
    # A path survives all masks or none: without one of the layers it survives twice as often.
    assert np.unique(dropped).tolist() == [0.0, 2.0**layers]
    share = np.mean(dropped > 0)
    assert abs(share - 0.5**layers) < 4 * np.sqrt(0.5**layers / dropped.size)


def updates_of_two_equal_clients(name, dropout, steps):
    """Two clients that hold the same examples, all in every batch, take steps too small to move."""
    side = DROPOUTS[name][1]
    spec = {"name": name, "dropout": dropout} | NARROW[name]
    model = registry.models.build(spec).make((side, side, 1), 10)
    x = np.random.default_rng(0).integers(0, 256, (4, side, side, 1), np.uint8)
    pool = Pool(jnp.asarray(np.concatenate([x, x])), jnp.arange(8) % 4)
    problem = problem_of(model, x.shape[1:], 10, 255.0, (0.5,), (0.5,), 2, 2, False, Layout(2))
    client = registry.clients.build(
        {
            "name": "sgd",
            "steps": steps,
            "batch_size": 4,
            "optimizer": {"name": "sgd", "learning_rate": 1e-4},
        }
    )
    population = Population(jnp.arange(8).reshape(2, 4), jnp.array([4, 4]), jnp.zeros(2, bool))
    replica = Replica(
        jax.random.key(0),
        Components(averaging(client), Attack(()), Defense.build("mean"), None),
        population,
    )
    task = make_task(problem, pool, classification())

    @jax.jit
    def train():
        params = jax.flatten_util.ravel_pytree(model.init(jax.random.key(1)))[0]
        ids = jnp.arange(2)
        server = replica.components.algorithm.start(params)
        message, _, _ = train_clients(
            problem, task, pool, replica, server, (), (), ids, jnp.int32(0)
        )
        return message.vector

    return np.asarray(train())


@pytest.mark.slow
@pytest.mark.parametrize("name", DROPOUTS)
def test_masks_differ_between_clients_and_between_steps(name):
    def differences(dropout):
        one, two = (updates_of_two_equal_clients(name, dropout, steps) for steps in (1, 2))
        size = np.linalg.norm(one[0])
        between_clients = np.linalg.norm(one[0] - one[1]) / size
        between_steps = np.linalg.norm(two[0] - 2 * one[0]) / size
        return between_clients, between_steps

    assert max(differences(0.0)) < 0.01
    assert min(differences(0.5)) > 0.1


@pytest.mark.parametrize(
    "name, side", [("fltrust_cnn", 9), ("rlr_cnn", 5), ("rlr_cifar10", 21), ("madry_cnn", 3)]
)
def test_images_that_the_poolings_reduce_to_nothing_are_refused(name, side):
    model = registry.models.build(name)
    with pytest.raises(ValueError, match=f"{name} needs images of at least"):
        model.make((side, side, 1), 10)
    small = model.make((side + 1, side + 1, 1), 10)
    x = jnp.zeros((2, side + 1, side + 1, 1))
    variables = jax.eval_shape(small.init, jax.random.key(0))
    assert jax.eval_shape(small.apply, variables, x).shape == (2, 10)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads what XLA makes for a CPU")
def test_no_sum_over_the_batch_is_inside_the_write_of_a_clients_row():
    """It would be worked out for each of the row's numbers (docs/performance.md)."""
    model = registry.models.build({"name": "fltrust_cnn", "convolution": "patches"})
    model = model.make((28, 28, 1), 10)
    flat, unravel = ravel_pytree(model.init(jax.random.key(0)))

    def update(x):
        return -jax.grad(lambda w: jnp.sum(model.apply(unravel(w), x) ** 2))(flat)

    clients = jnp.zeros((3, 32, 28, 28, 1))
    program = jax.jit(lambda xs: map_clients(update, Layout(at_once=1), xs)).lower(clients)
    parts = re.split(r"\n(?=%|ENTRY)", program.compile().as_text())
    writes = [
        part
        for part in parts
        if re.search(rf"ROOT.* = f32\[3,{flat.size}\].* dynamic-update-slice\(", part)
    ]
    assert len(writes) == 1 and " concatenate(" in writes[0]
    assert " reduce(" not in writes[0]


def sequence_task(examples, steps, classes):
    """Labels [B, T]: a linear model of every time step by itself."""

    def init(key):
        return {"w": jax.random.normal(key, (2, classes))}

    def apply(variables, x, *, train=False, key=None):
        return x @ variables["w"]

    problem = problem_of(
        Model(init, apply), (steps, 2), classes, 1.0, (0.0, 0.0), (1.0, 1.0), 1, 1, False, Layout(1)
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(examples, steps, 2)).astype(np.float32)
    y = rng.integers(0, classes, (examples, steps)).astype(np.int32)
    return make_task(problem, Pool(jnp.asarray(x), jnp.asarray(y)), classification()), x, y


@pytest.mark.parametrize("steps", [3, 4])
def test_the_mask_is_of_examples_however_many_labels_each_has(steps):
    """With as many time steps as examples the mask must not be taken for one of time steps."""
    task, x, y = sequence_task(4, steps, 3)
    params = jax.random.normal(jax.random.key(1), (task.dim,))
    mask = np.array([True, False, True, True])
    logits = x[mask] @ np.asarray(task.unravel(params)["w"])
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_probs, y[mask][..., None], axis=-1).mean()
    np.testing.assert_allclose(
        task.loss(params, x, jnp.asarray(y), jnp.asarray(mask)), expected, rtol=1e-5
    )
    metrics = task_metrics(params, jnp.asarray(x), jnp.asarray(y), task, 3)
    predicted = (x @ np.asarray(task.unravel(params)["w"])).argmax(-1)
    np.testing.assert_allclose(metrics["accuracy"], (predicted == y).mean(), rtol=1e-6)
    shares = [(predicted == y)[y == label].mean() for label in range(3)]
    np.testing.assert_allclose(metrics["per_class_accuracy"], shares, rtol=1e-6)

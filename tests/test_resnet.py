"""ResNet: whose statistics normalise what, and what leaves a client."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import close, count_traces, small
from programs import classification, observed, problem_of

import fedjax_sec
from fedjax_sec.core import registry
from fedjax_sec.core.types import LocalData
from fedjax_sec.evaluation.batches import in_batches
from fedjax_sec.models._residual import Normalization, Order, normalized
from fedjax_sec.ops.client_axis import Layout
from fedjax_sec.round import Pool, make_task

SHAPE = (8, 8, 3)
SMALL = (4, 4, 1)
#: Sizes that compile quickly.
QUICK = {"name": "resnet", "depth": 8, "convolution": "xla"}
KINDS = {
    "aggregated": {"statistics": "aggregated"},
    "local": {"statistics": "local"},
    "group": {"norm": "group"},
}


def build(kind, shape=SHAPE):
    model = registry.models.build(QUICK | KINDS[kind]).make(shape, 4)
    return model, jax.jit(model.init)(jax.random.key(0))


def images(count, shape=SHAPE, seed=1):
    return jax.random.uniform(jax.random.key(seed), (count, *shape))


def options(model, mask):
    return {"mask": mask} if model.pools_batch else {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_change_the_others_in_training(kind):
    model, variables = build(kind)
    x = images(5)
    padded = jnp.concatenate([x, 9 * images(3, seed=2)])
    mask = jnp.arange(8) < 5
    outcome = model.apply(variables, padded, train=True, **options(model, mask))[:5]
    np.testing.assert_allclose(outcome, model.apply(variables, x, train=True), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "train", "alone"),
    [
        ("aggregated", False, True),
        ("aggregated", True, False),
        ("local", False, False),
        ("group", False, True),
        ("group", True, True),
    ],
)
def test_what_an_example_is_normalised_with(kind, train, alone):
    """`alone`: an example's logits do not depend on the others in its batch."""
    model, variables = build(kind)
    x, other = images(6), images(6).at[1:].set(images(5, seed=3) ** 3)
    first, second = (model.apply(variables, inputs, train=train)[0] for inputs in (x, other))
    assert (np.abs(first - second).max() < 1e-5) == alone


@pytest.mark.parametrize("order", [Order(False), Order(True)])
def test_batch_norm_is_flaxs(order):
    x = 2 + 3 * jax.random.normal(jax.random.key(0), (6, 5, 4, 3))
    theirs, how = nn.BatchNorm(momentum=0.9, epsilon=1e-5), Normalization("batch", 1, True, 0.9)
    params = {"scale": jnp.array([1.0, 2.0, 3.0]), "bias": jnp.arange(3.0)}
    statistics = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    variables = {"params": params, "batch_stats": statistics}
    outcome, moved = normalized(order.turned(x), params | statistics, how, None, True, order)
    expected, held = theirs.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    np.testing.assert_allclose(order.turned(outcome), expected, rtol=1e-4, atol=1e-4)
    close(moved, dict(held["batch_stats"]), rtol=1e-5, atol=0)
    outcome, _ = normalized(order.turned(x), params | moved, how, None, False, order)
    expected = theirs.apply(variables | held, x, use_running_average=True)
    np.testing.assert_allclose(order.turned(outcome), expected, rtol=1e-4, atol=1e-4)


def task_of(kind, count=12):
    model, variables = build(kind, SMALL)
    x = np.random.default_rng(0).integers(0, 256, (count, *SMALL), np.uint8)
    pool = Pool(jnp.asarray(x), jnp.arange(count) % 4)
    problem = problem_of(model, SMALL, 4, 255.0, (0.5,), (0.5,), 2, 2, False, Layout(2))
    task = make_task(problem, pool, classification())
    return task, jax.flatten_util.ravel_pytree(variables)[0], variables


def client_step(task, params, count=12, batch=8, **client):
    spec = {"name": "sgd", "steps": 1, "batch_size": batch} | client
    local = LocalData(jnp.int32(count), 12, jnp.int32(0), task.example)
    mine = registry.clients.build(spec)
    return lambda params: mine.apply(jax.random.key(3), params, (), local, task)[0]


@pytest.mark.slow
def test_a_client_sends_what_its_batch_did_to_the_statistics():
    task, params, variables = task_of("aggregated")
    assert int(observed(task).sum()) == 2 * (16 + 2 * (16 + 32 + 64))
    x, _ = task.example(jnp.arange(12))
    delta = client_step(task, params, batch=12, l2=0.3)(params)
    # All of the client's examples are in its batch, so their order does not matter.
    seen = task.outputs_and_observed(params, x, jnp.ones(12, bool), None)[1]
    moved = params.at[task.space.observed].set(seen)
    np.testing.assert_allclose(
        delta[observed(task)], (moved - params)[observed(task)], rtol=1e-3, atol=1e-6
    )
    # The first layer's statistics by hand; weight decay (0.3) and the gradient left them alone.
    kernel = variables["params"]["conv_0"]["kernel"]
    first = jax.lax.conv_general_dilated(
        (x - 0.5) / 0.5, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    held = task.unravel(params + delta)["batch_stats"]["norm_0"]
    np.testing.assert_allclose(held["mean"], 0.1 * first.mean((0, 1, 2)), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(held["var"], 0.9 + 0.1 * first.var((0, 1, 2)), rtol=1e-3)
    weights = ~observed(task)
    assert np.abs(delta[weights]).max() > 1e-3
    np.testing.assert_array_equal((moved - params)[weights], 0.0)


@pytest.mark.slow
def test_a_client_without_examples_moves_nothing():
    task, params, _ = task_of("aggregated")
    np.testing.assert_array_equal(client_step(task, params, count=0)(params), 0.0)


def test_observing_costs_no_second_forward_pass():
    def work(kind):
        task, params, _ = task_of(kind)
        step = jax.jit(client_step(task, params)).lower(params).compile()
        return step.cost_analysis()["flops"]

    assert work("aggregated") < 1.05 * work("local")


@pytest.mark.parametrize("kind", ["local", "group"])
def test_other_kinds_keep_no_statistics(kind):
    task, _, variables = task_of(kind)
    assert not observed(task).any()
    assert set(variables) == {"params"}


@pytest.fixture
def optimized():
    """Where a network really trains, what is compiled without optimisation costs more."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns_with_every_kind(kind, optimized):
    client = {
        "name": "sgd",
        "epochs": 3,
        "batch_size": 3,
        "optimizer": {"name": "sgd", "learning_rate": 0.05},
    }
    quick = {"clients": "map"}  # nothing is measured first, which would compile for minutes
    model = QUICK | KINDS[kind]
    experiment = small(model=model, client=client, rounds=4, execution=quick)
    experiment["data"] = experiment["data"] | {"max_test": 20}
    result = fedjax_sec.run(experiment)
    losses = result.metrics["train_loss"][1:]  # the first is from before any training
    assert np.all(np.isfinite(losses))
    assert losses[-1] < 0.7 * losses[0]
    assert np.all(np.isfinite(result.metrics["loss"]))


@pytest.mark.parametrize("count", [3, 4, 8, 9])
def test_evaluation_takes_whole_batches_and_the_rest(count):
    x = jnp.arange(float(count))[:, None]

    def centered(batch):
        return batch - batch.mean()

    outcome, traces = count_traces(centered)
    parts = [x[start : start + 4] for start in range(0, count, 4)]
    expected = np.concatenate([np.asarray(part - part.mean()) for part in parts])
    np.testing.assert_allclose(in_batches(outcome, 4, x), expected)
    assert len(traces) <= 2


@pytest.mark.parametrize(("depth", "published"), [(20, 0.27), (32, 0.46), (56, 0.85), (110, 1.7)])
def test_parameters_are_as_many_as_published(depth, published):
    """He et al. 2016, Table 6, in millions."""
    model = registry.models.build({"name": "resnet", "depth": depth}).make((32, 32, 3), 10)
    shapes = jax.eval_shape(model.init, jax.random.key(0))["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6
    assert round(count, 2 if depth < 100 else 1) == published


def test_what_cannot_be_built_is_refused():
    for spec, message in (
        ({"norm": "group", "groups": 5}, r"model.groups must be 1, 2, 4, 8 or 16, got 5"),
        ({"depth": 18}, r"model.depth must be 6 n \+ 2, got 18; nearest: 14 and 20"),
    ):
        model = registry.models.build({"name": "resnet"} | spec)
        with pytest.raises(ValueError, match=message):
            model.make(SHAPE, 4)
    with pytest.raises(ValueError, match="resnet needs images of at least 4 x 4"):
        registry.models.build("resnet").make((3, 8, 1), 4)

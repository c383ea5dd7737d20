"""Model replacement against a version in NumPy: training, both terms, factors, and one round."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small, tiny_mlp
from jax.flatten_util import ravel_pytree

import fedjax_sec
from fedjax_sec.attacks.update._training import gradient, measure, sgd_step
from fedjax_sec.core import AttackerView, ConfigError, Model, Setting, check_components, registry
from fedjax_sec.core.space import make_space
from fedjax_sec.core.types import InputSpec
from fedjax_sec.ops.client_axis import Layout
from fedjax_sec.round import Pool, Problem, make_task
from fedjax_sec.runs import config
from fedjax_sec.testing import check_component
from fedjax_sec.testing.worlds import world

BAD = np.array([False, True, False, False])
NORMALISED = 0.5  # of the tiny world's pixels


def attack(**fields):
    """The attack with everything at hand deterministic, unless `fields` says otherwise.

    All six images of the backdoor are in every batch of ten, without noise.
    """
    base = {
        "name": "model_replacement",
        "backdoor": {"name": "pattern", "size": 2, "num_images": 6},
        "batch_size": 10,
        "poisoned": 6,
        "noise": 0.0,
        "epochs": 5,
        "steps": 3,
        "known_above": 1.0,
        "learned_above": 1.0,
        "stop_loss": 0.0,
    }
    return registry.attacks.build(base | fields)


def first(key, num):
    """The same examples whatever the key: the tiny world's first ones."""
    place = world()
    return place.task.inputs.decode(place.pool.x[:num]), place.pool.y[:num]


def view_of(malicious=BAD, sample=first, params=None, weights=None, rate=1.0):
    place, bad = world(), jnp.asarray(malicious)
    return AttackerView(
        bad,
        bad,
        place.params() if params is None else params,
        jnp.arange(4),
        jnp.array(0),
        place.task,
        sample,
        weights=jnp.ones(4) if weights is None else jnp.asarray(weights),
        server_rate=jnp.float32(rate),
    )


@jax.jit
def run(part, malicious, weights, rate):
    updates = jnp.zeros((4, world().task.dim))
    view = view_of(malicious, weights=weights, rate=rate)
    return part.apply(jax.random.key(0), updates, part.init(7, updates.shape[1]), view)


def crafted(part, malicious=BAD, weights=(1.0,) * 4, rate=1.0):
    """(what the malicious clients send, metrics); of seven registered clients four are there."""
    args = jnp.asarray(malicious), jnp.asarray(weights), jnp.float32(rate)
    rows, _, metrics = run(part, *args)
    rows = np.asarray(rows)
    np.testing.assert_array_equal(rows[0], rows[1])  # all send the same
    return rows[1], {name: float(value) for name, value in metrics.items()}


# --- The oracle -----------------------------------------------------------------------------------


def anomaly(part, params, start, gamma):
    """The anomaly term and its gradient, in float64."""
    moved = params - start
    if part.anomaly == "l2":
        length = np.sqrt((moved**2).sum())
        return length, moved / length if length > 0 else np.zeros_like(moved)
    scaled = gamma * moved + start
    a, b = np.linalg.norm(scaled), np.linalg.norm(start)
    cosine = scaled @ start / (a * b)
    slope = gamma * (start / (a * b) - cosine * scaled / a**2)
    return part.cosine_weight * (1 - cosine), -part.cosine_weight * slope


def trained(part, gamma, sample=first):
    """X [D] by plain loops in float64."""
    net, start = tiny_mlp(), np.asarray(world().params(), np.float64)
    place, view = world(), view_of()
    x_bad, target = map(np.asarray, part.backdoor.examples(jax.random.key(0), (), view))
    x, y = map(np.asarray, sample(None, part.batch_size))
    x = np.concatenate([x_bad, x[len(x_bad) :]])
    y = np.concatenate([target, y[len(target) :]])
    assert place.task.dim == len(start)
    rate = part.learning_rate
    if (known := net.accuracy(start, x_bad, target)) > part.known_above:
        rate /= part.known_divisor
    if known > part.learned_above:
        rate /= part.learned_divisor
    params, velocity = start.copy(), np.zeros_like(start)
    loss = net.loss_and_gradient(params, x_bad, target)[0]
    for epoch in range(1, part.epochs + 1):
        if loss <= part.stop_loss:
            break
        now = rate
        for share in part.decay_at:
            now *= part.decay if epoch >= share * part.epochs else 1.0
        for _ in range(part.steps):
            slope = net.gradient(params, x, y)
            if part.mode == "constrain_and_scale":
                term = anomaly(part, params, start, gamma)[1]
                slope = part.alpha * slope + (1 - part.alpha) * term
            velocity = part.momentum * velocity + slope + part.weight_decay * params
            params = params - now * velocity
        loss = net.loss_and_gradient(params, x_bad, target)[0]
    return params, loss


@pytest.mark.parametrize(
    "fields",
    [
        {"alpha": 1.0},
        {"alpha": 0.97, "weight_decay": 0.05},
        {"alpha": 0.6, "anomaly": "cosine", "cosine_weight": 3.0},
        {"mode": "train_and_scale", "max_norm": 0.3, "momentum": 0.5},
        {"known_above": 0.0, "known_divisor": 4.0, "learning_rate": 0.5},
        {"known_above": 0.0, "learned_above": 0.0, "known_divisor": 2.0, "learned_divisor": 3.0},
        {"epochs": 10, "decay_at": (0.3, 0.3, 0.9), "decay": 0.5},
    ],
)
def test_training_and_scaling(fields):
    part = attack(**fields)
    x_bad, target = part.backdoor.examples(jax.random.key(0), (), view_of())
    assert tiny_mlp().accuracy(world().params(), x_bad, target) > 0
    gamma = 4.0  # four equal clients, one of them malicious
    expected, loss = trained(part, gamma)
    moved = expected - np.asarray(world().params(), np.float64)
    length = np.linalg.norm(moved)
    factor = gamma if part.mode == "constrain_and_scale" else part.max_norm / length
    sent, metrics = crafted(part)
    np.testing.assert_allclose(sent, factor * moved, rtol=2e-3, atol=2e-4 * factor * length)
    assert metrics["factor"] == pytest.approx(factor, rel=1e-3)
    assert metrics["distance"] == pytest.approx(length, rel=1e-3)
    assert metrics["backdoor_train_loss"] == pytest.approx(loss, rel=1e-3)
    if part.mode == "train_and_scale":
        assert np.linalg.norm(sent) == pytest.approx(0.3, rel=1e-5)


def test_the_anomaly_term_is_on():
    """The author code's default alpha = 1 switches it off; below 1 it keeps X near the model."""
    off, on, far = (crafted(attack(alpha=a))[1]["distance"] for a in (1.0, 0.9, 0.1))
    assert on < 0.9 * off and far < 0.1 * on  # its slope is 1, however near X is
    assert crafted(attack())[1]["distance"] == pytest.approx(on)


@pytest.mark.parametrize("fields", [{"alpha": 0.3}, {"alpha": 0.3, "anomaly": "cosine"}])
def test_the_gradient_of_the_constrained_loss(fields):
    """Against central differences of the loss itself, in float64; the term adds its share."""
    part, net, view, gamma = attack(**fields), tiny_mlp(), view_of(), 4.0
    start = np.asarray(view.params, np.float64)
    rng = np.random.default_rng(0)
    params = start + 0.05 * rng.normal(size=start.shape)
    x, y = first(None, 9)

    def loss(params):
        plain = net.loss_and_gradient(params, np.asarray(x), np.asarray(y))[0]
        return part.alpha * plain + (1 - part.alpha) * anomaly(part, params, start, gamma)[0]

    steps = 1e-6 * np.eye(len(start))
    expected = np.array([(loss(params + h) - loss(params - h)) / 2e-6 for h in steps])
    objective = part._objective(gamma, view)
    slope_at = jax.jit(functools.partial(gradient, view.task, objective=objective))
    args = jnp.asarray(params, jnp.float32), x, y, jnp.ones(9, bool), jax.random.key(0)
    slope, seen = slope_at(*args)
    assert seen is None
    np.testing.assert_allclose(slope, expected, rtol=1e-2, atol=1e-3 * np.abs(expected).max())
    at_start, _ = slope_at(jnp.asarray(start, jnp.float32), *args[1:])  # where the norm has a kink
    assert np.isfinite(at_start).all()


# --- When it stops --------------------------------------------------------------------------------


def test_training_ends_when_the_backdoor_is_learned():
    part = attack(alpha=1.0, epochs=40, learning_rate=0.2, decay_at=(), stop_loss=0.05)
    expected, loss = trained(part, 4.0)
    longer, _ = trained(dataclasses.replace(part, stop_loss=0.0), 4.0)
    assert loss <= 0.05 and np.abs(longer - expected).max() > 0.01
    sent, metrics = crafted(part)
    moved = expected - np.asarray(world().params())
    np.testing.assert_allclose(sent, 4 * moved, rtol=2e-3, atol=1e-3 * np.abs(moved).max())
    assert metrics["backdoor_train_loss"] <= 0.05


def test_nothing_is_trained_where_the_model_has_the_backdoor_or_nobody_is_malicious():
    sent, metrics = crafted(attack(stop_loss=1e6))
    assert not sent.any() and metrics["distance"] == 0
    sent, metrics = crafted(attack(), np.zeros(4, bool))
    assert not sent.any() and np.isnan(metrics["distance"])


def test_seeds_that_stop_at_different_epochs_side_by_side():
    part = attack(alpha=1.0, epochs=30, learning_rate=0.2, stop_loss=0.05, decay_at=())
    place = world()

    def one(scale):
        view = view_of(params=place.params(scale))
        updates = jnp.zeros((4, place.task.dim))
        rows, _, metrics = part.apply(jax.random.key(0), updates, part.init(4, 8), view)
        return rows[1], metrics["backdoor_train_loss"]

    scales = jnp.array([0.05, 0.4])
    single, together = jax.jit(one), jax.jit(jax.vmap(one))(scales)
    alone = jax.tree.map(lambda *parts: jnp.stack(parts), *map(single, scales))
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


# --- Factors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "view", "expected"),
    [
        ({}, {}, 4.0),
        ({}, {"malicious": [True, True, False, False]}, 2.0),
        ({}, {"rate": 0.1}, 40.0),  # 4 of 40 clients: the author's n = 40
        ({}, {"weights": [1.0, 2.0, 3.0, 4.0]}, 5.0),
        ({}, {"weights": [1.0, 2.0, 3.0, 4.0], "malicious": [False, True, True, False]}, 2.0),
        ({}, {"weights": [1.0, 2.0, 3.0, 4.0], "rate": 0.5}, 10.0),
        ({"average": "registered"}, {"weights": [1.0, 2.0, 3.0, 4.0], "rate": 0.5}, 7.0),
        ({"average": "registered"}, {"malicious": [True, True, False, False]}, 3.5),
        ({"factor": 100.0}, {"weights": [1.0, 2.0, 3.0, 4.0], "rate": 0.5}, 100.0),
        ({"factor": 100.0}, {"malicious": [True, True, False, False]}, 50.0),
    ],
)
def test_factors(fields, view, expected):
    sent, metrics = crafted(attack(epochs=1, steps=1, **fields), **view)
    assert metrics["factor"] == pytest.approx(expected)
    assert np.linalg.norm(sent) == pytest.approx(expected * metrics["distance"], rel=1e-5)
    assert metrics["distance"] > 0


def test_both_averages_agree_where_the_server_divides_by_all_clients():
    """The server's rate K / N makes a mean over K clients the author's sum over N."""
    parts = [attack(epochs=1, steps=1, average=one) for one in ("participants", "registered")]
    factors = [crafted(part, rate=4 / 7)[1]["factor"] for part in parts]
    np.testing.assert_allclose(factors, 7.0, rtol=1e-6)


def test_one_attacked_round_makes_the_global_model_the_attacker_s():
    """Clients of unequal weight, rate 0.5, honest clients that stay where they are.

    The other run says X: there the server multiplies by the attacker's share, and gamma is 1.
    """
    data = {"num_clients": 3, "max_train": 200, "partition": {"name": "dirichlet", "alpha": 1.0}}
    spec = small(
        data=data,
        client={"name": "sgd", "steps": 1, "optimizer": {"name": "sgd", "learning_rate": 0.0}},
        threat={"num_malicious": 1, "placement": "first", "knowledge": "omniscient"},
        server={"optimizer": {"name": "sgd", "learning_rate": 0.5}},
        rounds=1,
    )
    spec["client"]["batch_size"] = 4
    fields = {"name": "model_replacement", "steps": 4, "epochs": 3, "backdoor": "pattern"}
    fields |= {"batch_size": 16, "poisoned": 8, "known_above": 1.0, "learned_above": 1.0}
    replaced = fedjax_sec.run(spec | {"attack": fields})
    counts = replaced_counts(spec)
    share = counts[0] / counts.sum()
    assert len(set(counts.tolist())) > 1
    server = {"optimizer": {"name": "sgd", "learning_rate": float(1 / share)}}
    exact = fedjax_sec.run(spec | {"attack": fields | {"factor": 1.0}, "server": server})
    start = fedjax_sec.run(spec | {"threat": {"num_malicious": 0}})
    x, w, model = (np.asarray(ravel_pytree(r.params)[0]) for r in (exact, start, replaced))
    assert np.abs(x - w).max() > 0.01
    np.testing.assert_allclose(model, x, rtol=1e-4, atol=1e-5)


def replaced_counts(spec):
    from fedjax_sec.runs.prepare import prepare

    return prepare(config.from_mapping(spec)).population.counts


# --- Running statistics -----------------------------------------------------------------------


def task_with_statistics():
    """A linear model behind a normalisation with a running mean, which a step moves halfway."""

    def init(key):
        return {
            "batch_stats": {"mean": jnp.zeros(4)},
            "params": {"output": {"kernel": jax.random.normal(key, (4, 3))}},
        }

    def apply(variables, x, *, train=False, key=None):
        mean = x.mean(axis=0) if train else variables["batch_stats"]["mean"]
        return (x - mean[None]) @ variables["params"]["output"]["kernel"]

    def observe(variables, x, mask, key):
        out = apply(variables, x, train=True)
        mean = 0.5 * variables["batch_stats"]["mean"] + 0.5 * x.mean(axis=0)
        return out, variables | {"batch_stats": {"mean": mean}}

    model = Model(init, apply, observe=observe, head="params/output")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 4)).astype(np.float32), rng.integers(0, 3, 8).astype(np.int32)
    problem = Problem(
        model=model,
        space=make_space(model),
        inputs=InputSpec("features", (4,)),
        num_classes=3,
        num_clients=4,
        clients_per_round=4,
        omniscient=False,
        layout=Layout(4),
    )
    task = make_task(problem, Pool(jnp.asarray(x), jnp.asarray(y)), registry.tasks.build(TASK))
    return task, jnp.asarray(x), jnp.asarray(y)


TASK = "classification"


def test_statistics_are_moved_by_the_batch_and_not_by_the_gradient():
    task, x, y = task_with_statistics()
    assert task.space.observed == slice(0, 4)
    params = jnp.asarray(np.random.default_rng(1).normal(size=16), jnp.float32)
    slope, seen = gradient(task, params, x, y, jnp.ones(8, bool), None, lambda loss, _: loss)
    assert not np.asarray(slope[:4]).any() and np.asarray(slope[4:]).any()
    velocity = jnp.ones(16)
    after, velocity = sgd_step(task, params, velocity, slope, seen, 0.1, 0.5, 0.2)
    np.testing.assert_allclose(after[:4], 0.5 * params[:4] + 0.5 * x.mean(axis=0), rtol=1e-5)
    expected = 0.5 + np.asarray(slope) + 0.2 * np.asarray(params)
    np.testing.assert_allclose(velocity[4:], expected[4:], rtol=1e-5)
    np.testing.assert_allclose(after[4:], params[4:] - 0.1 * expected[4:], rtol=1e-5)


@pytest.mark.parametrize("statistics", ["scaled", "trained"])
def test_statistics_are_scaled_or_not(statistics):
    task, x, y = task_with_statistics()
    params = jnp.asarray(np.random.default_rng(1).normal(size=16), jnp.float32)
    sample = lambda key, num: (jnp.tile(x, (2, 1))[:num], jnp.tile(y, 2)[:num])  # noqa: E731
    bad = jnp.asarray(BAD)
    view = AttackerView(bad, bad, params, jnp.arange(4), jnp.array(0), task, sample)
    backdoor = {"name": "feature_trigger", "num_images": 6, "target": 1}
    parts = [
        attack(backdoor=backdoor, statistics=statistics, factor=factor, known_above=1.0)
        for factor in (1.0, 10.0)
    ]
    one, ten = (
        np.asarray(part.apply(jax.random.key(0), jnp.zeros((4, 16)), part.init(4, 16), view)[0][1])
        for part in parts
    )
    assert np.abs(one).min() > 1e-6
    np.testing.assert_allclose(ten[4:], 10 * one[4:], rtol=1e-5)
    np.testing.assert_allclose(ten[:4], one[:4] * (10 if statistics == "scaled" else 1), rtol=1e-5)
    bounded = attack(
        backdoor=backdoor,
        statistics=statistics,
        mode="train_and_scale",
        max_norm=0.5,
        known_above=1.0,
    )
    sent = bounded.apply(jax.random.key(0), jnp.zeros((4, 16)), bounded.init(4, 16), view)[0][1]
    assert np.linalg.norm(sent[4:]) == pytest.approx(0.5, rel=1e-5)


def test_measures_in_batches():
    place, net = world(), tiny_mlp()
    x, y = first(None, 11)
    loss, share = measure(place.task, place.params(), x, y, 4)
    assert float(loss) == pytest.approx(net.loss_and_gradient(place.params(), x, y)[0], rel=1e-5)
    assert float(share) == pytest.approx(net.accuracy(place.params(), x, y))


# --- Batches ------------------------------------------------------------------------------------


def test_a_batch_holds_the_backdoor_s_images_first_with_noise_in_normalised_units():
    place = world()
    part = attack(noise=0.02, batch_size=400, poisoned=300)
    sample = lambda key, num: place.sample(key, num)  # noqa: E731
    view = view_of(sample=sample)
    x, target = part.backdoor.examples(jax.random.key(1), (), view_of())
    inputs, labels = map(np.asarray, part._batch(jax.random.key(2), x, target, view))
    images = np.asarray(x)
    apart = [np.abs(images - one[None]).reshape(len(images), -1).max(1) for one in inputs[:300]]
    nearest = np.argmin(apart, axis=1)
    assert np.bincount(nearest).tolist() == [50] * 6  # each as often as the others
    noise = np.asarray(inputs[:300]) - images[nearest]
    assert noise.std() == pytest.approx(0.02 * NORMALISED, rel=0.05)
    assert set(np.asarray(labels[:300]).tolist()) == {part.backdoor.target}
    known = {one.tobytes() for one in np.asarray(place.task.inputs.decode(place.pool.x))}
    assert all(one.tobytes() in known for one in np.asarray(inputs[300:]))


# --- Refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backdoor": "sign_flip"}, "backdoor must be an attack on data"),
        ({"poisoned": 11}, "poisoned must be <= batch_size = 10, got 11"),
        ({"factor": 2.0, "average": "registered"}, "average 'registered' computes the factor"),
        ({"max_norm": 2.0}, "max_norm belongs to mode 'train_and_scale'"),
        ({"mode": "train_and_scale"}, "max_norm belongs to mode 'train_and_scale'"),
        (
            {"mode": "train_and_scale", "max_norm": 1.0, "factor": 2.0},
            "factor is not read by mode 'train_and_scale', got 2.0",
        ),
        (
            {"mode": "train_and_scale", "max_norm": 1.0, "anomaly": "cosine"},
            "anomaly is not read by mode 'train_and_scale'",
        ),
        ({"anomaly": "l2", "cosine_weight": 2.0}, "cosine_weight is not read with anomaly 'l2'"),
        ({"alpha": 1.0, "anomaly": "cosine"}, "anomaly is not read with alpha 1"),
    ],
)
def test_refused_fields(fields, message):
    with pytest.raises(ConfigError, match=message):
        check_components((attack(**fields),), "attack", Setting(4, 1))


def test_a_computed_factor_needs_a_known_rate():
    adam = {"optimizer": {"name": "adam", "learning_rate": 0.1}}
    spec = small(threat={"num_malicious": 1}, server=adam, attack={"name": "model_replacement"})
    with pytest.raises(ConfigError, match="needs a server whose step is a rate times"):
        config.from_mapping(spec)
    for fields in ({"factor": 5.0}, {"average": "registered"}):
        config.from_mapping(spec | {"attack": {"name": "model_replacement"} | fields})


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"mode": "train_and_scale", "max_norm": 1.0}, {"factor": 5.0}])
def test_the_contract_in_other_modes(fields):
    full = {"name": "model_replacement"} | fields
    check_component(registry.attacks.build(full), choices=False)

"""What clients do to what they send, against NumPy, and differentially private training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import close, same_bits, small, tiny_mlp

import fedjax_sec
from fedjax_sec.core import ClientView, ConfigError, registry
from fedjax_sec.core.types import InputSpec
from fedjax_sec.defenses import _sending
from fedjax_sec.ops import interception
from fedjax_sec.ops.accounting import gaussian_epsilon
from fedjax_sec.runs.reconstruct import task_of
from fedjax_sec.testing import worlds

RATE = 0.1


def place():
    return worlds.world()


def view(**client):
    world = place()
    fields = {"optimizer": {"name": "sgd", "learning_rate": RATE}} | client
    trainer = registry.clients.build({"name": "sgd", "steps": 1, "batch_size": 4} | fields)
    return ClientView(world.task, world.local_data(7), trainer, world.params())


def sent(spec, delta, key=0, **client):
    stage = registry.defenses.build(spec)
    return np.asarray(stage.hooks(view(**client)).send(jax.random.key(key), jnp.asarray(delta)))


def drawn(seed=0):
    return np.random.default_rng(seed).normal(size=place().task.dim).astype(np.float32)


def tensors():
    """The places of the perceptron's tensors, by their shapes."""
    ends = np.cumsum([int(np.prod(shape)) for shape in tiny_mlp().shapes])
    return [slice(int(a), int(b)) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


# --- Stages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
def test_noise_is_of_its_deviation_in_units_of_a_gradient(kind):
    spec = {"name": "gradient_noise", "std": 0.5, "distribution": kind}
    delta = drawn()
    noise = np.concatenate([sent(spec, delta, key) - delta for key in range(40)])
    np.testing.assert_allclose(noise.std(), 0.5 * RATE, rtol=0.05)
    assert abs(noise.mean()) < 3e-3
    # Of normal numbers .27% lie beyond three deviations, of Laplace's 1.4%.
    beyond = np.mean(np.abs(noise) > 3 * 0.5 * RATE)
    assert (beyond > 0.008) == (kind == "laplace")
    plain = sent(spec, delta, optimizer={"name": "adam", "learning_rate": RATE}) - delta
    np.testing.assert_allclose(plain.std(), 0.5, rtol=0.3)  # no gradient: the update's own units


def test_the_smallest_entries_of_every_tensor_are_pruned():
    delta = drawn()
    got = sent({"name": "gradient_pruning", "share": 0.4}, delta)
    for part in tensors():
        size = np.abs(delta[part])
        kept = size >= np.quantile(size, 0.4)
        close(got[part], np.where(kept, delta[part], 0))
        assert 0 < kept.mean() < 1


def test_signs_have_the_given_size_or_the_mean_one():
    delta = drawn()
    same_bits(sent({"name": "gradient_sign", "scale": 0.5}, delta), 0.5 * np.sign(delta))
    got = sent({"name": "gradient_sign"}, delta)
    close(got, np.abs(delta).mean() * np.sign(delta))


def test_clipping_shortens_long_updates_only():
    delta = drawn()
    length = np.linalg.norm(delta)
    close(sent({"name": "gradient_clipping", "max_norm": 2.0}, delta), delta * 2 / length, 1e-4)
    same_bits(sent({"name": "gradient_clipping", "max_norm": 1e4}, delta), delta)


def test_soteria_hides_the_representation_that_tells_least_by_its_score():
    """The perceptron's first dense layer takes the input: r = x, dr/dx = 1 / std."""
    world, delta = place(), drawn()
    x, _ = world.local_data(7).fetch(jnp.arange(1))
    features = np.asarray(world.task.inputs.normalize(x)).reshape(-1)
    slope = (1 / np.asarray(world.task.inputs.std)).reshape(-1)[0]
    score = slope / (features + 0.1)
    hidden = score < np.quantile(score, 0.5)
    got = sent({"name": "soteria", "share": 0.5}, delta)
    _, name = interception.representation(world.params(), x, world.task)
    part, shape = world.task.space.slices[name], world.task.space.shapes[name]
    expected = np.where(hidden[:, None], 0, delta[part].reshape(shape))
    close(got[part].reshape(shape), expected)
    others = np.ones(len(delta), bool)
    others[part] = False
    same_bits(got[others], delta[others])
    assert 0 < hidden.mean() < 1


class Hiding(nn.Module):
    """A network in which a NaN is lost on its way."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(3, (3, 3), padding="VALID")(jnp.where(x > -1e9, x, 0.0))
        return nn.Dense(4)(x.reshape(x.shape[0], -1))


@pytest.mark.parametrize(
    ("model", "few"),
    [
        ({"name": "small_cnn", "channels": [3, 3], "hidden": 5}, True),  # an entry sees 6 x 6
        ({"name": "mlp", "hidden": [6]}, True),  # and here it is one entry of the input
        (Hiding(), False),
    ],
)
def test_sensitivities_are_the_norms_of_the_whole_jacobian(model, few):
    built = registry.models.build(model).make((10, 10, 1), 4)
    task = task_of(built, InputSpec("pixels", (10, 10, 1), 1.0, (0.2,), (0.5,)), 4)
    params = task.space.split(built.init(jax.random.key(0)))[0]
    x = jax.random.uniform(jax.random.key(1), (10, 10, 1))

    def of(params, x):
        return interception.representation(params, x[None], task)[0][0]

    jacobian = np.asarray(jax.jacrev(of, argnums=1)(params, x)).reshape(-1, 100)
    norms = jax.jit(lambda p, x: interception.sensitivity(p, x, task)[1])(params, x)
    close(norms, np.linalg.norm(jacobian, axis=1), 1e-4, 1e-6)
    along = interception.directions(of, params.shape, x.shape, task)
    assert (len(along) < 100) == few, len(along)
    assert (along.sum(axis=0) == 1).all()


def test_outposts_noise_follows_the_risk_of_each_tensor():
    delta, world = drawn(), place()
    spec = {"name": "outpost", "std": 0.5, "noise_share": 0.3, "prune_share": 0.4}
    many = np.stack([sent(spec, delta, key) for key in range(200)])
    noisy = delta**2 >= np.quantile(delta**2, 0.7)
    weights = np.asarray(world.params())
    for part in tensors():
        size = np.abs(delta[part])
        pruned = np.where(size >= np.quantile(size, 0.4), delta[part], 0)
        risk = min(1.0, float(weights[part].var()))
        mean, std = many[:, part].mean(axis=0), many[:, part].std(axis=0)
        still = ~noisy[part]
        close(mean[still], pruned[still], 1e-4)
        wanted = RATE * 0.5 * risk
        np.testing.assert_allclose(std[noisy[part]], wanted, rtol=0.3, atol=1e-7)
        np.testing.assert_allclose(mean[noisy[part]], pruned[noisy[part]], atol=wanted / 2 + 1e-6)


def test_a_stage_acts_in_a_run():
    spec = small(data={"num_clients": 5, "max_train": 43})
    noisy = spec | {"defense": [{"name": "gradient_noise", "std": 5.0}, "mean"]}
    with_noise, without = fedjax_sec.run(noisy), fedjax_sec.run(spec)
    assert with_noise.metrics["accuracy"][-1] != without.metrics["accuracy"][-1]


@pytest.mark.parametrize("name", ["gradient_noise", "gradient_pruning", "soteria"])
def test_a_stage_that_would_do_nothing_is_refused(name):
    field = "std" if name == "gradient_noise" else "share"
    with pytest.raises(ConfigError, match="would do nothing"):
        fedjax_sec.run(small() | {"defense": [{"name": name, field: 0}, "mean"]})


def test_a_share_is_of_the_values_that_are_there():
    got = _sending.without_smallest(jnp.array([1.0, -2.0, 3.0, 4.0, -5.0]), 0.5)
    assert got.tolist() == [0, 0, 3, 4, -5]


# --- Differentially private training --------------------------------------------------------------


def private(**fields):
    base = {"name": "dp_sgd", "steps": 1, "batch_size": 4, "noise": 0.0, "clip": 0.1}
    base["optimizer"] = {"name": "sgd", "learning_rate": RATE}
    return registry.clients.build(base | fields)


def step(client, count=7, seed=0):
    """The update of a client in the tiny world."""
    world = place()
    data = world.local_data(count)
    key = jax.random.key(seed)
    state = client.init(world.task.dim)
    return client.apply(key, world.params(), state, data, world.task).delta


@pytest.mark.parametrize("clip", [0.1, 1e4])
def test_each_examples_gradient_is_clipped(clip):
    """Against the sum over examples, one by one; the last batch of an epoch is smaller."""
    world = place()
    data, params = world.local_data(7), world.params()
    for steps in (1, 2):
        client = private(clip=clip, steps=steps)
        expected = np.zeros(world.task.dim, np.float32)
        for number in range(steps):
            at, mask = client.drawn(jax.random.key(0), data, number)
            now, total = params + expected, 0.0
            for position in np.asarray(at)[np.asarray(mask)]:
                x, y = data.fetch(jnp.asarray([position]))
                slope = np.asarray(jax.grad(world.task.loss)(now, x, y, jnp.ones(1, bool)))
                total = total + slope * min(1.0, clip / np.linalg.norm(slope))
            expected = expected - RATE * total / 4
        close(step(client), expected, rtol=1e-3, atol=1e-6)


def test_how_many_examples_are_side_by_side_changes_rounding_only():
    for at_once in (1, 2, 3):
        close(step(private(at_once=at_once)), step(private()), rtol=1e-4, atol=1e-7)


def test_noise_is_of_its_deviation():
    still = np.asarray(step(private()))
    noise = np.concatenate(
        [
            np.asarray(step(private(noise=2.0), seed=s)) - np.asarray(step(private(), seed=s))
            for s in range(12)
        ]
    )
    np.testing.assert_allclose(noise.std(), RATE * 2.0 * 0.1 / 4, rtol=0.1)
    assert still.any()


def test_epsilon_is_in_the_summary():
    """8 or 9 examples in batches of 4: three batches, so four rounds are two passes."""
    client = {"name": "dp_sgd", "steps": 1, "batch_size": 4, "noise": 1.5, "delta": 1e-4}
    result = fedjax_sec.run(small(client=client, rounds=4))
    said = result.summary["privacy"]
    assert said["passes"] == 2 and said["noise"] == 1.5
    close(said["epsilon"], gaussian_epsilon(1.5, 2, 1e-4))
    assert "privacy" not in fedjax_sec.run(small(rounds=1)).summary


def test_epsilon_is_that_of_the_gaussian_mechanism():
    """Renyi: alpha / (2 sigma^2) for each pass, the best order found by search (Mironov 2017)."""
    orders = np.linspace(1.01, 200, 200_000)
    for noise, passes in ((1.0, 1), (2.0, 30), (5.0, 7)):
        divergence = passes * orders / (2 * noise**2)
        improved = np.log1p(-1 / orders) - np.log(1e-5 * orders) / (orders - 1)
        np.testing.assert_allclose(
            gaussian_epsilon(noise, passes, 1e-5), (divergence + improved).min(), rtol=0.02
        )
    assert gaussian_epsilon(0.0, 1, 1e-5) == np.inf and gaussian_epsilon(1.0, 0, 1e-5) == 0


def test_noise_that_follows_a_schedule_counts_at_its_smallest():
    client = private(noise={"schedule": "linear", "values": {0: 3.0, 4: 1.0}})
    assert client.privacy(np.array([8]), 4)["noise"] == 1.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"client": {"sampling": "uniform"}}, "sampling must be epoch for 'dp_sgd'"),
        ({"model": {"name": "resnet", "depth": 8, "norm": "batch"}}, "normalises over its batch"),
    ],
)
def test_what_has_no_guarantee_is_refused(changes, words):
    client = {"name": "dp_sgd", "steps": 1, "batch_size": 4} | changes.get("client", {})
    spec = small(client=client)
    if "model" in changes:
        spec |= {"model": changes["model"], "data": {"name": "digits", "num_clients": 5}}
    with pytest.raises(ConfigError, match=words):
        fedjax_sec.run(spec)

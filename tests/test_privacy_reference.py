"""Attacks on privacy against authors' numbers, made by `benchmarks/privacy_reference.py`."""

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer
from flax import linen as nn

import fedjax_sec
from fedjax_sec.attacks.privacy import _labels, _matching
from fedjax_sec.core import Known, Message, registry
from fedjax_sec.core.types import InputSpec
from fedjax_sec.ops import lbfgs
from fedjax_sec.runs.reconstruct import task_of

GOLDEN = np.load(Path(__file__).parent / "golden" / "privacy.npz")
IMAGES = jnp.asarray(GOLDEN["pixels"])
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SHAPE, CLASSES, RATE = (8, 8, 3), 5, 0.1


class Small(nn.Module):
    """The reference's network."""

    @nn.compact
    def __call__(self, x):
        x = nn.sigmoid(nn.Conv(4, (3, 3), padding="VALID")(x))
        return nn.Dense(CLASSES)(x.reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def task():
    network = registry.models.build(Small(), "model").make(SHAPE, CLASSES)
    return task_of(network, InputSpec("pixels", SHAPE, 1.0, MEAN, STD), CLASSES)


def vector(task, kind, dtype=jnp.float32):
    """One of the reference's sets of four arrays as a vector [D]."""
    names = {
        "Conv_0/kernel": "kernel",
        "Conv_0/bias": "bias",
        "Dense_0/kernel": "dense",
        "Dense_0/bias": "dense bias",
    }
    flat = jnp.zeros(task.dim, dtype)
    for place, name in names.items():
        flat = flat.at[task.space.slices[f"params/{place}"]].set(GOLDEN[f"{kind} {name}"].ravel())
    return flat


def known_of(count=4, steps=1, batch=4):
    return Known(RATE, steps, batch, CLASSES, count, None, 0.0)


def one_hot(labels):
    return jax.nn.one_hot(labels, CLASSES)


def pixels(normalised):
    mean, std = (np.array(v, np.float32)[None, None, None] for v in (MEAN, STD))
    return normalised * std + mean


def test_the_gradient_is_the_references(task):
    made = _matching.simulate(
        vector(task, "weights"),
        IMAGES,
        one_hot(GOLDEN["labels"]),
        task,
        known_of(),
    )
    np.testing.assert_allclose(made, vector(task, "gradient"), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["one", "local"])
def test_the_cosine_distance_and_its_derivative_are_the_references(kind, task):
    params, labels = vector(task, "weights"), one_hot(GOLDEN["labels"])
    if kind == "one":
        known, sent = known_of(), vector(task, "gradient")
    else:
        known = known_of(steps=3, batch=2)
        sent = vector(task, "update") / -RATE
        through = _matching.simulate(params, IMAGES, labels, task, known)
        np.testing.assert_allclose(-RATE * through, vector(task, "update"), rtol=1e-3, atol=1e-6)

    def distance(x):
        made = _matching.simulate(params, pixels(x), labels, task, known)
        return _matching.cosine_distance(made, sent)

    value, derivative = jax.jit(jax.value_and_grad(distance))(GOLDEN["start"])
    np.testing.assert_allclose(value, GOLDEN[f"cosine {kind}"], rtol=1e-4)
    np.testing.assert_allclose(
        derivative, GOLDEN[f"cosine {kind} derivative"], rtol=1e-2, atol=1e-6
    )


def test_signed_adam_goes_the_references_way(task, monkeypatch):
    """40 steps from the same start; a sign that rounding turns moves a pixel by a step or two."""
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: jnp.asarray(GOLDEN["start"]))
    made = fedjax_sec.reconstruct(
        -RATE * vector(task, "gradient"),
        {
            "name": "inverting_gradients",
            "iterations": 40,
            "total_variation": 0.0,
            "labels": "known",
        },
        model=Small(),
        params=vector(task, "weights"),
        shape=SHAPE,
        num_classes=CLASSES,
        examples=4,
        rate=RATE,
        mean=MEAN,
        std=STD,
        labels=GOLDEN["labels"],
    )
    apart = np.abs(np.asarray(made.x) - pixels(GOLDEN["adam"]))
    assert np.mean(apart < 1e-4) > 0.99 and apart.max() < 0.1, (np.mean(apart < 1e-4), apart.max())
    begun = np.abs(pixels(GOLDEN["start"]) - pixels(GOLDEN["adam"]))
    assert np.mean(begun < 0.1) < 0.5  # it went somewhere


def test_the_benchmarks_pytorch_goes_the_references_way():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra `bench`)")
    from fedjax_sec.bench import torch_inversion

    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.Sigmoid(), torch.nn.Flatten(), torch.nn.Linear(144, 5)
    )

    def arrays(kind):
        kernel, bias, dense, dense_bias = (
            GOLDEN[f"{kind} {name}"] for name in ("kernel", "bias", "dense", "dense bias")
        )
        dense = dense.reshape(6, 6, 4, CLASSES).transpose(3, 2, 0, 1).reshape(CLASSES, -1)
        parts = (kernel.transpose(3, 2, 0, 1), bias, dense, dense_bias)
        return [torch.from_numpy(part.copy()) for part in parts]

    with torch.no_grad():
        for weight, array in zip(model.parameters(), arrays("weights"), strict=True):
            weight.copy_(array)
    start = torch.from_numpy(GOLDEN["start"].transpose(0, 3, 1, 2).copy())
    mean, std = (torch.tensor(v)[None, :, None, None] for v in (MEAN, STD))
    made = torch_inversion.invert(
        model, arrays("gradient"), torch.from_numpy(GOLDEN["labels"]), start, 40, mean, std, 0.0
    )
    apart = np.abs(made.numpy().transpose(0, 2, 3, 1) - GOLDEN["adam"])
    assert np.mean(apart < 1e-3) > 0.99 and apart.max() < 0.5


def test_lbfgs_on_images_and_labels_goes_the_references_way(task):
    """Three calls of twenty steps, in float64, on the loss of DLG."""
    with jax.enable_x64(True):
        params, known = vector(task, "weights", jnp.float64), known_of(1, batch=1)
        truth = _matching.simulate(
            params,
            IMAGES[:1].astype(jnp.float64),
            one_hot(GOLDEN["labels"][:1]).astype(jnp.float64),
            task,
            known,
        )

        def loss(guess):
            x, scores = guess[:-CLASSES].reshape(1, *SHAPE), guess[-CLASSES:][None]
            made = _matching.simulate(params, pixels(x), jax.nn.softmax(scores), task, known)
            return _matching.squared_distance(made, truth)

        start = jnp.concatenate(
            [GOLDEN["start"][:1].astype(np.float64).ravel(), GOLDEN["lbfgs scores"].ravel()]
        )
        end, _ = lbfgs.minimize(loss, start, 3)
    np.testing.assert_allclose(end[:-CLASSES], GOLDEN["lbfgs"].ravel(), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(end[-CLASSES:], GOLDEN["lbfgs end scores"].ravel(), atol=1e-3)


@pytest.mark.parametrize("place", range(4))
def test_labels_are_read_as_by_the_reference(place, task):
    batch = GOLDEN[f"batch {place}"]
    message = Message(-RATE * vector(task, f"batch {place}"), jnp.float32(1), None)
    params, known = vector(task, "weights"), known_of(len(batch), batch=len(batch))
    slope = _matching.slope_of(message, params, task, known)
    strategies = {"iDLG": "sign", "yin": "minimum", "bias-corrected": "bias"}
    compared = 0
    for theirs, ours in strategies.items():
        if f"batch {place} {theirs}" not in GOLDEN:
            continue
        if theirs == "yin" and len(batch) > CLASSES:
            continue  # theirs names no class twice and fills up at random
        labels = _labels.labels_of(ours, slope, params, task, known)
        assert sorted(labels.tolist()) == GOLDEN[f"batch {place} {theirs}"].tolist(), ours
        compared += 1
    assert compared


class Normalised(nn.Module):
    """The reference's network of two batch norms."""

    @nn.compact
    def __call__(self, x, train=False):
        for activation in (nn.sigmoid, lambda x: x):
            x = nn.Conv(4, (3, 3), padding="VALID")(x)
            x = activation(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(CLASSES)(x.reshape(x.shape[0], -1))


@pytest.mark.parametrize("batch", ["truth", "start"])
def test_the_distance_of_batch_norm_statistics_is_the_references(batch):
    network = registry.models.build(Normalised()).make(SHAPE, CLASSES)
    task = task_of(network, InputSpec("pixels", SHAPE, 1.0, MEAN, STD), CLASSES)
    params = jnp.zeros(task.dim)
    for name, place in task.space.slices.items():
        if f"bn {name.partition('/')[2]}" in GOLDEN:
            params = params.at[place].set(GOLDEN[f"bn {name.partition('/')[2]}"].ravel())
    attack = registry.privacy_attacks.build({"name": "grad_inversion", "batch_norm": 0.1})
    nothing = Message(jnp.zeros(task.dim), jnp.float32(1), None)
    prior = attack.statistics_prior(nothing, params, task, known_of())
    x = (GOLDEN["pixels"] - pixels(0.0)) / np.array(STD) if batch == "truth" else GOLDEN["start"]
    value, slope = jax.jit(jax.value_and_grad(lambda x: prior(pixels(x))))(x.astype(np.float32))
    np.testing.assert_allclose(value, GOLDEN[f"bn {batch}"], rtol=1e-3)
    np.testing.assert_allclose(slope, GOLDEN[f"bn {batch} slope"], rtol=1e-2, atol=1e-5)


class Text(nn.Module):
    """The reference's network on texts, with a table of embeddings."""

    @nn.compact
    def __call__(self, tokens):
        z = nn.Embed(12, 6, name="embedding_0")(tokens)
        hidden = nn.tanh(nn.Dense(10, name="a")(z.reshape(z.shape[0], -1)))
        return nn.Dense(12, name="b")(hidden)


def test_tags_distance_and_its_derivatives_are_the_references():
    network = registry.models.build(Text()).make((4,), 12)
    task = task_of(network, InputSpec("tokens", (4,)), 12)
    kinds = {"params": "", "slope": "sent "}
    vectors = {kind: jnp.zeros(task.dim) for kind in kinds}
    for name, place in task.space.slices.items():
        _, layer, leaf = name.split("/")
        for kind, prefix in kinds.items():
            known = f"tag {prefix}{layer}_{leaf}"
            values = GOLDEN[known] if known in GOLDEN else GOLDEN["tag table"]
            vectors[kind] = vectors[kind].at[place].set(values.ravel())
    distance = registry.privacy_attacks.build("tag").objective(
        vectors["slope"], vectors["params"], task
    )
    value, slopes = jax.jit(jax.value_and_grad(distance, argnums=(0, 1)))(
        GOLDEN["tag guess"], GOLDEN["tag scores"]
    )
    # breaching takes half of it.
    np.testing.assert_allclose(value / 2, GOLDEN["tag value"], rtol=1e-4)
    for slope, name in zip(slopes, ("guess", "scores"), strict=True):
        np.testing.assert_allclose(slope / 2, GOLDEN[f"tag {name} slope"], rtol=1e-2, atol=1e-5)


#: Attack and network of each of the reference's cases.
FIRST_LAYERS = {
    "analytic": ({"name": "analytic"}, {"name": "mlp", "hidden": [20]}),
    "imprint": ({"name": "imprint", "bins": 40}, Small()),
    "traps": ({"name": "curious_abandon_honesty", "units": 60}, Small()),
}


@pytest.mark.parametrize("case", FIRST_LAYERS)
def test_the_inputs_of_a_first_layer_are_the_references(case):
    """Every true image that breaching reads from a gradient is among our guesses."""
    spec, base = FIRST_LAYERS[case]
    attack = registry.privacy_attacks.build(spec | {"labels": "known"})
    network = registry.models.build(base)
    network = attack.insert(network) if case != "analytic" else network
    mean, std = ((0.0,) * 3, (1.0,) * 3) if case == "traps" else (MEAN, STD)
    task = task_of(
        network.make(SHAPE, CLASSES), InputSpec("pixels", SHAPE, 1.0, mean, std), CLASSES
    )
    params, update = jnp.zeros(task.dim), jnp.zeros(task.dim)
    (kernel,) = (n for n, shape in task.space.shapes.items() if shape[:-1] == (192,))
    bias = kernel.replace("kernel", "bias")
    for name, part in ((kernel, "kernel"), (bias, "bias")):
        weights = GOLDEN[f"{case} weights" if part == "kernel" else f"{case} biases"]
        params = params.at[task.space.slices[name]].set(weights.ravel())
        gradient = GOLDEN[f"{case} {part}"].ravel()
        update = update.at[task.space.slices[name]].set(-gradient)
    count = 1 if case == "analytic" else 4
    known = known_of(count, batch=count)._replace(
        rate=1.0, labels=jnp.asarray(GOLDEN["labels"][:count])
    )
    message = Message(update, jnp.float32(1), None)
    made = np.asarray(attack.reconstruct(jax.random.key(0), message, params, task, known).x)
    theirs = GOLDEN[f"{case} guesses"] * np.array(std) + np.array(mean)
    truth = GOLDEN["pixels"][:count]

    def read(guesses):
        apart = np.abs(guesses[:, None] - truth[None]).max(axis=(2, 3, 4))
        return set(np.flatnonzero((apart < 1e-3).any(axis=0)).tolist())

    assert read(theirs) and read(theirs) <= read(made), (read(theirs), read(made))


def test_an_imprints_query_and_edges_are_the_references():
    attack = registry.privacy_attacks.build({"name": "imprint", "bins": 40})
    theirs = GOLDEN["imprint query"]
    np.testing.assert_allclose(
        attack.query(None, 192), theirs / np.linalg.norm(theirs), rtol=1e-3, atol=1e-5
    )
    np.testing.assert_allclose(attack.edges(40), GOLDEN["imprint edges"], rtol=1e-4, atol=1e-5)
    normal = registry.privacy_attacks.build({"name": "imprint", "bins": 40, "measure": "mean"})
    np.testing.assert_allclose(
        normal.edges(40), GOLDEN["imprint normal edges"], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("count", [1, 4, pytest.param(10, marks=pytest.mark.slow)])
def test_the_labels_of_a_batch_are_those_of_revealing_labels(count):
    """The set that its author code accepts, of 1,000 classes."""
    attack = registry.privacy_attacks.build("label_bag")
    kernel = GOLDEN[f"bag {count} kernel"].astype(np.float64)
    labels = attack._solve(kernel, count)
    assert sorted(labels.tolist()) == sorted(GOLDEN[f"bag {count}"].tolist())
    assert sorted(labels.tolist()) == sorted(GOLDEN[f"bag {count} true"].tolist())


@pytest.mark.slow
def test_the_script_holds_every_image_against_its_guess():
    root = Path(__file__).parents[1]
    script = runpy.run_path(str(root / "benchmarks" / "inverting_gradients.py"))
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(size=(8, 32, 32, 3)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 10, 8))
    mean, std = np.array(MEAN, np.float32), np.array(STD, np.float32)
    fields = {"iterations": 8, "restarts": 1, "total_variation": 1e-4}
    line, guesses = script["measure"]("ConvNet", 4, 5, images, labels, mean, std, 0.01, fields)
    errors = np.mean((guesses - np.asarray(images)) ** 2, axis=(1, 2, 3))
    assert line["images"] == 8 and line["local steps"] == 5
    assert line["PSNR (dB)"] == pytest.approx(np.mean(-10 * np.log10(errors)), rel=1e-4)
    with pytest.raises(typer.BadParameter, match="diverges within 5 local steps of 4 image"):
        script["measure"]("ConvNet", 4, 5, images, labels, mean, std, 1e30, fields)

"""Attacks on privacy against breaching's numbers, made by `benchmarks/privacy_reference.py`."""

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer
from flax import linen as nn

import fedjax_sec
from fedjax_sec.api import named
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
    network = registry.models.build(named("model", Small()), "model").make(SHAPE, CLASSES)
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

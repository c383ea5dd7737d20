"""Gradient SHAP and integrated gradients: completeness, a plain loop, and the figure of maps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import same_bits, small, tiny_mlp, tiny_pool, tiny_task
from jax.flatten_util import ravel_pytree

import fedjax_sec
from fedjax_sec.core import ConfigError
from fedjax_sec.evaluation.attribution import (
    FeatureMap,
    completeness_gap,
    explain,
    gradient_shap,
    integrated_gradients,
)
from fedjax_sec.report import plotting
from fedjax_sec.runs import config
from fedjax_sec.runs.experiment import train
from fedjax_sec.runs.loading import final_params, logits_of
from fedjax_sec.runs.prepare import prepare
from fedjax_sec.runs.source import load_source
from fedjax_sec.sweeps import make_cells, run_cells

TARGET = jnp.array([0, 2, 1, 2])


def images():
    """Four images and three baselines in [0, 1], and the tiny perceptron's parameters."""
    x = tiny_pool().x.astype(jnp.float32) / 255
    return x[:4], x[10:13], 0.5 * jax.random.normal(jax.random.key(2), (tiny_task().dim,))


def relu(x):
    return tiny_task().outputs(images()[2], x)


def smooth(x):
    mix = jax.random.normal(jax.random.key(3), (16, 3))
    return jnp.tanh(0.5 * x.reshape(len(x), -1) @ mix) * 3.0


def linear(x):
    return x.reshape(len(x), -1) @ jax.random.normal(jax.random.key(4), (16, 3)) + 7.0


# --- Completeness -------------------------------------------------------------------------------


def test_a_linear_model_is_explained_exactly():
    """w (x - b) for every draw of alpha, so one baseline leaves nothing to chance."""
    x, baselines, _ = images()
    weights = np.asarray(jax.random.normal(jax.random.key(4), (16, 3)))
    by_hand = np.stack([weights[:, t] for t in TARGET]).reshape(x.shape)
    one = gradient_shap(linear, x, baselines[:1], TARGET, jax.random.key(0), 5)
    np.testing.assert_allclose(one, by_hand * np.asarray(x - baselines[:1]), rtol=1e-4, atol=1e-5)
    mean = integrated_gradients(linear, x, baselines, TARGET, 1)
    np.testing.assert_allclose(
        mean, by_hand * np.asarray(x - baselines.mean(0, keepdims=True)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("model", [relu, smooth])
def test_gradient_shap_is_complete_up_to_its_standard_error(model):
    x, baselines, _ = images()

    def drawn(key, num):
        return gradient_shap(model, x, baselines, TARGET, key, num)

    singles = jax.jit(jax.vmap(lambda key: drawn(key, 1)))(jax.random.split(jax.random.key(8), 400))
    spread = np.asarray(singles).reshape(400, 4, -1).sum(-1).std(0, ddof=1)
    outcome = jax.jit(lambda: drawn(jax.random.key(0), 4000))()
    gap = np.abs(completeness_gap(model, x, baselines, TARGET, outcome))
    assert (gap < 4 * spread / np.sqrt(4000)).all()
    reached = np.abs(np.asarray(outcome).reshape(4, -1).sum(1))
    assert (spread > 0.05).all() and reached.max() > 20 * gap.max()


def test_integrated_gradients_are_complete_to_the_stated_tolerance():
    x, baselines, _ = images()

    def gap(model, steps):
        outcome = integrated_gradients(model, x, baselines, TARGET, steps)
        return np.abs(completeness_gap(model, x, baselines, TARGET, outcome))

    assert gap(smooth, 64).max() < 2e-4
    coarse, fine = gap(smooth, 4), gap(smooth, 8)
    assert coarse.max() > 1e-3 and 3 < coarse.max() / fine.max() < 5  # O(1 / n^2)

    # Piecewise linear: V / (2 n), V being how much the slope changes along the lines.
    alphas = jnp.linspace(0, 1, 2001)[:, None, None, None]
    change = np.zeros(4)
    for i in range(4):
        for b in baselines:
            values = np.asarray(relu(b[None] + alphas * (x[i] - b)[None]), np.float64)
            slopes = np.diff(values[:, int(TARGET[i])]) * 2000
            change[i] += np.abs(np.diff(slopes)).sum() / len(baselines)
    for steps in (8, 64):
        assert (gap(relu, steps) <= change / (2 * steps) + 1e-5).all()
    assert gap(relu, 8).max() > 1e-4 and gap(relu, 512).max() < 5e-3


# --- A plain loop -------------------------------------------------------------------------------


def slope(params, point, label, step=1e-6):
    """The gradient of one logit for one image in float64, by central differences."""
    outcome = np.zeros(point.size)
    for j in range(point.size):
        shift = np.zeros(point.size)
        shift[j] = step
        pair = np.stack([point.ravel() + shift, point.ravel() - shift])
        values = tiny_mlp().forward(params, pair)[2][:, label]
        outcome[j] = (values[0] - values[1]) / (2 * step)
    return outcome.reshape(point.shape)


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_gradient_shap_equals_a_loop(noise):
    x, baselines, params = images()
    outcome = gradient_shap(relu, x, baselines, TARGET, jax.random.key(1), 3, noise)
    x64, b64 = np.asarray(x, np.float64), np.asarray(baselines, np.float64)
    expected = np.zeros(x.shape)
    for s in range(3):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(1), s), 3)
        which = np.asarray(jax.random.randint(keys[0], (4,), 0, 3))
        alpha = np.asarray(jax.random.uniform(keys[1], (4,)), np.float64)
        shaken = x64 + noise * np.asarray(jax.random.normal(keys[2], x.shape), np.float64)
        for i in range(4):
            away = shaken[i] - b64[which[i]]
            at = b64[which[i]] + alpha[i] * away
            expected[i] += slope(np.asarray(params), at, int(TARGET[i])) * away / 3
    np.testing.assert_allclose(outcome, expected, rtol=1e-3, atol=1e-4)
    assert np.abs(expected).max() > 0.1


def test_what_cannot_be_explained_is_an_error():
    x, baselines, _ = images()
    with pytest.raises(ValueError, match="num_samples must be >= 1, got 0"):
        gradient_shap(relu, x, baselines, TARGET, jax.random.key(0), 0)
    with pytest.raises(ValueError, match=r"images' shape \(4, 4, 1\), got \(3, 4, 4\)"):
        integrated_gradients(relu, x, baselines[..., 0], TARGET)
    with pytest.raises(ValueError, match="at least one array"):
        integrated_gradients(relu, x, baselines[:0], TARGET)


def test_explain_tells_the_models_own_prediction():
    x, baselines, params = images()
    outcome = explain(relu, x, baselines, jax.random.key(1), num_samples=4)
    logits = tiny_mlp().forward(params, x)[2]
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_array_equal(outcome.predicted, logits.argmax(1))
    np.testing.assert_allclose(outcome.confidence, shares.max(1), rtol=1e-4)
    told, mine = (
        gradient_shap(relu, x, baselines, target, jax.random.key(1), 4)
        for target in (TARGET, outcome.predicted)
    )
    np.testing.assert_array_equal(outcome.attribution, mine)
    other = explain(relu, x, baselines, jax.random.key(1), num_samples=4, target=TARGET)
    np.testing.assert_array_equal(other.attribution, told)
    assert not np.array_equal(told, mine)
    np.testing.assert_array_equal(other.predicted, outcome.predicted)


# --- The figure ---------------------------------------------------------------------------------


@pytest.mark.parametrize("channels, quantile", [(1, 1.0), (3, 0.9)])
def test_the_figure_has_one_panel_for_each_model_and_image(
    channels, quantile, tmp_path, monkeypatch
):
    rng, kept = np.random.default_rng(0), []
    x = rng.random((2, 6, 6, channels))
    maps = {
        name: FeatureMap(scale * rng.normal(size=x.shape), np.array([1, 0]), np.array([0.5, 1.0]))
        for name, scale in (("no attack", 1.0), ("attack", 5.0), ("attack, RLR", 0.2))
    }
    save = plotting.save
    monkeypatch.setattr(plotting, "save", lambda *args: kept.append(args[0]) or save(*args))
    written = plotting.feature_maps(
        x,
        maps,
        tmp_path / "maps",
        class_names=["sandal", "sneaker"],
        labels=[0, 1],
        quantile=quantile,
    )
    assert [path.name for path in written] == ["maps.png", "maps.pdf"]
    assert written[0].read_bytes()[:4] == b"\x89PNG" and written[0].stat().st_size > 5000
    panels = [axes for axes in kept[0].axes if axes.get_title()]
    assert len(panels) == 2 * 4 and len(kept[0].axes) == 2 * 4 + 2  # and a scale a row
    titles = [axes.get_title() for axes in panels]
    assert titles[:2] == ["input\nsandal", "no attack\nsneaker (50.0%)"]
    assert titles[4:6] == ["input\nsneaker", "no attack\nsandal (100.0%)"]
    for i in range(2):
        row = [axes.images[0] for axes in panels[4 * i + 1 : 4 * i + 4]]
        each = [np.abs(one.attribution[i].sum(-1)) for one in maps.values()]
        largest = max(np.quantile(one, quantile) for one in each)
        assert (largest == max(one.max() for one in each)) == (quantile == 1)
        assert {image.get_clim() for image in row} == {(-largest, largest)}
        np.testing.assert_allclose(
            row[1].get_array(), maps["attack"].attribution[i].sum(-1), rtol=1e-6
        )


# --- Parameters of a finished run ---------------------------------------------------------------


def flat(params):
    return np.asarray(ravel_pytree(params)[0])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"checkpoint.keep_params": True},
        {
            "server.optimizer": {"name": "adam", "learning_rate": 0.1},
            "threat.num_malicious": 1,
            "attack": "pattern",
            "evaluation.influence": {"top": 10},
        },
    ],
)
def test_final_params_are_those_of_the_run(changes, tmp_path):
    result = fedjax_sec.run(small(), out=tmp_path, **changes)
    assert (tmp_path / "params.npy").exists() == ("checkpoint.keep_params" in changes)
    outcome = final_params(tmp_path)
    same_bits(outcome, result.params)
    source = load_source(result.experiment)
    logits = logits_of(result.experiment)(outcome, source.x_test.astype(np.float32) / source.scale)
    accuracy = (np.argmax(logits, 1) == source.y_test).mean()
    assert accuracy == pytest.approx(result.metrics["accuracy"][-1], abs=1e-6)


def test_cells_of_a_sweep_keep_their_parameters_if_told_to(tmp_path):
    for keep in (True, False):
        base = small(rounds=1) | {"checkpoint": {"keep_params": keep}}
        cells = make_cells(base, {"defense": ["mean"]}, seeds=(0, 1))
        run_cells(cells, tmp_path / str(keep))
        outcome = train([prepare(cell.experiment) for cell in cells])
        for cell, result in zip(cells, outcome, strict=True):
            folder = tmp_path / str(keep) / "cells" / cell.name
            if keep:
                same_bits(final_params(folder), result.params)
            else:
                with pytest.raises(ConfigError, match=r"keeps no parameters.*keep_params"):
                    final_params(folder)
    assert not np.array_equal(*(flat(result.params) for result in outcome))


def test_params_of_no_finished_run(tmp_path):
    with pytest.raises(ConfigError, match="holds no finished run"):
        final_params(tmp_path)
    assert config.from_mapping(small()).checkpoint.keep_params is False

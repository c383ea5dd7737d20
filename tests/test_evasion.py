"""Attacks on a trained model's inputs, and the accuracy that withstands them."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small

import fedjax_sec
from fedjax_sec.core import ConfigError, registry
from fedjax_sec.evaluation.robustness import robust_mask
from fedjax_sec.ops.evasion import checkpoints, linf_apgd, margin, objective
from fedjax_sec.runs import loading
from fedjax_sec.runs.config import from_mapping
from fedjax_sec.runs.source import load_source

REFERENCE = Path(__file__).parent / "golden" / "evasion.npz"
# The attacks of benchmarks/evasion_reference.py, by their names there.
SAME = {
    "fgsm": {"name": "fgsm"},
    "pgd": {"name": "pgd", "random_start": False},
    "pgd random start": {"name": "pgd"},
    "pgd momentum": {"name": "pgd", "random_start": False, "momentum": 1.0},
    "apgd": {"name": "apgd"},
    "apgd dlr": {"name": "apgd", "loss": "dlr"},
    "apgd targets": {"name": "apgd", "loss": "dlr", "targets": 9},
}


@functools.cache
def reference():
    with np.load(REFERENCE) as stored:
        return {name: jnp.asarray(stored[name]) for name in stored.files}


right = registry.tasks.build("classification").right


def perceptron(x):
    r = reference()
    hidden = jax.nn.relu(x.reshape(x.shape[0], -1) @ r["w0"] + r["b0"][None])
    return hidden @ r["w1"] + r["b1"][None]


@pytest.mark.parametrize("name", SAME)
def test_finds_what_torchattacks_finds_on_the_same_weights(name):
    r = reference()
    attack = registry.evasions.build({"eps": 0.1} | SAME[name])
    moved = jax.jit(lambda key: attack.apply(key, perceptron, r["x"], r["y"]))(jax.random.key(0))
    held = np.asarray(jnp.argmax(perceptron(moved), axis=1) == r["y"])
    assert abs(held.sum() - int(r[f"{name}: withstood"])) <= (0 if name in r else 4)
    if name in r:
        # Where both succeed or both fail; ours keeps inputs that were wrong from the beginning.
        kept = np.asarray(jnp.argmax(perceptron(r["x"]), axis=1) == r["y"])
        apart = np.abs(moved - r[name].astype(np.float32)).max(axis=(1, 2, 3))
        # A gradient of exactly or nearly zero may have either sign.
        assert np.mean(apart[kept] < 2e-3) > 0.97


def np_objective(loss, z, y, target=None):
    z, out = np.asarray(z, np.float64), []
    for row, label, aim in zip(z, y, y if target is None else target, strict=True):
        ranked = sorted(row)[::-1]
        best_other = max(v for i, v in enumerate(row) if i != label)
        rival = best_other if target is None else row[aim]
        if loss == "margin":
            out.append(rival - row[label])
        elif loss == "dlr":
            low = ranked[2] if target is None else (ranked[2] + ranked[3]) / 2
            out.append(-(row[label] - rival) / (ranked[0] - low))
        else:
            log_p = row - np.log(np.exp(row - row.max()).sum()) - row.max()
            out.append(-log_p[label] if target is None else log_p[aim])
    return np.array(out)


@pytest.mark.parametrize("loss", ["cross_entropy", "dlr", "margin"])
@pytest.mark.parametrize("targeted", [False, True])
def test_objectives(loss, targeted):
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(20, 6)).astype(np.float32) * 3, rng.integers(0, 6, 20)
    target = jnp.asarray((y + rng.integers(1, 6, 20)) % 6) if targeted else None
    outcome = objective(loss, jnp.asarray(z), jnp.asarray(y), target)
    np.testing.assert_allclose(outcome, np_objective(loss, z, y, target), rtol=1e-4, atol=1e-4)
    if loss == "dlr":  # neither a shift nor a scale of the logits matters
        again = objective(loss, jnp.asarray(1000 * z + 7), jnp.asarray(y), target)
        np.testing.assert_allclose(outcome, again, rtol=1e-3, atol=1e-3)


def test_an_unknown_objective_is_refused():
    with pytest.raises(ValueError, match="loss must be one of .*, got 'mse'"):
        objective("mse", jnp.zeros((1, 3)), jnp.zeros(1, int))


LINEAR = jnp.asarray(np.random.default_rng(3).normal(size=(4, 3)).astype(np.float32))


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "fgsm"},
        {"name": "pgd", "steps": 60},
        {"name": "apgd", "steps": 60},
        {"name": "pgd", "steps": 60, "momentum": 0.5},
    ],
)
def test_the_optimum_of_a_linear_model_is_found(spec):
    """With two classes the best input is x - eps sign(w_y - w_other), cut to the range."""
    two = LINEAR[:, :2]
    x = jnp.asarray(np.random.default_rng(1).uniform(size=(30, 4)).astype(np.float32))
    y = jnp.arange(30) % 2
    attack = registry.evasions.build(spec | {"eps": 0.2})
    moved = attack.apply(jax.random.key(0), lambda x: x @ two, x, y)
    slope = two[:, y].T - two[:, 1 - y].T
    best = jnp.clip(x - 0.2 * jnp.sign(slope), 0, 1)
    np.testing.assert_allclose(moved, best, atol=1e-5)


def test_pgd_never_falls_on_a_linear_model():
    x = jnp.asarray(np.random.default_rng(2).uniform(size=(10, 4)).astype(np.float32))
    y = jnp.arange(10) % 3
    losses = []
    for steps in range(1, 25):
        spec = {"name": "pgd", "steps": steps, "random_start": False, "eps": 0.2}
        attack = registry.evasions.build(spec)
        moved = attack.search(
            jax.random.key(0), lambda x: objective("cross_entropy", x @ LINEAR, y), x
        )
        losses.append(objective("cross_entropy", moved @ LINEAR, y))
    assert np.all(np.diff(np.array(losses), axis=0) >= -1e-6)
    assert np.min(losses[-1] - losses[0]) > 0.01


def np_apgd(value, slope, x, start, eps, steps, rho=0.75):
    """Croce and Hein's Algorithm 1 for one input, in float64."""
    cut = lambda z: np.clip(np.clip(z, x - eps, x + eps), 0, 1)  # noqa: E731
    marks = checkpoints(steps)
    current, before, size = start, start, 2 * eps
    best, best_value, last_value = start, value(start), value(start)
    marked, halved, rises, last_mark = best_value, False, 0, 0
    grad = slope(start)
    for k in range(steps):
        z = cut(current + size * np.sign(grad))
        alpha = 1.0 if k == 0 else 0.75
        moved = cut(current + alpha * (z - current) + (1 - alpha) * (current - before))
        before, current, now = current, moved, value(moved)
        grad = slope(current)
        rises += now > last_value
        last_value = now
        if now > best_value:
            best, best_value = current, now
        if k + 1 in marks:
            first = rises < rho * (k + 1 - last_mark)
            second = not halved and best_value <= marked
            halved = first or second
            if halved:
                size, current = size / 2, best
                grad = slope(current)
            marked, rises, last_mark = best_value, 0, k + 1
    return best


@pytest.mark.parametrize("steps", [7, 30])
def test_auto_pgd_is_its_algorithm(steps):
    rng = np.random.default_rng(4)
    x = rng.uniform(0.2, 0.8, size=(6, 3))
    center = rng.uniform(size=(6, 3))
    matrix = np.array([[3.0, 0.5, 0.0], [0.5, 1.0, 0.2], [0.0, 0.2, 9.0]])
    eps = 0.15
    draw = jax.random.uniform(jax.random.key(5), x.shape, jnp.float32, -1.0, 1.0)
    draw = np.asarray(draw, np.float64)
    start = np.clip(x + eps * draw / np.abs(draw).max(1, keepdims=True), 0, 1)

    def values(inputs):
        apart = inputs - jnp.asarray(center, jnp.float32)
        return -jnp.einsum("bi,ij,bj->b", apart, jnp.asarray(matrix, jnp.float32), apart)

    outcome = linf_apgd(
        values, jnp.asarray(x, jnp.float32), jax.random.key(5), eps=eps, num_steps=steps
    )
    for row in range(6):
        apart = lambda z, row=row: z - center[row]  # noqa: E731
        expected = np_apgd(
            lambda z, apart=apart: -apart(z) @ matrix @ apart(z),
            lambda z, apart=apart: -2 * matrix @ apart(z),
            x[row],
            start[row],
            eps,
            steps,
        )
        np.testing.assert_allclose(outcome[row], expected, atol=2e-5)


def test_checkpoints_of_a_hundred_steps_are_the_authors():
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]


def test_scaled_logits_undo_saturation():
    """A model whose logits are a thousand times too large has no gradient in float32."""
    r = reference()
    x, y = r["x"][:100], r["y"][:100]

    def share(scale, **changes):
        attack = registry.evasions.build(
            {"name": "pgd", "eps": 0.1, "random_start": False} | changes
        )
        logits = lambda x: scale * perceptron(x)  # noqa: E731
        return float(robust_mask(attack, jax.random.key(0), logits, right, x, y, 64).mean())

    plain, masked = share(1.0), share(1e3)
    assert masked > plain + 0.15
    assert share(1e3, logit_scale=1e-3) == pytest.approx(plain, abs=0.011)
    assert share(1e3, loss="dlr") < masked - 0.15


def test_more_restarts_and_targets_find_more():
    r = reference()

    def held(**changes):
        attack = registry.evasions.build(
            {"name": "pgd", "eps": 0.1, "steps": 3, "step_size": 0.05} | changes
        )
        return robust_mask(attack, jax.random.key(0), perceptron, right, r["x"], r["y"], 200)

    once = held()
    assert np.all(held(restarts=8) <= once)  # the first restart is the same search
    assert held(restarts=8).sum() < once.sum()
    assert held(loss="margin", targets=9).sum() <= held(loss="margin").sum()


def test_batches_see_their_own_randomness():
    r = reference()
    x = jnp.broadcast_to(r["x"][:1], (4, 8, 8, 1))
    attack = registry.evasions.build({"name": "noise", "tries": 1})
    seen = []

    def logits(inputs):
        jax.debug.callback(lambda value: seen.append(np.asarray(value)), inputs, ordered=True)
        return perceptron(inputs)

    robust_mask(attack, jax.random.key(0), logits, right, x, jnp.zeros(4, int), 2)
    jax.effects_barrier()
    first, second = seen[1], seen[4]  # clean, noise, kept; clean, noise, kept
    assert not np.allclose(first, second)


# --- In an experiment ---------------------------------------------------------------------------


def test_a_run_measures_robust_accuracy(tmp_path):
    evasions = [
        {"name": "fgsm", "eps": 0.05},
        {"name": "pgd", "eps": 0.05},
        {"name": "pgd", "eps": 0},
    ]
    evaluation = {"every": 2, "evasions": evasions, "evasion_images": 150}
    result = fedjax_sec.run(small(rounds=4, evaluation=evaluation), out=tmp_path / "run")
    m = result.metrics
    assert m["robust_accuracy/pgd"].shape == (3,)
    assert np.all(m["robust_accuracy/pgd"] <= m["robust_accuracy/fgsm"] + 0.02)
    # Without a radius: plain accuracy on the first 150 test images.
    experiment = result.experiment
    source = load_source(experiment)
    logits = loading.logits_of(experiment)
    x = jnp.asarray(source.x_test[:150] / np.float32(source.scale))
    read = np.argmax(np.asarray(logits(result.params, x)), axis=1)
    right = read == np.asarray(source.y_test[:150])
    assert m["robust_accuracy/pgd_2"][-1] == pytest.approx(right.mean(), abs=1e-6)
    assert m["robust_accuracy/pgd"][-1] < right.mean()


@pytest.mark.slow
def test_transfer_attacks_with_a_finished_run(tmp_path):
    learns = {
        "data": {"num_clients": 5, "max_train": 600},
        "client": {"name": "sgd", "epochs": 2, "batch_size": 20},
        "model": {"name": "mlp", "hidden": [32]},
        "rounds": 6,
    }
    other = small(seed=1, checkpoint={"keep_params": True}, **learns)
    fedjax_sec.run(other, out=tmp_path / "other")
    pgd = {"name": "pgd", "eps": 0.2, "step_size": 0.02}
    evasions = [pgd, {"name": "transfer", "surrogate": str(tmp_path / "other"), "attack": pgd}]
    m = fedjax_sec.run(small(evaluation={"every": 6, "evasions": evasions}, **learns)).metrics
    white, black = m["robust_accuracy/pgd"][-1], m["robust_accuracy/transfer"][-1]
    assert white <= black < m["accuracy"][-1] - 0.1
    # The same model as its own surrogate: a white-box attack.
    mine = [{"name": "transfer", "surrogate": str(tmp_path / "other"), "attack": pgd}, pgd]
    m = fedjax_sec.run(small(seed=1, evaluation={"every": 6, "evasions": mine}, **learns)).metrics
    outcome = m["robust_accuracy/transfer"][-1], m["robust_accuracy/pgd"][-1]
    assert outcome[0] == pytest.approx(outcome[1], abs=0.01)


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"evasions": "pdg"}, "unknown evasion 'pdg'. Did you mean 'pgd'?"),
        ({"evasions": "transfer"}, "'transfer' needs 'surrogate'"),
        ({"evasions": {"name": "pgd", "targets": 10}}, "targets must be <= 9"),
        ({"evasion_images": 10}, "evasion_images does nothing without evaluation.evasions"),
        ({"evasions": "pgd", "evasion_images": 361}, "evasion_images must be <= 360"),
        (
            {"evasions": {"name": "transfer", "surrogate": "nowhere"}},
            "'nowhere' holds no finished run",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_run(evaluation, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        fedjax_sec.run(small(evaluation=evaluation), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_margins_are_signed():
    z = jnp.array([[1.0, 3.0, 2.0]])
    assert margin(z, jnp.array([1])).item() == 1 and margin(z, jnp.array([2])).item() == -1


def test_an_experiment_reads_back_its_evasions():
    spec = small(evaluation={"evasions": ["fgsm", {"name": "pgd", "restarts": 3}]})
    experiment = from_mapping(spec)
    assert from_mapping(experiment.to_dict()) == experiment
    assert experiment.evaluation.evasions[1].restarts == 3

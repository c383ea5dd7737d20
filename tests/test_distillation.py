"""The distillation attack: its steps by hand, its layer, and what Krum makes of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import sample, small, tiny_mlp, tiny_task

import fedjax_sec
from fedjax_sec.core import ConfigError, registry
from fedjax_sec.core.types import AttackerView
from fedjax_sec.ops.layers import layer_mask, layer_sizes

CLIENTS = 5
BAD = jnp.arange(CLIENTS) < 2


def crafted(params, **fields):
    task = tiny_task()
    spec = {"name": "distillation", "optimizer": {"name": "sgd", "learning_rate": 0.7}} | fields
    attack = registry.attacks.build(spec)
    view = AttackerView(BAD, BAD, params, jnp.arange(CLIENTS), jnp.int32(0), task, sample)
    updates = jnp.zeros((CLIENTS, task.dim))
    return jax.jit(lambda key: attack.apply(key, updates, (), view)[0])(jax.random.key(7))


def start():
    return 0.5 * jax.random.normal(jax.random.key(1), (tiny_task().dim,))


def np_slope(flat, x, labels, temperature):
    """Gradient of the cross-entropy at a temperature with soft labels [B, C], in float64."""
    mlp = tiny_mlp()
    _, _, _, w2 = mlp.tensors(flat)
    x, hidden, logits = mlp.forward(flat, x)
    logits = logits / temperature
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    slope = (p * labels.sum(1, keepdims=True) - labels) / temperature / len(x)
    back = (slope @ w2.T) * (hidden > 0)
    return np.concatenate(
        [part.ravel() for part in (back.sum(0), x.T @ back, slope.sum(0), hidden.T @ slope)]
    ), p


@pytest.mark.parametrize("layer", [None, "all"])
def test_is_its_formulas(layer):
    params, temperature = start(), 5.0
    result = crafted(
        params, teacher_steps=2, student_steps=2, batch_size=6, temperature=temperature, layer=layer
    )
    task = tiny_task()
    mask = np.ones(task.dim, bool)
    if layer is None:  # 16-5-3: the output layer has 18 parameters, the hidden one 85
        sizes = layer_sizes(task.unravel(params))
        assert sorted(sizes.values()) == [18, 85]
        mask = np.asarray(layer_mask(task.unravel(params), min(sizes, key=sizes.get)))
        assert mask.sum() == 18
    for row in range(2):
        first, second = jax.random.split(jax.random.fold_in(jax.random.key(7), row))

        def batch(mine, number):
            draw, _ = jax.random.split(jax.random.fold_in(mine, number))
            return (np.asarray(part) for part in sample(draw, 6))

        teacher = np.asarray(params, np.float64)
        for number in range(2):
            x, y = batch(first, number)
            teacher = teacher - 0.7 * np_slope(teacher, x, np.eye(3)[y], temperature)[0]
        student = np.asarray(params, np.float64)
        for number in range(2):
            x, _ = batch(second, number)
            soft = np_slope(teacher, x, np.zeros((6, 3)), temperature)[1]
            student = student - 0.7 * mask * np_slope(student, x, soft, temperature)[0]
        expected = student - np.asarray(params, np.float64)
        np.testing.assert_allclose(result[row], expected, rtol=1e-3, atol=1e-6)
        assert np.all((np.asarray(result[row]) != 0) <= mask)
        assert np.abs(result[row]).max() > 1e-4


def test_every_malicious_client_trains_for_itself_and_honest_ones_do_not():
    result = np.asarray(crafted(start(), teacher_steps=1, student_steps=1, temperature=3.0))
    assert np.abs(result[0] - result[1]).max() > 1e-5
    np.testing.assert_array_equal(result[2:], 0.0)


def test_alike_they_send_one_update():
    steps = {"teacher_steps": 1, "student_steps": 1, "temperature": 3.0}
    result = np.asarray(crafted(start(), alike=True, **steps))
    assert np.abs(result[0]).max() > 1e-5
    np.testing.assert_array_equal(result[1], result[0])
    np.testing.assert_array_equal(result[2:], 0.0)


def test_a_layer_by_name_and_an_unknown_one():
    attack = {"name": "distillation", "teacher_steps": 1, "student_steps": 1}
    threat = {"num_malicious": 2}
    fedjax_sec.run(small(attack=attack | {"layer": "hidden_0"}, threat=threat, rounds=1))
    with pytest.raises(ConfigError, match=r"no layer 'layer_9'; known: all, hidden_0"):
        fedjax_sec.run(small(attack=attack | {"layer": "layer_9"}, threat=threat))


def test_statistics_are_no_layer():
    model = registry.models.build({"name": "resnet", "depth": 8}).make((8, 8, 1), 4)
    tree = jax.eval_shape(model.init, jax.random.key(0))
    names = layer_sizes(tree)
    assert names["conv_0"] == 144 and names["norm_0"] == 32  # scale and bias, no mean and variance
    assert sum(names.values()) == sum(leaf.size for leaf in jax.tree.leaves(tree["params"]))

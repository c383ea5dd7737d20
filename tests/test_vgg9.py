"""VGG9 against the author code's description of it, in plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sec.core import ConfigError, registry

#: `models/vgg9_only.py` of the author code: feature maps of 3 x 3 convolutions, M a 2 x 2 pooling.
AUTHORS = [64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"]


@pytest.fixture(scope="module")
def vgg9():
    model = registry.models.build("vgg9").make((32, 32, 3), 10)
    return model, jax.jit(model.init)(jax.random.key(0))


def by_hand(layers, x):
    """Logits [n, 10] in float64, one shifted product for each place of a kernel."""
    x, number = np.asarray(x, np.float64), 0
    for width in AUTHORS:
        if width == "M":
            n, height, rows, channels = x.shape
            x = x.reshape(n, height // 2, 2, rows // 2, 2, channels).max(axis=(2, 4))
            continue
        layer = layers[f"conv_{number}"]
        kernel, bias = (np.asarray(layer[name], np.float64) for name in ("kernel", "bias"))
        assert kernel.shape == (3, 3, x.shape[-1], width)
        side, padded = x.shape[1], np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        out = np.zeros((*x.shape[:3], width))
        for i in range(3):
            for j in range(3):
                out += padded[:, i : i + side, j : j + side] @ kernel[i, j]
        x, number = np.maximum(out + bias, 0), number + 1
    assert x.shape[1:] == (1, 1, 512)
    return x.reshape(len(x), -1) @ np.asarray(layers["output"]["kernel"]) + np.asarray(
        layers["output"]["bias"]
    )


def test_the_layers_are_the_authors(vgg9):
    _, variables = vgg9
    widths = [width for width in AUTHORS if width != "M"]
    sizes = [9 * a * b + b for a, b in zip([3, *widths], widths, strict=False)] + [512 * 10 + 10]
    layers = variables["params"]
    names = [*(f"conv_{i}" for i in range(len(widths))), "output"]
    assert sorted(layers) == sorted(names)
    counted = [sum(leaf.size for leaf in jax.tree.leaves(layers[name])) for name in names]
    assert counted == sizes and sum(sizes) == 9_225_610
    # PyTorch's U(-1/sqrt(fan_in), 1/sqrt(fan_in)) of kernels and biases.
    for name, width in zip(names, [3, *widths], strict=True):
        fan_in = width * (1 if name == "output" else 9)
        for leaf in jax.tree.leaves(layers[name]):
            assert np.abs(leaf).max() <= 1 / np.sqrt(fan_in)
        assert np.std(layers[name]["kernel"]) == pytest.approx((3 * fan_in) ** -0.5, rel=0.05)


def test_logits(vgg9):
    model, variables = vgg9
    x = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    logits = jax.jit(lambda v, x: model.apply(v, x))(variables, jnp.asarray(x))
    expected = by_hand(variables["params"], x)
    assert expected.std() > 1e-3
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lowering", ["xla", "rows"])
def test_the_ways_to_convolve_agree(vgg9, lowering):
    model, variables = vgg9
    other = registry.models.build({"name": "vgg9", "convolution": lowering}).make((32, 32, 3), 10)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 32, 32, 3)), jnp.float32)
    both = (jax.jit(lambda v, x, m=m: m.apply(v, x))(variables, x) for m in (model, other))
    np.testing.assert_allclose(*both, rtol=1e-4, atol=1e-5)


def test_too_small_images_are_refused():
    with pytest.raises(ConfigError, match="at least 32 x 32 pixels, got \\(28, 28, 1\\)"):
        registry.models.build("vgg9").make((28, 28, 1), 10)

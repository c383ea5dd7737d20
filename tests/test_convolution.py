"""Convolution and max-pooling against NumPy, under the client axis too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import shallow

from fedjax_sec import core
from fedjax_sec.core import registry
from fedjax_sec.ops import polyphase
from fedjax_sec.ops.convolution import LOWERINGS, conv2d, max_pool

ALL = pytest.mark.parametrize("lowering", [*LOWERINGS, "auto"])
# batch, height, width, channels, features, kernel height and width
SHAPES = [
    (2, 5, 6, 3, 4, 3, 2),
    (1, 4, 4, 1, 1, 4, 4),
    (3, 7, 5, 2, 5, 1, 1),
    (2, 6, 9, 2, 3, 2, 5),
]


def pool_by_phase(x, size):
    return polyphase.join(polyphase.max_pool(polyphase.split(x, size), size))


def pool_by_other_phases(x, size):
    """The phases are not those of the pooling: it has to split anew."""
    return polyphase.join(polyphase.max_pool(polyphase.split(x, size + 1), size))


POOLS = pytest.mark.parametrize("pool", [max_pool, pool_by_phase, pool_by_other_phases])


def draw(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def np_conv(x, kernel):
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    high, wide = kernel.shape[:2]
    rows, columns = x.shape[1] - high + 1, x.shape[2] - wide + 1
    out = np.zeros((x.shape[0], rows, columns, kernel.shape[3]))
    for r in range(rows):
        for s in range(columns):
            window = x[:, r : r + high, s : s + wide]
            out[:, r, s] = np.einsum("bijc,ijcf->bf", window, kernel)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stride", [2, 3])
def test_a_stride_skips_outputs(stride, shape, lowering):
    batch, height, width, channels, features, high, wide = shape
    x, kernel = draw((batch, height, width, channels), (high, wide, channels, features))
    result = conv2d(x, kernel, lowering, stride)
    expected = np_conv(x, kernel)[:, ::stride, ::stride]
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


def np_conv_gradients(x, kernel, cotangent):
    """Gradients of sum(cotangent * conv(x, kernel)): the convolution is linear in each argument."""
    x, kernel, cotangent = (np.asarray(a, np.float64) for a in (x, kernel, cotangent))
    dx, dk = np.zeros(x.shape), np.zeros(kernel.shape)
    high, wide = kernel.shape[:2]
    for r in range(cotangent.shape[1]):
        for s in range(cotangent.shape[2]):
            g = cotangent[:, r, s]
            window = x[:, r : r + high, s : s + wide]
            dk += np.einsum("bijc,bf->ijcf", window, g)
            dx[:, r : r + high, s : s + wide] += np.einsum("ijcf,bf->bijc", kernel, g)
    return dx, dk


@pytest.mark.slow
@ALL
@pytest.mark.parametrize("shape", SHAPES)
def test_convolution_and_its_gradients(shape, lowering):
    batch, height, width, channels, features, high, wide = shape
    x, kernel = draw((batch, height, width, channels), (high, wide, channels, features))
    out, pullback = jax.vjp(lambda x, k: conv2d(x, k, lowering), x, kernel)
    np.testing.assert_allclose(out, np_conv(x, kernel), rtol=1e-5, atol=1e-5)
    (cotangent,) = draw(out.shape, seed=1)
    for result, expected in zip(
        pullback(cotangent), np_conv_gradients(x, kernel, cotangent), strict=True
    ):
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


@ALL
def test_convolution_with_a_kernel_for_each_client(lowering):
    x, kernels = draw((3, 2, 6, 6, 2), (3, 3, 3, 2, 4))
    result = jax.vmap(lambda x, k: conv2d(x, k, lowering))(x, kernels)
    expected = [np_conv(one, kernel) for one, kernel in zip(x, kernels, strict=True)]
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


@ALL
def test_convolution_has_forward_and_second_derivatives(lowering):
    x, kernel, direction = draw((1, 4, 4, 1), (2, 2, 1, 2), (2, 2, 1, 2))

    def loss(k):
        return jnp.sum(jnp.tanh(conv2d(x, k, lowering)) ** 2)

    forward = jax.jvp(loss, (kernel,), (direction,))[1]
    np.testing.assert_allclose(forward, jnp.vdot(jax.grad(loss)(kernel), direction), rtol=1e-5)
    hessian = jax.jacrev(jax.grad(loss))(kernel).reshape(kernel.size, -1)
    assert np.abs(hessian).max() > 0.1
    np.testing.assert_allclose(hessian, hessian.T, rtol=1e-4, atol=1e-5)


@ALL
def test_convolution_keeps_the_dtype(lowering):
    x, kernel = draw((1, 5, 5, 2), (3, 3, 2, 2))
    result = conv2d(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), lowering)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_allclose(result.astype(np.float32), np_conv(x, kernel), rtol=0.05, atol=0.15)


@pytest.mark.parametrize(
    ("height", "width", "factor"), [(5, 6, 1), (9, 7, 2), (8, 8, 2), (9, 7, 3), (5, 6, 8)]
)
def test_phases_hold_the_images(height, width, factor):
    """Also where a phase has fewer rows or columns than another, or none at all."""
    (x,) = draw((2, height, width, 3))
    images = jax.tree.map(np.asarray, polyphase.split(x, factor))
    np.testing.assert_array_equal(polyphase.join(images), x)
    for i, row in enumerate(images.parts):
        for j, part in enumerate(row):
            pixels = part.reshape(3, -1, 2)
            for r, s in np.ndindex(-(-(height - i) // factor), -(-(width - j) // factor)):
                pixel = pixels[:, r * images.pitch + s].T
                np.testing.assert_array_equal(pixel, x[:, r * factor + i, s * factor + j])


@pytest.mark.parametrize(
    ("height", "width", "sizes"), [(21, 22, (2, 2)), (24, 19, (3, 2)), (22, 25, (1, 3))]
)
def test_layers_by_phase_equal_those_on_images(sizes, height, width):
    """Two convolutions with poolings between, and their gradients, on pixels that do not divide."""
    x, first, second = draw((2, height, width, 2), (3, 2, 2, 4), (2, 3, 4, 3))

    def plain(x, first, second):
        for kernel, size in zip((first, second), sizes, strict=True):
            x = jax.nn.relu(max_pool(conv2d(x, kernel, "patches"), size))
        return x

    def by_phase(x, first, second):
        images = polyphase.split(x, sizes[0] * sizes[1])
        for kernel, size in zip((first, second), sizes, strict=True):
            images = polyphase.max_pool(polyphase.conv2d(images, kernel), size).map(jax.nn.relu)
        return polyphase.join(images)

    out, pullback = jax.vjp(jax.jit(plain), x, first, second)
    result, found_pullback = jax.vjp(jax.jit(by_phase), x, first, second)
    assert out.size and (np.asarray(out) > 0).any()
    np.testing.assert_allclose(result, out, rtol=1e-5, atol=1e-5)
    (cotangent,) = draw(out.shape, seed=1)
    for a, b in zip(found_pullback(cotangent), pullback(cotangent), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_an_unknown_lowering_is_refused():
    with pytest.raises(ValueError, match="lowering must be one of .*, got 'fft'"):
        conv2d(jnp.ones((1, 3, 3, 1)), jnp.ones((2, 2, 1, 1)), "fft")


@pytest.mark.slow
@POOLS
@pytest.mark.parametrize(("height", "width", "size"), [(6, 6, 3), (7, 5, 2), (4, 9, 4), (3, 3, 1)])
def test_max_pool_and_its_gradient(height, width, size, pool):
    (x,) = draw((2, height, width, 3))
    rows, columns = height // size, width // size
    out, pullback = jax.vjp(lambda x: pool(x, size), x)
    (cotangent,) = draw(out.shape, seed=1)
    x, cotangent = np.asarray(x), np.asarray(cotangent)
    expected, gradient = np.zeros(out.shape, np.float32), np.zeros(x.shape, np.float32)
    for b, r, s, c in np.ndindex(2, rows, columns, 3):
        window = x[b, r * size : (r + 1) * size, s * size : (s + 1) * size, c]
        i, j = np.unravel_index(window.argmax(), window.shape)
        expected[b, r, s, c] = window[i, j]
        gradient[b, r * size + i, s * size + j, c] = cotangent[b, r, s, c]
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(pullback(jnp.asarray(cotangent))[0], gradient)


@pytest.mark.slow
@POOLS
def test_equal_maxima_share_the_gradient(pool):
    gradient = jax.grad(lambda x: pool(x, 2).sum())(jnp.ones((1, 2, 2, 1)))
    np.testing.assert_array_equal(gradient, np.full((1, 2, 2, 1), 0.25))
    uneven = jax.grad(lambda x: pool(x, 3).sum())(jnp.ones((1, 3, 3, 1)))
    same = jax.grad(lambda x: max_pool(x, 3).sum())(jnp.ones((1, 3, 3, 1)))
    np.testing.assert_array_equal(uneven, same)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("fltrust_cnn", (12, 11, 2)),
        ("rlr_cnn", (7, 8, 1)),
        ("small_cnn", (6, 7, 3)),
        ("alie_cifar10", (26, 25, 3)),
        ("rlr_cifar10", (27, 24, 2)),
        ("resnet", (6, 5, 3)),
        ("madry_cnn", (9, 8, 2)),
    ],
)
def test_networks_do_not_depend_on_the_lowering(name, shape):
    """Same parameters, outputs, dropped activations and gradients, whatever the arrangement."""
    x = jax.random.uniform(jax.random.key(0), (3, *shape))
    results = []
    fields = registry.models.build(name)
    for lowering in [one for one in core.choices(fields, "convolution") if one != "auto"]:
        model = shallow(name, convolution=lowering).make(shape, 4)
        variables = jax.jit(model.init)(jax.random.key(1))

        def loss(variables, x, model=model):
            return jnp.sum(model.apply(variables, x, train=True, key=jax.random.key(2)) ** 2)

        gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        results.append((variables, *gradients(variables, x)))
    assert len(results) >= 3
    # Many layers that divide by a deviation enlarge what rounding does.
    atol = 1e-4 if name == "resnet" else 1e-5
    for other in results[1:]:
        for a, b in zip(jax.tree.leaves(results[0]), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol)

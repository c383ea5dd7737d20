"""What the networks do beyond their number of parameters, which their doctests count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sec import registry


def test_rlr_cnn_drops_half_of_its_activations_in_training_only():
    model = registry.models.build("rlr_cnn").make((8, 8, 1), 10)
    variables = jax.jit(model.init)(jax.random.key(0))
    x = jax.random.uniform(jax.random.key(1), (3, 8, 8, 1))
    plain = model.apply(variables, x)
    np.testing.assert_array_equal(plain, model.apply(variables, x, key=jax.random.key(2)))
    train = jax.jit(jax.vmap(lambda key: model.apply(variables, x, train=True, key=key)))
    dropped = train(jax.random.split(jax.random.key(3), 400))
    assert np.ptp(np.asarray(dropped), axis=0).min() > 1e-3  # another mask for every key
    # Kept activations are doubled, and the last layer is linear in those of its own dropout.
    np.testing.assert_allclose(dropped.mean(axis=0), plain, atol=0.05)


@pytest.mark.parametrize("name, side", [("fltrust_cnn", 9), ("rlr_cnn", 5)])
def test_images_that_the_poolings_reduce_to_nothing_are_refused(name, side):
    model = registry.models.build(name)
    with pytest.raises(ValueError, match=f"{name} needs images of at least"):
        model.make((side, side, 1), 10)
    small = model.make((side + 1, side + 1, 1), 10)
    x = jnp.zeros((2, side + 1, side + 1, 1))
    variables = jax.eval_shape(small.init, jax.random.key(0))
    assert jax.eval_shape(small.apply, variables, x).shape == (2, 10)

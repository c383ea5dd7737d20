"""Which pixels a prediction depends on: Gradient SHAP and integrated gradients."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


class FeatureMap(NamedTuple):
    """One model's answers for B images: label, its probability, and the attribution of it."""

    attribution: Float[Array, " B *shape"]
    predicted: Int[Array, " B"]
    confidence: Float[Array, " B"]


def gradient_shap(
    logit_fn: Callable,
    x: Float[Array, " B *shape"],
    baselines: Float[Array, "S ..."],
    target: Int[Array, " B"],
    key: PRNGKeyArray,
    num_samples: int,
    noise_std: float | Float[Array, ""] = 0.0,
) -> Float[Array, " B *shape"]:
    r"""Gradient SHAP: expected gradients between random baselines and the input.

    With f the logit of `target`, for each image by itself,

    .. math:: \phi(x) = \frac{1}{n} \sum_{s=1}^{n} \nabla f(b_s + \alpha_s (x_s - b_s)) \odot
              (x_s - b_s), \qquad b_s \sim U(baselines),\ \alpha_s \sim U[0, 1],\
              x_s = x + N(0, noise\_std^2)

    Without noise the expected sum over the pixels is f(x) minus the mean of f over the baselines
    (completeness); a finite n leaves the error of a mean of n independent draws.

    Args:
        logit_fn: [B, ...] -> [B, C], each image by itself.
        x: the images.
        baselines: what "absent" looks like, for example training images, or zeros [1, ...].
        target: the label whose logit is explained, one an image.
        key: sample s draws from `split(fold_in(key, s), 3)`: baselines, alphas, noise.
        num_samples: n; one forward and backward pass over the images each, one after another.
        noise_std: standard deviation of noise on every sample's input.

    Returns: [B, ...], signed: positive where the pixel speaks for `target`.

    Raises: `ValueError` for fewer than one sample, or baselines that do not match the images.

    Source: Lundberg and Lee 2017 (SHAP); this sampling form is that of Captum's `GradientShap` and
    of Erion et al. 2021 (expected gradients). Figure 5 of Ozdayi et al. 2021 uses it, with settings
    that the paper does not give.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> weights = jnp.array([[1.0, 0.0], [3.0, 0.0]])
        >>> x, zeros = jnp.array([[2.0, 1.0]]), jnp.zeros((1, 2))
        >>> print(gradient_shap(lambda x: x @ weights, x, zeros, jnp.array([0]),
        ...                     jax.random.key(0), 4))
        [[2. 3.]]
    """
    _check(x, baselines, num_samples, "num_samples")
    count = x.shape[0]

    def sample(total, number):
        which_key, alpha_key, noise_key = jax.random.split(jax.random.fold_in(key, number), 3)
        chosen = baselines[jax.random.randint(which_key, (count,), 0, baselines.shape[0])]
        alpha = _per_image(jax.random.uniform(alpha_key, (count,)), x)
        away = x + noise_std * jax.random.normal(noise_key, x.shape) - chosen
        return total + _gradient(logit_fn, chosen + alpha * away, target) * away, None

    total, _ = jax.lax.scan(sample, jnp.zeros_like(x), jnp.arange(num_samples))
    return total / num_samples


def integrated_gradients(
    logit_fn: Callable,
    x: Float[Array, " B *shape"],
    baselines: Float[Array, "S ..."],
    target: Int[Array, " B"],
    num_steps: int = 64,
) -> Float[Array, " B *shape"]:
    r"""The same expectation without chance: every baseline, and alphas on a grid.

    .. math:: \phi(x) = \frac{1}{S n} \sum_{b} \sum_{t=1}^{n}
              \nabla f\big(b + \tfrac{t - 1/2}{n} (x - b)\big) \odot (x - b)

    the midpoint rule. Its sum over the pixels misses f(x) - mean f(b) by O(1/n^2) for a smooth f;
    for a piecewise linear one (ReLU, max-pooling) by at most V / (2 n), V being the total change of
    the slope of f along the line from b to x, averaged over the baselines.

    Args and returns as `gradient_shap`; S n passes over the images.

    Source: Sundararajan, Taly and Yan 2017, Equations 1 and 3; averaged over baselines as
    Erion et al. 2021. The midpoint rule is our choice.

    Example:
        >>> import jax.numpy as jnp
        >>> x, zeros = jnp.array([[2.0, 1.0]]), jnp.zeros((1, 2))
        >>> print(integrated_gradients(lambda x: x**2, x, zeros, jnp.array([0]), 8))
        [[4. 0.]]
    """
    _check(x, baselines, num_steps, "num_steps")

    def sample(total, number):
        chosen = baselines[number // num_steps][None]
        alpha = (number % num_steps + 0.5) / num_steps
        away = x - chosen
        return total + _gradient(logit_fn, chosen + alpha * away, target) * away, None

    passes = baselines.shape[0] * num_steps
    total, _ = jax.lax.scan(sample, jnp.zeros_like(x), jnp.arange(passes))
    return total / passes


def completeness_gap(
    logit_fn: Callable,
    x: Float[Array, " B *shape"],
    baselines: Float[Array, "S ..."],
    target: Int[Array, " B"],
    attribution: Float[Array, " B *shape"],
) -> Float[Array, " B"]:
    """The attributions' sum minus (f(x) - mean f(b)), for each image; 0 when they are complete."""
    reached = jnp.take_along_axis(logit_fn(x), target[:, None], axis=1)[:, 0]
    absent = logit_fn(baselines).mean(0)[target]
    return attribution.reshape(x.shape[0], -1).sum(1) - (reached - absent)


def explain(
    logit_fn: Callable,
    x: Float[Array, " B *shape"],
    baselines: Float[Array, "S ..."],
    key: PRNGKeyArray,
    *,
    num_samples: int = 256,
    noise_std: float = 0.0,
    target: Int[Array, " B"] | None = None,
) -> FeatureMap:
    """A model's predictions and their Gradient SHAP maps, of what it predicts unless told `target`.

    `confidence` is the softmax probability of the predicted label.
    """
    probabilities = jax.nn.softmax(logit_fn(x))
    predicted = jnp.argmax(probabilities, axis=-1)
    target = predicted if target is None else target
    attribution = gradient_shap(logit_fn, x, baselines, target, key, num_samples, noise_std)
    return FeatureMap(attribution, predicted, probabilities.max(axis=-1))


def _gradient(logit_fn, at, target):
    """[B, ...]: the gradient of each image's own target logit."""
    logits, pull = jax.vjp(logit_fn, at)
    return pull(jax.nn.one_hot(target, logits.shape[-1], dtype=logits.dtype))[0]


def _per_image(values, x):
    return values.reshape(-1, *[1] * (x.ndim - 1))


def _check(x, baselines, number, name):
    if number < 1:
        raise ValueError(f"{name} must be >= 1, got {number}.")
    if baselines.shape[1:] != x.shape[1:] or not baselines.shape[0]:
        raise ValueError(
            f"baselines must be at least one array of the images' shape {x.shape[1:]}, "
            f"got {baselines.shape}."
        )

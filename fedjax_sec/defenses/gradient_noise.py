"""Noise on what a client sends (Zhu, Liu and Han, 2019)."""

import jax

from fedjax_sec.core import ANY_SCALE, Hooks, Stage, numeric, registry, static
from fedjax_sec.defenses._sending import rate_of


@registry.defenses.register("gradient_noise")
class GradientNoise(Stage):
    r"""Each client adds noise to its gradient before it sends it: a stage of training.

    .. math:: \Delta \leftarrow \Delta + \eta \Upsilon

    with :math:`\Upsilon` of mean 0 and standard deviation `std` in every coordinate, Gaussian or
    Laplacian, and :math:`\eta` the rate of a client that takes plain gradient steps: of one step
    that is noise of `std` on its gradient. Other clients' updates get noise of `std` itself.
    `[T] -> [T]`, once behind all local steps. Malicious clients follow only with
    `malicious_follow`.

    Source: Zhu et al. 2019 (Deep leakage from gradients), Section 5.1: Gaussian and Laplacian noise
    of 1e-4 to 1e-1; from 1e-2 on the reconstruction fails there. Whether these are variances or
    deviations is not said; they are deviations here.

    Example:
        >>> from fedjax_sec.core import registry
        >>> registry.defenses.build({"name": "gradient_noise", "std": 0.1}).stage
        'client'
    """

    stage = "client"
    std: float = numeric(
        0.01, "Standard deviation of the noise on a gradient.", low=0, unbounded=ANY_SCALE
    )
    distribution: str = static(
        "gaussian", "Of what kind the noise is.", choices=("gaussian", "laplace")
    )
    malicious_follow: bool = static(False, "Whether malicious clients do so as well.")

    def idle(self, setting):
        return "gradient_noise would do nothing: its std is 0." if self.std == 0 else None

    def hooks(self, view):
        scale = self.std * rate_of(view.client)

        def send(key, delta):
            if self.distribution == "gaussian":
                return delta + scale * jax.random.normal(key, delta.shape, delta.dtype)
            # The deviation of a Laplace distribution of scale b is sqrt(2) b.
            return delta + scale / 2**0.5 * jax.random.laplace(key, delta.shape, delta.dtype)

        return Hooks(send=send)

"""Random updates: the simplest Byzantine baseline."""

import jax

from fedjax_sec.core import ANY_SCALE, UpdateAttack, numeric, registry, static


@registry.attacks.register("random")
class Random(UpdateAttack):
    r"""Every malicious client sends independent noise instead of its update.

    .. math:: u_{mal} \sim \mathcal{N}(0, scale^2 I) \text{ or } \mathcal{U}(-scale, scale)

    `updates [K, D] -> [K, D]`.

    Source: Blanchard et al. 2017, Section 5, "Gaussian" attackers with standard deviation 200 on
    gradients; the scale depends on the task, so the default is a choice.

    Example:
        >>> import fedjax_sec
        >>> out = fedjax_sec.attack([[1.0], [2.0]], "random", malicious=[True, False], scale=1e-3)
        >>> print(bool(abs(out[0, 0]) < 0.01), out[1])
        True [2.]
    """

    separable = True
    scale: float = numeric(
        1.0, "Standard deviation, or half-width for `uniform`.", above=0, unbounded=ANY_SCALE
    )
    distribution: str = static(
        "normal", "Distribution of each coordinate.", choices=("normal", "uniform")
    )

    def apply(self, key, updates, state, view):
        if self.distribution == "normal":
            noise = jax.random.normal(key, updates.shape, updates.dtype)
        else:
            noise = jax.random.uniform(key, updates.shape, updates.dtype, -1.0, 1.0)
        return self.scale * noise, state, {}

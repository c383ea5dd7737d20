"""GradInversion (Yin, Mallya, Vahdat, Alvarez, Kautz and Molchanov, CVPR 2021)."""

import jax
import jax.numpy as jnp
import optax

from fedjax_sec.attacks.privacy import _labels, _matching, _search
from fedjax_sec.core import ConfigError, PrivacyAttack, numeric, registry, static


@registry.privacy_attacks.register("grad_inversion")
class GradInversion(PrivacyAttack):
    r"""Searches images by their gradient, with priors on images and on what batch norms see.

    With g the gradient of the client's step,

    .. math:: \min_x \; \alpha_G \| \nabla_w \ell(x, y) - g \|^2 + \alpha_{TV} TV(x)
              + \alpha_2 \|x\|_2 + \alpha_{BN} \sum_l \left( \|\mu_l(x) - \mu_l\|_2
              + \|\sigma^2_l(x) - \sigma^2_l\|_2 \right) + \alpha_C \|x - \bar x\|_2

    x begins as normal noise in normalised units, is clipped to the valid pixels in every step, and
    Adam gets the gradient plus `langevin` times the rate times normal noise; the rate rises over
    `warm_up` steps and falls along a cosine. :math:`\mu_l, \sigma^2_l` are the statistics of the
    network's batch norms: `statistics: running` those of the global model, `sent` those that the
    client's own message holds, which is of its one batch. :math:`\mu_l(x)` are of a network that
    normalises by the guesses' own statistics, as a client's does that trains; :math:`\alpha_{BN}`
    is not read in a network without batch norms. :math:`\bar x` is the mean of all `restarts` (Yin
    et al. register images first; this is their pixel-wise mean), which run side by side; the lowest
    matching loss is kept.
    `x [n, H, W, C]`, `y [n]`.

    Raises: `ConfigError` for clients that do not take plain gradient steps, for inputs that are no
    images, and for a model whose head is no dense layer.

    Source: Yin et al. 2021 (See through gradients), Sections 3 and 4: Adam, rate 0.1, 20,000 steps,
    50 of them warm-up, weights of the priors, noise 0.2; no author code. Where the text is silent
    its counterpart in breaching (Geiping et al., `seethroughgradients.yaml`): squared distance of
    weight 1e-4, noise 0.01 (the default here), and ten times the weight for the first layer's
    statistics; its network is in evaluation mode, where statistics are known. Labels: those of the
    lowest entries of the last kernel's gradient (`minimum`).

    Example:
        >>> from fedjax_sec.core import registry
        >>> registry.privacy_attacks.build({"name": "grad_inversion", "batch_norm": 0}).labels
        'minimum'
    """

    inputs = frozenset({"pixels"})
    needs_labels = True
    iterations: int = static(20_000, "Steps of Adam.", low=8, high=10**7)
    learning_rate: float = numeric(0.1, "Its rate.", above=0, high=1e6)
    warm_up: int = static(50, "Steps over which the rate rises.", low=0, high=10**6)
    langevin: float = numeric(0.01, "Noise of a step, in units of the rate.", low=0, high=1e6)
    matching: float = numeric(1e-4, "alpha_G, weight of the gradient's distance.", low=0, high=1e6)
    total_variation: float = numeric(1e-4, "alpha_TV, of the variation.", low=0, high=1e6)
    norm: float = numeric(1e-6, "alpha_2, of the images' length.", low=0, high=1e6)
    batch_norm: float = static(0.1, "alpha_BN, of the batch norms' statistics.", low=0, high=1e6)
    statistics: str = static(
        "running",
        "Whose statistics: the global model's, or the client's.",
        choices=("running", "sent"),
    )
    first: float = numeric(10.0, "Factor of the first batch norm.", low=0, high=1e6)
    consistency: float = numeric(0.0, "alpha_C, of the distance to the mean.", low=0, high=1e6)
    restarts: int = static(
        1, "Starts side by side, of which the lowest loss is kept.", low=1, high=10**6
    )
    labels: str = static(
        "minimum", "Where labels are from.", choices=(*_labels.STRATEGIES, "known")
    )
    snapshots: int = static(0, "Inputs to keep on the way, evenly spaced.", low=0, high=1000)

    def reconstruct(self, key, message, params, task, known):
        slope = _matching.slope_of(message, params, task, known)
        labels = _labels.labels_of(self.labels, slope, params, task, known)
        targets = jax.nn.one_hot(labels, task.num_classes)
        mean, std = _matching.units(task)
        prior = self.statistics_prior(message, params, task, known)
        rate = self._rate()

        def distance(x):
            made = _matching.simulate(params, x * std + mean, targets, task, known)
            return _matching.squared_distance(made, slope)

        def loss(x):
            variation = self.total_variation * _matching.total_variation(x)
            priors = variation + self.norm * _length(x) + prior(x * std + mean)
            return self.matching * distance(x) + priors

        # All restarts are one array [R, n, ...]: their mean couples them.
        def whole(xs):
            total = jax.vmap(loss)(xs).sum()
            apart = jax.vmap(_length)(xs - jax.lax.stop_gradient(xs.mean(axis=0))[None]).sum()
            return total + self.consistency * apart

        begin_key, noise_key = jax.random.split(key)

        def gradient_of(step, xs):
            noise = jax.random.normal(jax.random.fold_in(noise_key, step), xs.shape)
            return jax.grad(whole)(xs) + self.langevin * rate(step) * noise

        shape = (self.restarts, known.count, *task.inputs.shape)
        xs, trail = _search.descend(
            gradient_of,
            jax.random.normal(begin_key, shape),
            optax.adam(rate),
            self.iterations,
            self.snapshots,
            [bound[None] for bound in _matching.limits(task)],
        )
        value = jax.vmap(distance)(xs)
        chosen = jnp.argmin(jnp.nan_to_num(value, nan=jnp.inf))
        trail = None if trail is None else trail[:, chosen]
        return _matching.guess_of(xs[chosen], labels, value[chosen], task, trail)

    def _rate(self):
        decay = optax.cosine_decay_schedule(self.learning_rate, self.iterations)
        if not self.warm_up:
            return decay
        rising = optax.linear_schedule(0.0, self.learning_rate, self.warm_up)
        return optax.join_schedules([rising, decay], [self.warm_up])

    def statistics_prior(self, message, params, task, known):
        """x -> the weighted distance of the batch norms' statistics."""
        observed = task.space.observed
        layers = [one for one in task.space.slices.values() if one.stop <= observed.stop]
        if not self.batch_norm or not layers:
            return lambda x: 0.0
        if self.statistics == "sent" and (known.steps or 1) > 1:
            raise ConfigError(
                f"attack.statistics: 'sent' reads the statistics of one batch, and the client "
                f"takes {known.steps} steps; choose 'running'."
            )
        old = params[observed]
        target = jnp.zeros_like(old) if self.statistics == "running" else message.vector[observed]
        places = sorted(layers, key=lambda place: place.start)
        places = [slice(p.start - observed.start, p.stop - observed.start) for p in places]

        def moved(params, x):
            every = jnp.ones(x.shape[0], bool)
            return task.outputs_and_observed(params, x, every, None)[1]

        # A step moves them by a share of their distance, which is read off a step from elsewhere.
        probe = jnp.zeros((known.count, *task.inputs.shape))
        elsewhere = params.at[observed].add(1.0)
        share = 1.0 - (moved(elsewhere, probe) - moved(params, probe))

        def prior(x):
            apart = (moved(params, x) - old - target) / share
            lengths = jnp.stack([_length(apart[place]) for place in places])
            first = jnp.arange(len(places)) < 2  # its mean and its variance
            return self.batch_norm * jnp.sum(jnp.where(first, self.first, 1.0) * lengths)

        return prior


def _length(x):
    """The L2 norm, whose gradient at 0 is 0."""
    return _matching.root(jnp.sum(x**2))

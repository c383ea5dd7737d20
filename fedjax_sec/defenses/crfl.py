"""CRFL: clipping and smoothing of the global model (Xie et al., ICML 2021)."""

import jax
import jax.numpy as jnp

from fedjax_sec.core import (
    ANY_SCALE,
    COUNT,
    ConfigError,
    Stage,
    numeric,
    registry,
    static,
    trained_part,
    with_statistics,
)
from fedjax_sec.ops.moments import row_norms
from fedjax_sec.ops.precision import wide


@registry.defenses.register("crfl")
class Crfl(Stage):
    r"""Clips the new global model and adds Gaussian noise to it: a stage after aggregation.

    In round t = 1, 2, ..., T, with :math:`w_t` the global model behind the aggregation,

    .. math:: w_t \leftarrow w_t \min(1, \rho_t / \|w_t\|_2), \qquad
              w_t \leftarrow w_t + \mathcal{N}(0, \sigma^2 I) \text{ for } t < T,
              \qquad \rho_t = \min(cap, slope \cdot t + offset)

    The norm is that of all trained parameters together. Running statistics do not count, and get
    neither the factor nor noise. `[D] -> [D]`: the aggregate becomes what takes the server
    to the new model, whatever its learning rate. The last round adds no noise: its model, clipped
    only, is what `fedjax-sec certify RUN` smooths with many draws of noise to say how large a
    backdoor may be that does not change a prediction. T is `rounds`, which an experiment fills with
    its own number; so a run of more rounds is another run unless `rounds` is given. Evaluations
    before the last one see the model that clients get, with its noise. The metrics are
    `crfl/model_norm`, before clipping, and `crfl/clipped`.

    A schedule of one's own for :math:`\rho_t` is `slope: 0` and a schedule over rounds as `offset`.

    Raises: `ConfigError` where the server's step is not a rate times the aggregate, and where
    clients send more than an update of the model.

    Source: Xie, Chen, Chen, Li 2021 (CRFL: certifiably robust federated learning against backdoor
    attacks), clipping and smoothing; of its text only the abstract was at hand. Numbers: the author
    code (AI-secure/CRFL, `main.py`, `configs/mnist_params.yaml`): MNIST with slope 0.1 and offset 2
    (the defaults, with its cap of 15), EMNIST 0.25 and 4, Lending Club loans 0.025 and 2. It
    evaluates each round's model before its noise, and divides by the norm plus 1e-6 when it clips.

    Example:
        >>> import fedjax_sec
        >>> clip = {"name": "crfl", "slope": 0.0, "offset": 1.0, "std": 0.0}
        >>> print(fedjax_sec.aggregate([[4.0, 0.0]], ["mean", clip], params=[-1.0, 4.0]))
        [ 1.6 -3.2]
    """

    stage = "after"
    needs = frozenset({"rate"})
    slope: float = numeric(
        0.1,
        "Growth of rho_t, the largest norm of the model, from round to round.",
        low=0,
        unbounded=ANY_SCALE,
    )
    offset: float = numeric(2.0, "rho_t without its growth.", above=0, unbounded=ANY_SCALE)
    cap: float | None = numeric(15.0, "Largest rho_t (null: none).", above=0, unbounded=ANY_SCALE)
    std: float = numeric(
        0.01, "sigma, standard deviation of the noise.", low=0, unbounded=ANY_SCALE
    )
    rounds: int | None = static(
        None,
        "T, the last round, which adds no noise (null: that of the experiment; there is none in "
        "`fedjax_sec.aggregate`, so noise is added).",
        low=1,
        high=COUNT,
        default_from="rounds",
    )

    def radius(self, index):
        """rho_t, the largest norm of the model, in round number `index` from 0: t = index + 1."""
        radius = self.slope * (index + 1) + self.offset
        return radius if self.cap is None else jnp.minimum(radius, self.cap)

    def apply(self, key, aggregate, updates, state, view):
        if aggregate.shape != view.params.shape:
            raise ConfigError(
                f"defense: crfl clips the model of {view.params.shape[0]} parameters, and clients "
                f"send vectors of {aggregate.shape[0]} numbers; choose another algorithm."
            )
        kind = wide(aggregate.dtype)
        rate = jnp.ones((), kind) if view.rate is None else view.rate
        params = view.params.astype(kind)
        model = params + rate * aggregate.astype(kind)
        learned = model[trained_part(view.space, model.shape[0])]
        norm, radius = row_norms(learned[None])[0], self.radius(view.round)
        clipped = norm > radius
        short = model * jnp.where(clipped, radius / jnp.where(clipped, norm, 1.0), 1.0)
        noise = self.std * jax.random.normal(key, model.shape, kind)
        if self.rounds is not None:
            noise = jnp.where(view.round + 1 == self.rounds, 0.0, noise)
        model = with_statistics(view.space, short + noise, model)
        step = (model - params) / jnp.where(rate == 0, 1.0, rate)
        metrics = {"model_norm": norm, "clipped": clipped.astype(kind)}
        return step.astype(aggregate.dtype), state, metrics

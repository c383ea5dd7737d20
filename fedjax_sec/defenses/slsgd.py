"""SLSGD: a trimmed mean and a moving average (Xie, Koyejo and Gupta, ECML 2019)."""

import jax.numpy as jnp

from fedjax_sec.core import COUNT, Stage, numeric, registry, static
from fedjax_sec.defenses._bounds import check_num_byzantine
from fedjax_sec.ops import coordinatewise
from fedjax_sec.ops.moments import weighted_mean


@registry.defenses.register("slsgd")
class Slsgd(Stage):
    r"""The global model moves by a share alpha towards the trimmed mean of the clients' models.

    .. math:: w \leftarrow (1 - \alpha) w + \alpha \, \mathrm{TrMean}_b(w_1, \dots, w_n)

    where in every coordinate the b largest and the b smallest values are left out and the others
    count alike. On updates, :math:`w_i - w`, this is alpha times their trimmed mean:
    `updates [K, D] -> [D]`. `num_byzantine` is b; 0 is the paper's option I, the plain mean. alpha
    may follow a schedule over the rounds. `kept` is each client's share of the coordinates that are
    not trimmed. Clients whose update is not finite are left out.

    `convention="fedsecurity"` is FedML's (`slsgd_defense.py`, `trimmed_mean` of `common/utils.py`):
    not coordinates but whole clients are trimmed, the b with the most and the b with the fewest
    *examples* (of equal numbers, by their order in the round), whatever they send; the others count
    by their numbers of examples. With b = 0 that is FedML's option 1.

    Raises: `ConfigError` unless 2 b < K.

    Source: Xie, Koyejo, Gupta 2019, arXiv:1903.06996, Algorithm 1 and Definition 1. alpha = 1 is
    the default of the authors' `slsgd.py`, which multiplies it by 0.5 at epoch 800 (`alpha-decay`):
    `alpha: {schedule: steps, values: {0: 1.0, 800: 0.5}}`.

    Example:
        >>> import fedjax_sec
        >>> updates = [[0.0], [1.0], [2.0], [90.0]]
        >>> print(fedjax_sec.aggregate(updates, "slsgd", num_byzantine=1, alpha=0.5))
        [0.75]
    """

    stage = "aggregate"
    alpha: float = numeric(1.0, "Weight of the new model in the moving average.", low=0, high=1)
    num_byzantine: int | None = static(
        None,
        "b, values left out at each end (default: the threat's num_malicious).",
        low=0,
        high=COUNT,
        default_from="num_malicious",
    )
    convention: str = static(
        "paper",
        "`fedsecurity`: trims clients by their numbers of examples.",
        choices=("paper", "fedsecurity"),
    )

    @property
    def symmetric(self):
        return self.convention == "paper"

    def check(self, path, setting):
        clients = setting.num_clients
        largest = (clients - 1) // 2
        check_num_byzantine(path, "slsgd", self.num_byzantine, clients, largest, "2 f < K")

    def idle(self, setting):
        return "slsgd with alpha = 0 never moves the model." if self.alpha == 0 else None

    def apply(self, key, updates, state, view):
        if self.convention == "paper":
            center, kept = coordinatewise.trimmed_mean(updates, view.valid, self.num_byzantine)
        else:
            count = view.valid.sum()
            trimmed = jnp.minimum(self.num_byzantine, jnp.maximum(count - 1, 0) // 2)
            examples = jnp.where(view.valid, view.weights, jnp.inf)
            place = jnp.argsort(jnp.argsort(examples, stable=True))
            inside = view.valid & (place >= trimmed) & (place < count - trimmed)
            center = weighted_mean(updates, jnp.where(inside, view.weights, 0.0))
            kept = inside.astype(updates.dtype)
        return jnp.asarray(self.alpha, updates.dtype) * center, state, {"kept": kept}

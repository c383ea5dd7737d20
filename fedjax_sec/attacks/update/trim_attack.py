"""Trim attack: values just outside the honest ones, against the server's direction."""

import jax
import jax.numpy as jnp

from fedjax_sec.attacks.update._directed import away, beyond, direction, own_update_alone, sees_all
from fedjax_sec.core import ConfigError, UpdateAttack, numeric, registry, static


@registry.attacks.register("trim_attack")
class TrimAttack(UpdateAttack):
    r"""Pushes every coordinate past the honest clients' extreme, against where the model is going.

    With s the sign of the mean update without an attack, and the honest clients' least and greatest
    value of a coordinate, w_min and w_max, a malicious client draws, for every coordinate anew,

    .. math:: s = -1: \; [w_{max}, b\, w_{max}] \text{ if } w_{max} > 0, \text{ else }
              [w_{max}, w_{max} / b]; \qquad
              s = 1: \; [w_{min} / b, w_{min}] \text{ if } w_{min} > 0, \text{ else }
              [b\, w_{min}, w_{min}]

    uniformly, when `threat.knowledge` is `omniscient` (full knowledge). With partial knowledge,
    mu and sigma being over the malicious clients' own updates,

    .. math:: s = -1: \; [\mu + 3 \sigma, \mu + 4 \sigma]; \qquad
              s = 1: \; [\mu - 4 \sigma, \mu - 3 \sigma].

    `updates [K, D] -> [K, D]`. It is built against the coordinate-wise trimmed mean and median.

    Raises: `ConfigError` unless 3 and 4, or what replaces them, are in order; when the adversary
    sees a single update, since it would send just that.

    Source: Fang, Cao, Jia, Gong 2020 (Local model poisoning attacks), Section 4.3, on local models,
    b = 2. `convention="author"` is FLTrust's released code (`byzantine.py`): the values are updates
    instead of models, the extremes are over all clients, the malicious ones' own included, and a
    value is divided or multiplied by a number drawn from [1, b].

    Example:
        >>> import fedjax_sec
        >>> updates = [[0.0], [2.0], [5.0]]
        >>> mask = [True, False, False]
        >>> sent = fedjax_sec.attack(updates, "trim_attack", malicious=mask, knowledge="omniscient")
        >>> bool((sent[0] >= 1.0).all() and (sent[0] <= 2.0).all())
        True
    """

    b: float = numeric(2.0, "Largest factor beyond the honest extreme.", low=1, high=1e6)
    near: float = numeric(
        3.0, "Partial knowledge: least distance in standard deviations.", low=0, high=1e6
    )
    far: float = numeric(4.0, "Partial knowledge: greatest distance.", low=0, high=1e6)
    convention: str = static(
        "paper", "Models and honest extremes, or as the `author` code.", choices=("paper", "author")
    )

    def check(self, path, setting):
        if self.near > self.far:
            raise ConfigError(
                f"{path}.far must be >= near = {self.near}, got {self.far}: the value is drawn "
                f"between them."
            )

    def idle(self, setting):
        return own_update_alone(self.registered_name, setting)

    def apply(self, key, updates, state, view):
        sign = direction(updates, view)
        chance = jax.random.uniform(key, updates.shape, updates.dtype)
        crafted = jnp.where(
            sees_all(view),
            beyond(updates, view, sign, chance, self.b, self.convention),
            away(updates, view, sign, chance, self.near, self.far),
        )
        return crafted, state, {}

"""Reconstruction of a client's examples by a curious server."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedjax_sec.core import (
    COUNT,
    ConfigError,
    Known,
    Monitor,
    component,
    registry,
    static,
    value_of,
)


@registry.monitors.register("reconstruction")
class Reconstruction(Monitor):
    r"""How well a privacy attack reconstructs the examples of one client from its message.

    The attack gets the message that the client at position `victim` of the round sent, the global
    parameters before the round, and the numbers of the protocol: rate (of plain SGD), steps, batch
    size and number of classes. It knows no example. Its guesses :math:`\hat x_b` are matched to the
    client's examples :math:`x_j`, each to another one, so that the sum of the errors is smallest:

    .. math:: e_{bj} = \frac{\|\hat x_b - x_j\|}{\|x_j\|}, \qquad
              relative\_error = \min_\sigma \frac{1}{B} \sum_b e_{b \sigma(b)}

    `label_rate` is the share of guesses whose label is that of its match. Metrics:
    `reconstruction/relative_error` and `reconstruction/label_rate`; NaN in a round in which the
    victim sent nothing. Truth are all examples of the client, of which those of its batches are a
    part, so with a batch smaller than the client's data a guess may meet one that was not used. All
    of them are fetched at once: [M, ...] in memory.

    Raises: `ConfigError` for a victim beyond the K clients, a client without a fixed batch size,
    and a batch larger than the client's data.

    Source: the optimal assignment (Hungarian algorithm) is optax's; comparing by it is a choice,
    since a batch has no order (Zhu et al. 2019, Deep leakage from gradients, Section 4.3).

    Example:
        >>> import fedjax_sec
        >>> config = {
        ...     "data": {"num_clients": 5, "max_train": 5},
        ...     "model": "logistic_regression",
        ...     "client": {"steps": 1, "batch_size": 1},
        ...     "evaluation": {"monitors": {"name": "reconstruction"}},
        ...     "rounds": 1,
        ... }
        >>> result = fedjax_sec.run(config)
        >>> bool(result.metrics["reconstruction/relative_error"][-1] < 1e-3)
        True
    """

    attack: Any = component("privacy_attack", "linear_inversion", "What reconstructs.")
    victim: int = static(0, "Position of the client in the round.", low=0, high=COUNT)
    when: str = static(
        "last",
        "Rounds in which it looks: `every`, or the `last` before an evaluation.",
        choices=("last", "every"),
    )
    inputs = frozenset({"pixels", "features"})
    needs_labels = True

    def check(self, path, setting):
        if self.victim >= setting.num_clients:
            raise ConfigError(
                f"{path}.victim must be < {setting.num_clients}, the clients of a round, got "
                f"{self.victim}."
            )

    def observe(self, key, state, trace, task):
        known = known_of(trace.client, task.num_classes)
        data = trace.data(self.victim)
        if known.batch > data.capacity:
            raise ConfigError(
                f"evaluation.monitors: 'reconstruction' guesses {known.batch} examples, a batch, "
                f"and no client holds more than {data.capacity}."
            )
        message = jax.tree.map(lambda leaf: leaf[self.victim], trace.sent)
        x, y = self.attack.reconstruct(key, message, trace.before, task, known)
        places = jnp.arange(data.capacity)
        true_x, true_y = data.fetch(jnp.minimum(places, jnp.maximum(data.count - 1, 0)))
        error, right = compare(x, y, true_x, true_y, places < data.count)
        there = trace.present[self.victim] & (data.count > 0)
        metrics = {"relative_error": error, "label_rate": right}
        return state, {name: jnp.where(there, value, jnp.nan) for name, value in metrics.items()}


def known_of(client, classes: int) -> Known:
    """The numbers of the protocol by which a client trains."""
    batch = value_of(client, "batch_size")
    if batch is None:
        raise ConfigError(
            f"evaluation.monitors: 'reconstruction' needs clients with a batch_size, and "
            f"{client.registered_name!r} has none."
        )
    optimizer = value_of(client, "optimizer")
    rate = None if optimizer is None else optimizer.rate
    return Known(rate, value_of(client, "steps"), batch, classes)


def compare(x, y, true_x, true_y, there) -> tuple[Any, Any]:
    """(mean relative error, share of right labels) of guesses [B] matched to examples [M].

    Each guess to another example of those `there` [M]; where they are fewer than the guesses, those
    that are left over are matched to nothing and count as wholly wrong.

    >>> true = jnp.array([[1.0], [2.0], [4.0]])
    >>> guess, labels = jnp.array([[2.0], [1.0]]), jnp.array([1, 1])
    >>> error, right = compare(guess, labels, true, jnp.array([0, 1, 2]), jnp.ones(3, bool))
    >>> float(error), float(right)
    (0.0, 0.5)
    """
    guess, truth = x.reshape(x.shape[0], -1), true_x.reshape(true_x.shape[0], -1)
    size = jnp.maximum(jnp.linalg.norm(truth, axis=1), 1e-12)
    distance = jax.vmap(lambda one: jnp.linalg.norm(truth - one[None], axis=1))(guess)
    error = distance / size[None]
    # Beyond every real error, and finite, so that the assignment avoids it where it can.
    worst = 1.0 + jnp.max(jnp.where(there[None], jnp.nan_to_num(error, posinf=0.0), 0.0))
    cost = jnp.where(there[None] & jnp.isfinite(error), error, 1e3 * worst)
    rows, columns = optax.assignment.hungarian_algorithm(cost)
    real = there[columns]
    errors = jnp.where(real, error[rows, columns], 1.0)
    return errors.mean(), (real & (y[rows] == true_y[columns])).mean()

"""Reconstruction of clients' examples by an honest but curious observer."""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_sec.core import (
    COUNT,
    ConfigError,
    Guess,
    Known,
    Monitor,
    component,
    refuse_unread,
    registry,
    static,
    value_of,
)
from fedjax_sec.ops import observers
from fedjax_sec.ops import reconstruction as scores


@registry.monitors.register("reconstruction")
class Reconstruction(Monitor):
    r"""How well a privacy attack reconstructs clients' examples from what an observer sees.

    The attack gets the observer's message of the round, the global parameters before it, and the
    numbers of the protocol: rate (of plain SGD), steps, batch size and number of classes. It knows
    no example. Observers (`fedjax_sec.ops.observers`): the `server`, or an eavesdropper on the
    `uplink`, sees the message that the client at position `victim` of the round sent; with
    `secure_aggregation` the server sees the clients' weighted mean alone. A `client` (at position
    `viewer`) and an eavesdropper on the `downlink` see successive global models, from which they
    know the server's aggregate; a client takes its own part out of it. `merged` is the number of
    clients that the attack takes a mean for: null for all whom the observer cannot tell apart; 1
    behind a rule that chooses one, such as Krum. An attack with `labels: known` gets the labels of
    the victim's first step.

    Its guesses :math:`\hat x_b` are matched to the examples :math:`x_j` of all clients that it saw
    something of, each to another one, so that the sum of the errors is smallest:

    .. math:: e_{bj} = \frac{\|\hat x_b - x_j\|}{\|x_j\|}, \qquad
              relative\_error = \min_\sigma \frac{1}{B} \sum_b e_{b \sigma(b)}

    `label_rate` is the share of guesses whose label is that of its match, `mse` the mean squared
    error of a number, in the units that components see, and for images `psnr` (decibels) and
    `ssim`, means over the matched guesses. Metrics are `reconstruction/NAME`; NaN in a round in
    which the observer saw no example. Truth are all examples of a client, of which those of its
    batches are a part, so with a batch smaller than the client's data a guess may meet one that was
    not used. All of them are fetched at once: [K M, ...] in memory. An attack that gives labels
    alone is scored by `label_recovery`, the share of right labels, counted with multiplicity, where
    the batch is all of the data. With `identify`, `identified` is the share of guesses whose
    nearest example, among those of all the round's clients, is its match.

    Raises: `ConfigError` for a victim beyond the K clients, a client without a fixed batch size,
    a batch larger than the client's data, an observer that sees nothing, and an attack of a
    malicious server, which would change the run (`fedjax-sec reconstruct` runs it beside).

    Source: the optimal assignment (Hungarian algorithm) is optax's; comparing by it is a choice,
    since a batch has no order (Zhu et al. 2019, Deep leakage from gradients, Section 4.3).
    Observers: FedSecurity (Han et al. 2024), Section 2.2.

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
    observer: str = static("server", "Who looks.", choices=tuple(observers.OBSERVERS))
    secure_aggregation: bool = static(False, "The server sees the clients' mean alone.")
    victim: int = static(0, "Position of the client in the round.", low=0, high=COUNT)
    viewer: int = static(0, "Position of the client that looks.", low=0, high=COUNT)
    merged: int | None = static(
        None, "Clients of whose mean the attack takes the message for.", low=1, high=COUNT
    )
    identify: bool = static(
        False, "Look for each guess's nearest example among those of all the round's clients."
    )
    when: str = static(
        "last",
        "Rounds in which it looks: `every`, or the `last` before an evaluation.",
        choices=("last", "every"),
    )
    inputs = frozenset({"pixels", "features", "tokens"})

    def check(self, path, setting):
        for name in ("victim", "viewer"):
            if (value := getattr(self, name)) >= setting.num_clients:
                raise ConfigError(
                    f"{path}.{name} must be < {setting.num_clients}, the clients of a round, got "
                    f"{value}."
                )
        alone = observers.of_one(self.observer, self.secure_aggregation)
        where = f"where the observer {self.observer!r} sees "
        if alone:
            refuse_unread(self, path, ["merged"], f"{where}each client's message")
        else:
            refuse_unread(self, path, ["victim"], f"{where}no client's message by itself")
        if self.observer != "client":
            refuse_unread(self, path, ["viewer"], "where no client looks")
        if self.attack.tampers:
            raise ConfigError(
                f"{path}.attack: {self.attack.registered_name!r} is a malicious server's: it would "
                f"send the clients another model. Run it beside the training: "
                f"`fedjax-sec reconstruct`."
            )
        if self.identify and setting.inputs == "tokens":
            raise ConfigError(f"{path}.identify compares numbers, and the inputs are tokens.")
        if self._knows_labels and not alone:
            raise ConfigError(
                f"{path}.attack.labels: 'known' needs an observer that sees one client's message."
            )

    @property
    def _knows_labels(self) -> bool:
        return value_of(self.attack, "labels") == "known"

    def observe(self, key, state, trace, task):
        data = trace.data(self.victim)
        secure, victim = self.secure_aggregation, self.victim
        view = observers.view(trace, self.observer, secure, victim, self.viewer)
        clients = trace.present.shape[0]
        if observers.of_one(self.observer, self.secure_aggregation):
            merged, seen = 1, jnp.asarray([self.victim])
        else:
            merged = self.merged or clients - (self.observer == "client")
            seen = jnp.arange(clients)
        known = known_of(trace.client, task)
        if known.batch > data.capacity:
            raise ConfigError(
                f"evaluation.monitors: 'reconstruction' guesses {known.batch} examples, a batch, "
                f"and no client holds more than {data.capacity}."
            )
        known = known._replace(clients=merged)
        places = jnp.arange(data.capacity)

        def examples(client):
            one = trace.data(client)
            x, y = one.fetch(jnp.minimum(places, jnp.maximum(one.count - 1, 0)))
            return x, y, places < one.count

        def examples_of(seen):
            """Of these clients: inputs [..., *shape], targets, and which of them are there."""
            together = jax.lax.map(examples, seen)
            return tuple(leaf.reshape(-1, *leaf.shape[2:]) for leaf in together)

        x, y, there = examples_of(seen)
        there &= jnp.repeat(view.members[seen], data.capacity)
        if self._knows_labels:
            drawn = trace.drawn(self.victim, 0)
            position = places[: known.count] if drawn is None else drawn[0]
            known = known._replace(labels=data.fetch(position)[1])
        blind = observers.blinded(task)
        guess = Guess(*self.attack.reconstruct(key, view.message, trace.before, blind, known))
        metrics = {"label_recovery": scores.label_recovery(guess.y, y, task.num_classes, there)}
        if guess.x is not None:
            metrics |= compare(guess.x, guess.y, x, y, there, task.inputs)
        if self.identify:
            pool, _, held = examples_of(jnp.arange(clients))
            begin = 0 if seen.shape[0] == clients else self.victim * data.capacity
            metrics["identified"] = _identified(guess.x, x, there, pool, held, begin)
        sound = there.any()
        return state, {name: jnp.where(sound, value, jnp.nan) for name, value in metrics.items()}


def _identified(guess, x, there, pool, held, begin: int):
    """The share of guesses whose nearest candidate is the example that they are matched to.

    Candidates are `pool [P, ...]` where `held`; the examples `x [M, ...]` lie there from `begin`.
    """
    flat = guess.reshape(guess.shape[0], -1)
    rows, columns = _matched(flat, x.reshape(x.shape[0], -1), there)
    candidates = pool.reshape(pool.shape[0], -1)
    squares = jnp.sum(candidates**2, axis=1)[None] - 2.0 * flat[rows] @ candidates.T
    nearest = jnp.argmin(jnp.where(held[None], squares, jnp.inf), axis=1)
    return (there[columns] & (nearest == begin + columns)).mean()


def known_of(client, task) -> Known:
    """The numbers of the protocol by which a client trains."""
    batch = value_of(client, "batch_size")
    if batch is None:
        raise ConfigError(
            f"evaluation.monitors: 'reconstruction' needs clients with a batch_size, and "
            f"{client.registered_name!r} has none."
        )
    optimizer, l2 = value_of(client, "optimizer"), value_of(client, "l2")
    rate = None if optimizer is None else optimizer.rate
    observed = task.space.observed
    return Known(
        rate,
        value_of(client, "steps"),
        batch,
        task.num_classes,
        l2=0.0 if l2 is None else l2,
        batch_statistics=observed.stop > observed.start,
    )


def compare(x, y, true_x, true_y, there, inputs) -> dict:
    """The metrics of guesses [B] matched to examples [M].

    Each guess to another example of those `there` [M]; where they are fewer than the guesses, those
    that are left over are matched to nothing and count as wholly wrong.

    >>> from fedjax_sec.core.types import InputSpec
    >>> true = jnp.array([[1.0], [2.0], [4.0]])
    >>> guess, labels = jnp.array([[2.0], [1.0]]), jnp.array([1, 1])
    >>> truth = true, jnp.array([0, 1, 2]), jnp.ones(3, bool)
    >>> metrics = compare(guess, labels, *truth, InputSpec("features", (1,)))
    >>> float(metrics["relative_error"]), float(metrics["label_rate"])
    (0.0, 0.5)
    """
    guess, truth = x.reshape(x.shape[0], -1), true_x.reshape(true_x.shape[0], -1)
    distance, error = _distances(guess, truth)
    rows, columns = _matched(guess, truth, there)
    real = there[columns]
    right = real & (y[rows] == true_y[columns]).reshape(rows.shape[0], -1).all(axis=1)
    metrics = {
        "relative_error": jnp.where(real, error[rows, columns], 1.0).mean(),
        "label_rate": right.mean(),
    }
    if inputs.kind == "tokens":
        same = (guess[rows] == truth[columns]).mean(axis=1)
        return metrics | {"token_rate": jnp.where(real, same, 0.0).mean()}
    metrics["mse"] = scores.mean_where(real, distance[rows, columns] ** 2 / guess.shape[1])
    if scores.is_image(inputs):
        mse = distance[rows, columns] ** 2 / guess.shape[1]
        metrics["psnr"] = scores.mean_where(real, scores.psnr(mse))
        metrics["ssim"] = scores.mean_where(real, scores.ssim(x[rows], true_x[columns]))
    return metrics


def _distances(guess, truth):
    """The distance of every guess (down) to every example, and in units of its length. [B, M]"""
    size = jnp.maximum(jnp.linalg.norm(truth.astype(jnp.float32), axis=1), 1e-12)
    distance = jax.vmap(lambda one: jnp.linalg.norm((truth - one[None]) * 1.0, axis=1))(guess)
    return distance, distance / size[None]


def _matched(guess, truth, there):
    """(rows, columns): each guess and its example, by the least sum of relative errors."""
    return scores.matched(jnp.where(there[None], _distances(guess, truth)[1], jnp.inf))

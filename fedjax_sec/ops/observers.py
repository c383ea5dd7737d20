"""Observers of a round who are honest but curious: what each of them sees of the clients."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from fedjax_sec.core import ConfigError
from fedjax_sec.core.types import BoundTask, Message, RoundTrace
from fedjax_sec.ops.moments import weighted_mean

#: observer -> what it sees.
OBSERVERS = {
    "server": "each client's message; with secure aggregation their weighted mean alone",
    "client": "successive global models, and its own message",
    "uplink": "each client's message on its way; nothing with secure aggregation",
    "downlink": "successive global models",
}


class View(NamedTuple):
    """What an observer knows of the clients' training in a round.

    The message, and of which of the round's clients it holds examples, `members [K]`.
    """

    message: Message
    members: Bool[Array, " K"]


def of_one(observer: str, secure_aggregation: bool) -> bool:
    """Whether the observer sees one client's message by itself.

    Raises: `ConfigError` for one that sees nothing.

    >>> of_one("server", True), of_one("uplink", False)
    (False, True)
    """
    if observer == "uplink" and secure_aggregation:
        raise ConfigError(
            "observer: 'uplink' sees masked messages with secure_aggregation, which tell it "
            "nothing; choose 'server', 'client' or 'downlink', or leave secure_aggregation out."
        )
    return observer in ("server", "uplink") and not secure_aggregation


def blinded(task: BoundTask) -> BoundTask:
    """The task without the functions that give examples, which no observer has."""

    def refuse(*args, **options):
        raise ConfigError(
            "attack: an attack on privacy sees the message, the model and the protocol's numbers, "
            "and no examples."
        )

    return task._replace(example=refuse, auxiliary=refuse)


def view(
    trace: RoundTrace, observer: str, secure_aggregation: bool, victim, viewer: Any = 0
) -> View:
    """What the observer sees in a round; `victim` and `viewer` are positions among its clients.

    A server sees the victim's message as it arrives, and an eavesdropper on the uplink the same.
    With secure aggregation the server sees the clients' weighted mean. A client, and an
    eavesdropper on the downlink, see successive global models, from which they know the step's
    aggregate, the server's optimizer being public; a client takes its own part out of it, as if it
    were a weighted mean.
    """
    weights = jnp.where(trace.present, trace.sent.weight, 0.0)
    total = jnp.maximum(weights.sum(), 1e-30)
    if of_one(observer, secure_aggregation):
        message = jax.tree.map(lambda leaf: leaf[victim], trace.sent)
        return View(message, jnp.arange(weights.shape[0]) == victim)
    if observer == "server":
        mean = weighted_mean(trace.sent.vector, weights)
        return View(Message(mean, total), trace.present)
    aggregate = trace.aggregates[-1]
    if observer == "downlink":
        return View(Message(aggregate, total), trace.present)
    rest = jnp.maximum(total - weights[viewer], 1e-30)
    others = (total * aggregate - weights[viewer] * trace.sent.vector[viewer]) / rest
    return View(Message(others, rest), trace.present & (jnp.arange(weights.shape[0]) != viewer))

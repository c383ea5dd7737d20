"""The views of server and adversary, and the draw of a round's clients."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from fedjax_sec import core
from fedjax_sec.core.types import (
    ServerData,
    ServerView,
    State,
)
from fedjax_sec.round.state import Population, Problem


def known_defense(
    defense, key: PRNGKeyArray, view: ServerView, state: State | None, num_clients: int
) -> tuple[Callable, Callable | None]:
    """`defend` and `server_update` of the adversary's view.

    `state` is the defence's where the adversary sees all, None where it does not. Randomness is
    not known to anybody beforehand: `defend` draws its own.
    """
    key = jax.random.fold_in(key, 1 << 16)
    if state is None:
        view = view._replace(weights=jnp.ones_like(view.weights), root=None)

    def defend(updates, guess=None):
        at = state
        if at is None:
            at = defense.init(num_clients, updates.shape[1], view.space)
        root = view.root
        if guess is not None:
            root = ServerData(lambda: guess, _unseen if root is None else root.loss)
        return defense.apply(key, updates, at, view._replace(root=root)).aggregate

    return defend, None if view.root is None else view.root.update


def draw_clients(
    problem: Problem, population: Population, key: PRNGKeyArray, attacked: Array
) -> Int[Array, " K"]:
    """The clients of a round: K of those who hold examples, without replacement, or all N.

    Where `problem` fixes the number of malicious ones, an attacked round has exactly so many.
    """
    clients, per_round = problem.num_clients, problem.clients_per_round
    if per_round == clients:
        return jnp.arange(clients)
    ids = jax.random.choice(key, clients, (per_round,), replace=False)
    chance, place = jax.random.uniform(jax.random.fold_in(key, 1), (2, clients))
    if (empty := population.empty) is not None:
        chance = jnp.where(empty, 1.0 + chance, chance)  # they come last, whatever they draw
        ids = jnp.where(jnp.any(empty), jnp.argsort(chance)[:per_round], ids)
    if (number := problem.malicious_per_round) is not None:
        bad = _ranks(jnp.where(population.malicious, chance, 3.0)) < number
        good = _ranks(jnp.where(population.malicious, 3.0, chance)) < per_round - number
        fixed = jnp.argsort(jnp.where(bad | good, place, 2.0))[:per_round]
        ids = jnp.where(attacked, fixed, ids)
    return ids


def _ranks(values):
    """Each value's place in ascending order."""
    return jnp.argsort(jnp.argsort(values))


def _unseen(params):
    raise core.ConfigError(
        "attack: the defence evaluates clients on the server's own examples, and this adversary "
        "does not see the loss on the server's examples; only one with knowledge 'omniscient' does."
    )


def known_weights(
    counts: Int[Array, " K"], malicious: Bool[Array, " K"], visible: Bool[Array, " K"]
) -> Float[Array, " K"]:
    """`weights` of the adversary's view: for those that it does not see the mean of its own.

    >>> bad = jnp.array([True, False])
    >>> print(known_weights(jnp.array([3, 9]), bad, visible=bad))
    [3. 3.]
    """
    weights = counts.astype(jnp.float32)
    mean = jnp.sum(jnp.where(malicious, weights, 0.0)) / jnp.maximum(malicious.sum(), 1)
    return jnp.where(visible, weights, mean)

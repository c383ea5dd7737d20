"""The clients of a round: who takes part, and who of them is malicious."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from fedjax_sec.core.random import Stream, stream
from fedjax_sec.round.state import Population, Problem, Replica


class Participants(NamedTuple):
    """The clients `ids` of a round and their numbers of examples `counts`.

    `present` are those that take part; nobody is malicious in a round that is not `attacked`.
    """

    ids: Int[Array, " K"]
    counts: Int[Array, " K"]
    present: Bool[Array, " K"]
    malicious: Bool[Array, " K"]
    honest: Bool[Array, " K"]
    attacked: Bool[Array, ""]


def participants(
    problem: Problem, replica: Replica, key: PRNGKeyArray, index: Array
) -> tuple[Replica, Participants]:
    """The replica with round `index`'s malicious clients, and the round's clients.

    `key` is the round's.
    """
    replica, attacked = adversary_of(problem, replica, key, index)
    population = replica.population
    ids = draw_clients(problem, population, stream(key, Stream.SAMPLE), attacked)
    present = jnp.ones(ids.shape, bool) if population.empty is None else ~population.empty[ids]
    if (dropout := population.dropout) is not None:
        chance = jax.random.uniform(stream(key, Stream.DROPOUT), (problem.num_clients,))
        present &= chance[ids] >= dropout
    malicious = population.malicious[ids]
    who = Participants(
        ids,
        population.counts[ids],
        present,
        malicious & present,
        ~malicious & present,
        attacked,
    )
    return replica, who


def adversary_of(
    problem: Problem, replica: Replica, key: Array, index: Array
) -> tuple[Replica, Array]:
    """The replica with round `index`'s malicious clients, and whether the round is attacked.

    `key` is the round's. In the other rounds nobody is malicious.
    """
    population, attacked = replica.population, jnp.array(True)
    malicious = population.malicious
    if problem.redraw:
        malicious = jax.random.permutation(stream(key, Stream.REDRAW), malicious)
    if population.start is not None and population.every is not None:
        since = index - population.start
        attacked = (since >= 0) & (since % population.every == 0)
        malicious = malicious & attacked
    return replica._replace(population=population._replace(malicious=malicious)), attacked


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

"""Named random streams."""

import enum

import jax
from jaxtyping import PRNGKeyArray


class Stream(enum.IntEnum):
    """Named random streams. Adding one never shifts another, so runs with and without an attack
    share their honest clients' randomness; numbers must never be reused."""

    INIT = 0
    PARTITION = 1
    MALICIOUS = 2
    SAMPLE = 3
    CLIENT = 4
    POISON = 5
    ATTACK = 6
    DEFENSE = 7
    ROOT = 8
    EVASION = 9
    LOCAL_TEST = 10
    DROPOUT = 11
    REDRAW = 12


def stream(key: PRNGKeyArray, name: Stream) -> PRNGKeyArray:
    """The key of one purpose."""
    return jax.random.fold_in(key, int(name))

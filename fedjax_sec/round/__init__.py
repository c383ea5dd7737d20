"""One federated round as a pure function."""

from fedjax_sec.round.adversary import known_defense, known_weights
from fedjax_sec.round.local import poisoned_tests, train_clients
from fedjax_sec.round.participants import adversary_of, draw_clients
from fedjax_sec.round.state import (
    Components,
    Pool,
    Population,
    Problem,
    Replica,
    RoundState,
    backdoor_of,
    init_state,
    make_task,
    setting_of,
)
from fedjax_sec.round.step import run_round

__all__ = [
    "Components",
    "Pool",
    "Population",
    "Problem",
    "Replica",
    "RoundState",
    "adversary_of",
    "backdoor_of",
    "draw_clients",
    "init_state",
    "known_defense",
    "known_weights",
    "make_task",
    "poisoned_tests",
    "run_round",
    "setting_of",
    "train_clients",
]

"""One federated round as a pure function."""

from fedjax_sec.round.local import poisoned_tests, train_clients
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
from fedjax_sec.round.step import adversary_of, run_round
from fedjax_sec.round.views import draw_clients, known_defense, known_weights

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

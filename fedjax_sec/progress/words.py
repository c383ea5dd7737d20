"""How far something is, in numbers and in words."""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedjax_sec.core.registry import headlines

#: Evaluations over which the speed is the mean.
_WINDOW = 20
#: Metrics that are shown beside the task's own, and whether they are shares.
_SHOWN = {"attack_success_rate": True, "loss": False}


class State(NamedTuple):
    """`done` of `total` rounds; `rate` are rounds a second, `left` seconds, None where unknown.

    `title` says what runs, `note` the newest metrics or what is waited for.
    """

    title: str
    done: int
    total: int
    rate: float | None = None
    left: float | None = None
    note: str = ""


class Rate:
    """Rounds a second, over the newest evaluations.

    The time to the second one is left out as soon as there is a third, since programs are compiled
    in it.

    >>> times = iter([0.0, 9.0, 11.0])
    >>> rate = Rate(lambda: next(times))
    >>> [rate.at(done) for done in (0, 10, 20)]
    [None, 1.1111111111111112, 5.0]
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._seen = clock, deque(maxlen=_WINDOW)
        self._compiled = False

    def at(self, done: int) -> float | None:
        """The rate now that so many rounds are done; None where nothing tells it."""
        self._seen.append((self._clock(), done))
        if len(self._seen) == 3 and not self._compiled:
            self._seen.popleft()
            self._compiled = True
        (begin, first), (now, last) = self._seen[0], self._seen[-1]
        return (last - first) / (now - begin) if now > begin and last > first else None


def duration(seconds: float | None) -> str:
    """Seconds in words that fit their accuracy.

    >>> duration(None), duration(0), duration(59.2), duration(3599), duration(90000)
    ('unknown', 'none', '60 s', '60 min', '25 h 0 min')
    """
    if seconds is None:
        return "unknown"
    if seconds <= 0:
        return "none"
    if seconds < 100:
        return f"{-(-seconds // 1):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def speed(rate: float | None) -> str:
    """Rounds a second in words; empty where they are unknown.

    >>> speed(0.051), speed(12.34), speed(1234.5)
    ('0.051 rounds/s', '12.3 rounds/s', '1,234 rounds/s')
    """
    if rate is None:
        return ""
    return f"{rate:,.0f} rounds/s" if rate >= 100 else f"{rate:.3g} rounds/s"


def newest(rows: Sequence[Mapping]) -> str:
    """The headline, attack success and loss of the newest rows, the mean over the runs.

    >>> newest([{"round": 1, "accuracy": 0.5, "loss": 2.0}, {"accuracy": 0.7, "loss": None}])
    'accuracy 60.0%, loss 2'
    """
    parts = []
    for name, share in (dict.fromkeys(headlines(), True) | _SHOWN).items():
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            mean = float(np.mean(values))
            parts.append(f"{name.replace('_', ' ')} {f'{mean:.1%}' if share else f'{mean:.3g}'}")
    return ", ".join(parts)


def sentence(state: State) -> str:
    """A state in one line.

    >>> sentence(State("krum", 20, 100, 4.0, 20.0, "accuracy 91.2%"))
    'krum: round 20/100, 4 rounds/s, 20 s left, accuracy 91.2%'
    """
    ends = state.done >= state.total
    left = "" if state.left is None or ends else f"{duration(state.left)} left"
    parts = [f"round {state.done}/{state.total}", speed(state.rate), left, state.note]
    head = f"{state.title}: " if state.title else ""
    return head + ", ".join(filter(None, parts))

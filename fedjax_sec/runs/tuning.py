"""How local training is computed on this machine: measured once for each shape, and remembered."""

import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax

from fedjax_sec.core import ConfigError, files, suggestion
from fedjax_sec.core.advice import shown
from fedjax_sec.core.caching import cache_folder, usable_cores
from fedjax_sec.ops.backend import on_cpu
from fedjax_sec.ops.client_axis import rule_strategy
from fedjax_sec.ops.convolution import POOLING, rule_lowering

#: Raised whenever a change of the code makes candidates faster or slower: kept times are old then.
GENERATION = 2

#: Clients side by side where `chunked` is tried.
CHUNK = 8

#: A rival must be this much faster than the rule's choice: nearly equal ones would alternate.
CLEARLY = 0.9
#: A candidate whose first call takes this many times the best one's is not timed again.
HOPELESS = 3.0

#: Values of `FEDJAX_SEC_TUNING`.
SWITCHES = {
    **dict.fromkeys(("on", "1", "true"), True),
    **dict.fromkeys(("off", "0", "false"), False),
    "": None,
}

#: What a candidate takes to be compiled and timed on a CPU, in seconds, without convolutions and
#: with them, and the part of the training that the fastest saves: rough numbers, and choices.
CANDIDATE_SECONDS, CONVOLUTION_SECONDS, SAVED = 2.5, 10.0, 0.25


class Choice(NamedTuple):
    """One way to compute local training; changes results by rounding only.

    `clients` and `chunk` as in `fedjax_sec.ops.client_axis`, `convolution` as in
    `fedjax_sec.ops.convolution` (None for networks without).
    """

    clients: str
    chunk: int | None = None
    convolution: str | None = None

    def __str__(self):
        layout = f"{self.clients}({self.chunk})" if self.chunk else self.clients
        return f"{layout}, {self.convolution}" if self.convolution else layout


class Tuning(NamedTuple):
    """The choice, and the milliseconds of every candidate; none where nothing was measured.

    `optimization` is the level at which a CPU's compiler optimises; None is XLA's own. `waiting` is
    how many times as many local steps each candidate computes as the clients take, where they take
    unequal numbers (None: they do not); the choice is the smallest product with the milliseconds.
    """

    choice: Choice
    milliseconds: dict[str, float]
    optimization: int | None = None
    waiting: dict[str, float] | None = None

    def to_dict(self) -> dict:
        """The content of the summary and of `execution.json`."""
        rest = {"milliseconds": self.milliseconds, "optimization": self.optimization}
        return self.choice._asdict() | rest | {"waiting": self.waiting}

    @classmethod
    def from_dict(cls, content: Mapping) -> "Tuning":
        """The inverse of `to_dict`.

        >>> one = Tuning(Choice("map", None, "patches"), {"map, patches": 3.0}, 2)
        >>> Tuning.from_dict(one.to_dict()) == one
        True
        """
        choice = Choice(*(content[name] for name in Choice._fields))
        level = content.get("optimization")  # a run of before 0.2 has none: XLA's own
        return cls(choice, dict(content["milliseconds"]), level, content.get("waiting"))


def candidates(
    clients: str,
    chunk: int | None,
    convolution: str | None,
    num_clients: int,
    lowerings: Sequence[str] = POOLING,
    deep: bool = False,
) -> list[Choice]:
    """All ways that the fields `execution` and `model.convolution` leave open, the rule's first.

    `sharded` is never a candidate, since how many devices a run shall take is the user's to say;
    where it is asked for, the rule decides the rest. Nor is XLA's own convolution on a CPU, whose
    gradients for several kernels are many times slower than all others, nor `chwn` elsewhere, which
    gains on a CPU. `convolution` is None for networks without; `lowerings` are those that the
    network's own field allows. Of a `deep` network on a CPU the rule decides the layout: each
    candidate takes long to compile, and clients one after another were as fast as others.
    `num_clients` are those that are measured.

    >>> candidates("map", None, None, 51)
    [Choice(clients='map', chunk=None, convolution=None)]
    """
    convolves = convolution is not None
    by_rule = Choice(
        rule_strategy(convolves) if clients == "auto" else clients,
        chunk,
        rule_lowering(lowerings) if convolution == "auto" else convolution,
    )
    if clients == "sharded":
        return [by_rule]
    if convolution == "auto":
        hopeless = "xla" if on_cpu() else "chwn"
        lowerings = [one for one in lowerings if one != hopeless]
    else:
        lowerings = [convolution]
    layouts = (("vmap", None), ("map", None)) if clients == "auto" else ((clients, chunk),)
    if deep and on_cpu():
        layouts = (by_rule[:2],)
    options = [Choice(*how, lowering) for lowering in lowerings for how in layouts]
    if clients == "auto" and num_clients > CHUNK and len(layouts) > 1:
        options.append(Choice("chunked", CHUNK, by_rule.convolution))
    return sorted(options, key=lambda choice: choice != by_rule)


#: Milliseconds of the candidates for each key: a cache, for folders that cannot be written.
_measurements: dict[str, dict[str, float]] = {}


def switched() -> bool | None:
    """Whether `FEDJAX_SEC_TUNING` switches measuring on or off; None: it is left to us.

    Raises: `ConfigError` for a value that says neither.
    """
    said = os.environ.get("FEDJAX_SEC_TUNING", "")
    if said.lower() not in SWITCHES:
        known = [word for word in SWITCHES if word]
        raise ConfigError(
            f"FEDJAX_SEC_TUNING: expected one of {', '.join(known)}, got {shown(said)}."
            f"{suggestion(said, known)}"
        )
    return SWITCHES[said.lower()]


def is_worth_measuring(options: Sequence[Choice], seconds: float) -> bool:
    """Whether the fastest option saves more of so many seconds of training than measuring takes.

    Decided on a CPU alone: elsewhere a measurement also says which ways fit the memory.

    >>> ways = [Choice("map", None, "patches"), Choice("map", None, "rows")]
    >>> [is_worth_measuring(ways, seconds) for seconds in (60.0, 600.0)]
    [False, True]
    """
    if not on_cpu():
        return True
    one = CONVOLUTION_SECONDS if options[0].convolution else CANDIDATE_SECONDS
    return SAVED * seconds > one * len(options)


def tune(
    candidates: Sequence[Choice],
    shape: Mapping,
    measure: Callable[[Choice], Callable | None],
    before: Callable[[], object] = lambda: None,
    waiting: Callable[[Choice], float] = lambda choice: 1.0,
) -> Tuning:
    """The fastest candidate for this shape of work on this machine.

    Args:
        candidates: the rule's choice first; it stays unless another is clearly faster.
        shape: everything that the times depend on, beside the machine, jax and `GENERATION`: the
            key under which they are kept in the cache folder, for this and later processes.
        measure: compiles a candidate and gives a function that runs it once and waits; None for
            one that does not fit the memory.
        before: called before anything is measured, so that nothing else runs meanwhile.
        waiting: by what a candidate's time is multiplied, since the clients that are measured take
            equally many steps and those of the run need not.

    >>> tune([Choice("vmap")], {}, measure=None).choice
    Choice(clients='vmap', chunk=None, convolution=None)
    """
    if len(candidates) == 1 or switched() is False:
        return Tuning(candidates[0], {})
    described = {"shape": shape, "candidates": [str(c) for c in candidates], **_machine()}
    text = json.dumps(described, sort_keys=True, default=str)
    key = hashlib.sha256(text.encode()).hexdigest()[:24]
    path = cache_folder() / "tuning" / f"{key}.json"
    if key not in _measurements:
        if (kept := _read(path)) is None:
            before()
            kept = _measured(candidates, measure)
        _measurements[key] = kept
        _write(path, described | {"milliseconds": kept})
    milliseconds = _measurements[key]
    factors = {str(choice): waiting(choice) for choice in candidates}
    unequal = factors if max(factors.values()) > 1 else None
    choice = _fastest(candidates, milliseconds, factors)
    return Tuning(choice, milliseconds, waiting=unequal)


def _fastest(candidates, milliseconds: Mapping, factors: Mapping) -> Choice:
    """The first candidate, unless another takes clearly less time; the first if none fits."""
    times = {
        one: milliseconds[str(one)] * factors[str(one)]
        for one in candidates
        if str(one) in milliseconds
    }
    if not times:
        return candidates[0]
    fastest = min(times, key=times.__getitem__)
    by_rule = times.get(candidates[0], math.inf)
    return fastest if times[fastest] < CLEARLY * by_rule else candidates[0]


def _machine() -> dict:
    device = jax.local_devices()[0]
    return {
        "generation": GENERATION,
        "jax": jax.__version__,
        "device": f"{device.platform} {device.device_kind}",
        "devices": jax.local_device_count(),
        "cores": usable_cores(),
    }


def _measured(candidates, measure, budget: float = 0.3, most: int = 9) -> dict[str, float]:
    """Milliseconds of the candidates that fit, called once to warm up and then in turns.

    In turns, so that a machine whose speed drifts slows all of them alike; one without hope, by its
    first call, is not called again. Where another device computes, all cores compile side by side,
    before anything is timed.
    """
    first, calls = {}, {}
    for candidate, call in zip(candidates, _side_by_side(measure, candidates), strict=True):
        if call is not None:
            first[candidate], calls[candidate] = _once(call), call
            best = min(first.values())
            calls = {one: call for one, call in calls.items() if first[one] <= HOPELESS * best}
    seconds = {candidate: [] for candidate in calls}
    for _ in range(most):
        for candidate, call in calls.items():
            seconds[candidate].append(_once(call))
        if sum(map(sum, seconds.values())) > budget * len(calls):
            break
    return {
        str(candidate): 1e3 * statistics.median(seconds.get(candidate, [once]))
        for candidate, once in first.items()
    }


def _side_by_side(measure, candidates):
    if on_cpu():  # compiling would disturb the timing, and one after another needs less memory
        return map(measure, candidates)
    with ThreadPoolExecutor(min(usable_cores(), len(candidates))) as threads:
        return list(threads.map(measure, candidates))


def _once(call: Callable) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _read(path) -> dict[str, float] | None:
    try:
        kept = json.loads(path.read_text())["milliseconds"]
        return {str(name): float(value) for name, value in kept.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write(path, content: Mapping) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.remove_stale(path.parent)
        files.write_atomically(path, json.dumps(content, indent=2, default=str) + "\n")
    except OSError:
        pass  # a folder that cannot be written: this process remembers by itself

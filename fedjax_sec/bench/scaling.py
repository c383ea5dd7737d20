"""How time grows with K, D, the batch size, and the number of seeds in a sweep."""

import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sec.api import _aggregate
from fedjax_sec.bench.aggregators import arguments, rules
from fedjax_sec.bench.busy import busy_share
from fedjax_sec.bench.rounds import lasting_program, workloads
from fedjax_sec.bench.timing import Case, Rates, compiling_anew, take_turns
from fedjax_sec.ops.backend import on_cpu
from fedjax_sec.runs import config as config_lib
from fedjax_sec.runs.experiment import train
from fedjax_sec.runs.prepare import make_replicas, prepare

RULES = ("mean", "median", "trimmed_mean", "near_median", "krum", "bulyan", "geometric_median")
CLIENTS = (10, 20, 51, 100, 200)
DIMS = (10_000, 80_000, 300_000, 1_000_000)
BATCHES = (8, 16, 32, 83, 166)
SEEDS = (1, 4, 16)
CELLS, CELL_ROUNDS = (1, 16, 64, 256), 50
MLP = {
    "data": {"name": "digits", "num_clients": 20},
    "client": {"name": "sgd", "steps": 1, "batch_size": 32},
    "threat": {"num_malicious": 4},
    "attack": {"name": "alie", "z": 1.5},
    "defense": {"name": "krum", "num_byzantine": 4},
    "rounds": 300,
    "evaluation": {"every": 50},
}


def run(rates: Rates, only: Sequence[str] = (), repeats: int = 5, data_dir=None) -> Iterator[dict]:
    """Rows of all sweeps over a size; `only` names some of `K`, `D`, `batch`, `seeds`, `cells`."""
    parts = {
        "K": lambda: _stacks("K", [(k, 80_000) for k in CLIENTS], rates, repeats),
        "D": lambda: _stacks("D", [(51, d) for d in DIMS], rates, repeats),
        "batch": lambda: _batches(rates, repeats, data_dir),
        "seeds": lambda: _seeds(repeats),
        "cells": lambda: _cells(repeats, data_dir),
    }
    for name, part in parts.items():
        if not only or name in only:
            yield from part()


def _stacks(axis, shapes, rates, repeats) -> list[dict]:
    rows = []
    for num_rows, dim in shapes:
        stack = jnp.asarray(
            np.random.default_rng(0).normal(size=(num_rows, dim)).astype(np.float32)
        )
        known = rules(num_rows, dim)
        cases = []
        for name in RULES:
            args = arguments(known[name].defense, stack)
            function = _aggregate.lower(*args).compile()
            cases.append(Case(name, lambda f=function, a=args: f(*a).block_until_ready()))
        for name, timing in take_turns(cases, repeats).items():
            limit = rates.seconds(known[name].flops, 4 * (num_rows + 1) * dim)
            rows.append(
                {
                    "over": axis,
                    "K": num_rows,
                    "D": dim,
                    "rule": name,
                    "ours ms": 1e3 * timing.median,
                    "limit ms": 1e3 * limit,
                }
            )
    return rows


def _batches(rates, repeats, data_dir) -> list[dict]:
    rows = []
    for model, products in (("mlp", 79_400), ("fltrust_cnn", 1_942_020)):
        for batch in BATCHES if model == "mlp" else BATCHES[:3]:
            spec = {
                "data": {"name": "mnist", "num_clients": 51, "data_dir": data_dir},
                "model": model,
                "client": {"name": "sgd", "steps": 1, "batch_size": batch},
                "defense": {"name": "mean", "weighted": False},
                "rounds": 2,
                "evaluation": {"every": 2, "diagnostics": False},
            }
            experiment = config_lib.from_mapping(spec)
            prepared = prepare(experiment)
            program = lasting_program([prepared])
            replicas = make_replicas([prepared])
            state = [program.init(replicas)]

            def call(program=program, replicas=replicas, state=state):
                state[0], _ = program.advance(state[0], replicas, 0, 2)
                jax.block_until_ready(state[0])

            timing = take_turns([Case("ours", call)], repeats, at_most=20.0)["ours"]
            rows.append(
                {
                    "over": "batch",
                    "model": model,
                    "K": 51,
                    "B": batch,
                    "ours ms": 1e3 * timing.median / 2,
                    "limit ms": 1e3 * rates.seconds(6.0 * products * 51 * batch, 0.0),
                    "computed as": str(program.tuning.choice),
                }
            )
    return rows


def _seeds(repeats) -> list[dict]:
    """Sweeps of seeds in one program against runs one after another, compilation included.

    Twice: all compile anew, the single runs each time; and with the cache of compiled programs,
    from which all but the very first run read theirs.
    """
    specs = [MLP | {"seed": seed} for seed in range(max(SEEDS))]
    experiments = [prepare(config_lib.from_mapping(spec)) for spec in specs]
    train([experiments[0]])  # reads the data, and compiles for the cache
    rows = []
    for size in SEEDS:
        some = experiments[:size]
        seconds: dict[str, list[float]] = {}
        for _ in range(-(-repeats // 2)):
            with compiling_anew():
                seconds.setdefault("one sweep s", []).append(_seconds(lambda s=some: train(s)))
                seconds.setdefault("one after another s", []).append(_singly(some))
            seconds.setdefault("cached, one sweep s", []).append(_seconds(lambda s=some: train(s)))
            seconds.setdefault("cached, one after another s", []).append(_singly(some))
        median = {name: float(np.median(values)) for name, values in seconds.items()}
        rows.append(
            {
                "over": "seeds",
                "seeds": size,
                **median,
                "faster": median["one after another s"] / median["one sweep s"],
                "cached, faster": (
                    median["cached, one after another s"] / median["cached, one sweep s"]
                ),
            }
        )
    return rows


def _cells(repeats, data_dir) -> Iterator[dict]:
    """Rounds of ALIE's perceptron on MNIST for many cells (seeds x z) in one program."""
    base = workloads(data_dir)["ALIE MNIST, ALIE, trimmed mean"]
    one = None
    for size in CELLS:
        cells = []
        for cell in range(size):
            changes = {
                "seed": cell // 4,
                "attack.z": 0.5 * (1 + cell % 4),
                "rounds": CELL_ROUNDS,
                "evaluation.every": CELL_ROUNDS,
                "evaluation.diagnostics": False,
            }
            cells.append(prepare(config_lib.from_mapping(base.experiment, changes)))
        with compiling_anew():
            program = lasting_program(cells)
        replicas = make_replicas(cells)
        state = [program.init(replicas)]

        def call(program=program, replicas=replicas, state=state):
            state[0], _ = program.advance(state[0], replicas, 0, CELL_ROUNDS)
            jax.block_until_ready(state[0])

        seconds = take_turns([Case("ours", call)], repeats, at_most=20.0)["ours"].median
        one = one or seconds
        row = {
            "over": "cells",
            "cells": size,
            "ms a round of all": 1e3 * seconds / CELL_ROUNDS,
            "times one cell": seconds / one,
            "cells at once": program.at_once or size,
            "compile s": program.compile_seconds,
        }
        yield row | ({} if on_cpu() else busy_share(call))


def _singly(experiments) -> float:
    return sum(_seconds(lambda one=one: train([one])) for one in experiments)


def _seconds(call) -> float:
    jax.clear_caches()
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin

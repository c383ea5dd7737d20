"""Fixed costs: a round that computes almost nothing, and a process from its start."""

import os
import statistics
import subprocess
import sys
import tempfile
import time

import jax

from fedjax_sec.bench.rounds import lasting_program
from fedjax_sec.bench.timing import Case, take_turns
from fedjax_sec.runs import config as config_lib
from fedjax_sec.runs.prepare import make_replicas, prepare

TRIVIAL = {
    "data": {"name": "digits", "num_clients": 100},
    "model": {"name": "mlp", "hidden": [1]},
    "client": {"name": "sgd", "steps": 1, "batch_size": 1},
}
FIRST_ROUND = """
import sys, fedjax_sec
spec = {"data": {"name": "mnist", "num_clients": 51, "data_dir": sys.argv[1] or None},
        "client": {"name": "sgd", "steps": 1, "batch_size": 83}, "rounds": 1,
        "defense": {"name": "krum", "num_byzantine": 12}}
fedjax_sec.run(spec)
"""


def run(repeats: int = 5, data_dir: str | None = None) -> list[dict]:
    """A row for the trivial round and one for each start of a process."""
    return [_trivial_round(repeats), *_starts(max(repeats // 2, 3), data_dir)]


def _trivial_round(repeats, rounds=200) -> dict:
    experiment = config_lib.from_mapping(
        TRIVIAL | {"rounds": rounds, "evaluation": {"every": rounds, "diagnostics": False}}
    )
    prepared = prepare(experiment)
    program = lasting_program([prepared])
    replicas = make_replicas([prepared])
    state = program.init(replicas)

    def call():
        nonlocal state
        state, _ = program.advance(state, replicas, 0, rounds)
        jax.block_until_ready(state)

    timing = take_turns([Case("ours", call)], repeats)["ours"]
    return {"what": "a round of a trivial model, 100 clients", "ms": 1e3 * timing.median / rounds}


def _starts(repeats, data_dir) -> list[dict]:
    """From the start of a process to the end of its first round, evaluated before and after.

    The first start finds an empty cache and so decodes the data and compiles; the second finds all
    of it.
    """
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"FEDJAX_SEC_CACHE": folder}

        def start():
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-c", FIRST_ROUND, data_dir or ""], env=env, check=True)
            return 1e3 * (time.perf_counter() - begin)

        first = start()
        return [
            {"what": "process start to the first finished round, first start", "ms": first},
            {
                "what": "process start to the first finished round, second start",
                "ms": statistics.median(start() for _ in range(repeats)),
            },
        ]

"""Rounds per second and compile time of ALIE's MNIST experiment, for every defence.

    python benchmarks/alie_rounds.py --out benchmarks/results/alie_rounds_cpu.json

The cases take turns (A B C A B C ...) in one process, so that a drifting machine speed hits all
alike; medians are reported. Each case is the paper's setting: 51 workers, 12 corrupted, batch 83,
784-100-10. Needs MNIST (see the README).
"""

import datetime
import json
import statistics
import time
from pathlib import Path
from typing import Annotated

import jax
import pandas as pd
import typer

from fedjax_sec import cli, results
from fedjax_sec import config as config_lib
from fedjax_sec.experiment import Program
from fedjax_sec.papers import alie

CONFIG = Path(__file__).parents[1] / "configs" / "alie" / "mnist.yaml"
ATTACKS = {"no attack": None, "ALIE z = 1.5": {"name": "alie", "z": 1.5}}


def main(
    out: Annotated[Path, typer.Option(help="JSON file for the results.")],
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in one timed scan.")] = 15,
    repeats: Annotated[int, typer.Option(min=3, help="Timed scans of every case.")] = 7,
    data_dir: cli.DataDir = None,
) -> None:
    """Time every defence with and without the attack."""
    changes = {"evaluation.every": rounds, "rounds": rounds, **cli.data_overrides(data_dir)}
    cases = {}
    for attack_name, attack in ATTACKS.items():
        for defense_name, defense in (alie.DEFENSES | {"Median": "median"}).items():
            change = {**changes, "attack": attack, "defense": defense}
            experiment = config_lib.load(CONFIG, change)
            program = Program(experiment).prepare([experiment])
            replicas, _ = program.replicas([experiment])
            state, _ = program.advance(program.init(replicas), replicas, 0, rounds)
            cases[attack_name, defense_name] = [program, replicas, state, []]
    for repeat in range(1, repeats + 1):
        for case in cases.values():
            program, replicas, state, seconds = case
            begin = time.perf_counter()
            state, _ = program.advance(state, replicas, repeat * rounds, rounds)
            jax.block_until_ready(state)
            seconds.append((time.perf_counter() - begin) / rounds)
            case[2] = state
    rows = [
        {
            "attack": attack_name,
            "defense": defense_name,
            "rounds per second": 1 / statistics.median(seconds),
            "median ms a round": 1e3 * statistics.median(seconds),
            "fastest ms": 1e3 * min(seconds),
            "slowest ms": 1e3 * max(seconds),
            "compile seconds": program.compile_seconds,
        }
        for (attack_name, defense_name), (program, _, _, seconds) in cases.items()
    ]
    report = {
        "command": f"python benchmarks/alie_rounds.py --rounds {rounds} --repeats {repeats}",
        "date": datetime.date.today().isoformat(),
        "rows": rows,
        **results.environment(),
    }
    out.write_text(json.dumps(report, indent=2) + "\n")
    print(pd.DataFrame(rows).to_markdown(index=False, floatfmt=".1f"))


if __name__ == "__main__":
    typer.run(main)

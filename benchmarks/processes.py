"""How fast the same rounds are from one process to the next, and for each way to allocate memory.

    git worktree add ../before REVISION
    python benchmarks/processes.py before=../before after=. --out OUT.json

Rounds of FLTrust's CNN (20 clients, one batch of 32 each, FedAvg) in fresh processes, the trees,
lowerings and settings of the C library taking turns. Needs MNIST (`TFDS_DATA_DIR`).
"""

import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from fedjax_sec.bench import report, timing

CONFIG = "configs/fltrust/mnist-0.5.yaml"
CHANGES = (
    "rounds=20",
    "evaluation.every=10",
    "data.max_test=2000",
    "data.num_clients=20",
    "client.optimizer.learning_rate=0.096",
    "threat.num_malicious=0",
    "attack=null",
    "defense=mean",
    "server.root=null",
)
LOWERINGS = ("patches", "polyphase")
SETTINGS = {
    "as it comes": None,
    "one heap": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.arena_max=1:"
    "glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456",
}


def rate(tree: Path, lowering: str, tunables: str | None) -> float:
    """Rounds a second, without compilation, in a process of its own."""
    env = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    env |= {"PYTHONPATH": str(tree.resolve()), "FEDJAX_SEC_TUNING": "off", "JAX_PLATFORMS": "cpu"}
    env |= {"FEDJAX_SEC_COMPILATION_CACHE": "off"}
    if tunables:
        env["GLIBC_TUNABLES"] = tunables
    with tempfile.TemporaryDirectory() as out:
        command = [
            *(Path(sys.executable).with_name("fedjax-sec"), "run", CONFIG, "--out", out),
            *(*CHANGES, f"model={{name: fltrust_cnn, convolution: {lowering}}}"),
        ]
        subprocess.run(command, cwd=tree, env=env, check=True, capture_output=True)
        summary = json.loads(next(Path(out).rglob("summary.json")).read_text())
    return summary["rounds_per_second"]


def main(
    trees: Annotated[list[str], typer.Argument(help="LABEL=FOLDER of a checkout.")],
    out: Annotated[Path, typer.Option(help="The JSON file.")],
    processes: Annotated[int, typer.Option(min=1, help="Processes of each kind.")] = 5,
) -> None:
    """Measures and writes the file."""
    folders = dict(tree.split("=", 1) for tree in trees)
    cases = list(itertools.product(folders, LOWERINGS, SETTINGS))
    rates = {case: [] for case in cases}
    for _ in range(processes):
        for label, lowering, setting in cases:
            per_second = rate(Path(folders[label]), lowering, SETTINGS[setting])
            rates[label, lowering, setting].append(per_second)
            print(label, lowering, setting, f"{per_second:.1f}", flush=True)
    rows = [
        {
            "code": label,
            "convolutions": lowering,
            "C library": setting,
            "slowest": min(measured),
            "median": float(np.median(measured)),
            "fastest": max(measured),
            "processes": processes,
        }
        for (label, lowering, setting), measured in rates.items()
    ]
    report.write(out, shlex.join(["python", *sys.argv]), timing.measure_machine(), rows)
    print(report.table(rows))


if __name__ == "__main__":
    typer.run(main)

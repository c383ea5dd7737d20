"""A round over one or two processes of this machine: bytes for each process, and time.

    python benchmarks/together.py --out results/together.json

64 clients train a perceptron for one step of 8 examples and the server takes a rule, with
`execution.clients: sharded`. Each line is a number of processes, of devices that XLA makes of the
CPU in each, a rule and a number of parameters: the bytes that a device works with by XLA's account,
the largest resident memory of a process, and the median seconds of a round over `--rounds`. The
parameters after the rounds are compared with those of one process with one device.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

CLIENTS = 64
RULES = {
    "mean": "mean",
    "trimmed_mean": {"name": "trimmed_mean", "num_byzantine": 8},
    "krum": {"name": "krum", "num_byzantine": 8},
}
SHAPES = ((1, 1), (1, 2), (2, 1), (2, 2))


def experiment(rule, width: int) -> dict:
    return {
        "data": {"num_clients": CLIENTS, "max_train": 8 * CLIENTS},
        "model": {"name": "mlp", "hidden": [width]},
        "client": {"name": "sgd", "steps": 1, "batch_size": 8},
        "defense": RULES[rule],
        "execution": {"clients": "sharded"},
        "rounds": 1000,
    }


def measure(spec: dict, rounds: int) -> dict:
    """What one process of several sees."""
    import resource

    import jax
    import numpy as np

    from fedjax_sec.core import distributed
    from fedjax_sec.runs import config
    from fedjax_sec.runs.prepare import make_replicas, prepare
    from fedjax_sec.runs.program import Program

    prepared = [prepare(config.from_mapping(spec))]
    program, replicas = Program(prepared[0]), make_replicas(prepared)
    state = program.init(replicas)
    working, _ = program.needs(state, replicas, 1)
    seconds = []
    for number in range(rounds + 1):
        begin = time.perf_counter()
        state, _ = jax.block_until_ready(program.advance(state, replicas, number, 1))
        seconds.append(time.perf_counter() - begin)
    params = np.asarray(program.params(distributed.local(state), replicas))[0]
    return {
        "parameters": int(params.size),
        "device MiB": working / 2**20,
        "process MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
        "seconds a round": statistics.median(seconds[1:]),
        "sample": params[:: max(params.size // 1000, 1)].tolist(),
    }


def spread(processes: int, devices: int, spec: dict, rounds: int) -> list[dict]:
    """`measure` in each of so many processes of so many devices."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "FEDJAX_SEC_TUNING": "off",
    }
    running = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps([port, processes, i, spec, rounds])],
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit(f"a process failed: {[process.returncode for process in running]}")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def worker(given: str) -> None:
    from fedjax_sec.core import distributed

    port, processes, number, spec, rounds = json.loads(given)
    if processes > 1:
        distributed.start(f"127.0.0.1:{port}", processes, number)
    print(json.dumps(measure(spec, rounds)))


def main(
    out: Annotated[Path, typer.Option(help="File of the results.")],
    width: Annotated[list[int], typer.Option(help="Hidden units; 75 parameters each.")] = [1333],  # noqa: B006
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 5,
) -> None:
    """Measures all shapes and rules, and writes them as JSON."""
    lines = []
    for hidden in width:
        for rule in RULES:
            whole = None
            for processes, devices in SHAPES:
                made = spread(processes, devices, experiment(rule, hidden), rounds)
                samples = [one.pop("sample") for one in made]
                whole = whole or samples[0]
                apart = max(abs(a - b) for a, b in zip(samples[0], whole, strict=True))
                line = {"rule": rule, "processes": processes, "devices": processes * devices}
                line |= made[0] | {"largest difference": apart}
                line["processes alike"] = all(one == samples[0] for one in samples)
                lines.append(line)
                print(line, flush=True)
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(lines, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2])
    else:
        typer.run(main)

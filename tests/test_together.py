"""Processes that compute a round together: two, of two devices each, on one machine over gloo."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import fedjax_sec
from fedjax_sec.core import ConfigError, distributed, files

BASE = {
    "data": {"num_clients": 6, "max_train": 60},
    "model": {"name": "mlp", "hidden": [7]},
    "client": {"name": "sgd", "steps": 2, "batch_size": 4},
    "threat": {"num_malicious": 2},
    "attack": {"name": "alie", "z": 1.0},
    "defense": {"name": "trimmed_mean", "num_byzantine": 1},
    "evaluation": {"every": 1},
    "checkpoint": {"every": 1, "keep_params": True},
    "execution": {"clients": "sharded"},
    "rounds": 3,
}

RUN = """
import json, os, sys, time
import numpy as np
from fedjax_sec.core import distributed
port, count, number, spec, out, slow = sys.argv[1:]
if int(count) > 1:
    distributed.start(f"127.0.0.1:{port}", int(count), int(number))
import jax, fedjax_sec

def wait(done, rows):
    time.sleep(float(slow))

result = fedjax_sec.run(json.loads(spec), out=out, resume=True, on_evaluation=wait)
flat = [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(result.params)]
print(json.dumps({
    "devices": jax.device_count(), "local": jax.local_device_count(), "leads": distributed.leads(),
    "layout": result.summary.get("layout"), "loss": result.metrics["loss"].tolist(),
    "params": np.concatenate(flat).tolist() if flat else None,
}))
"""


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def environment(devices):
    keep = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    return keep | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "FEDJAX_SEC_COMPILATION_CACHE": "off",
        "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:2])),
    }


def started(count, devices, spec, out, slow=0.0):
    port = free_port()
    text = json.dumps(spec)
    return [
        subprocess.Popen(
            [sys.executable, "-c", RUN, str(port), str(count), str(i), text, str(out), str(slow)],
            env=environment(devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


def finished(processes):
    outputs = [process.communicate(timeout=150) for process in processes]
    for process, (_, said) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, said[-4000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


@pytest.mark.slow
@pytest.mark.parametrize("defense", ["trimmed_mean", "krum"])
def test_two_processes_compute_what_one_does(defense, tmp_path):
    spec = BASE | {"defense": {"name": defense, "num_byzantine": 1}, "logging": ["tensorboard"]}
    (alone,) = finished(started(1, 4, spec, tmp_path / "alone"))
    first, second = finished(started(2, 2, spec, tmp_path / "two"))
    assert (first["devices"], first["local"], alone["devices"]) == (4, 2, 4)
    assert first["leads"] and not second["leads"]
    assert alone["layout"] == first["layout"] == {"at_once": 2, "devices": 4}
    assert first["params"] == second["params"] and first["loss"] == second["loss"]
    np.testing.assert_allclose(first["params"], alone["params"], rtol=0, atol=1e-6)
    single = fedjax_sec.run(spec | {"execution": {"clients": "vmap"}, "logging": []})
    np.testing.assert_allclose(first["loss"], single.metrics["loss"], rtol=1e-4)
    names = {path.name for path in (tmp_path / "two").iterdir()}
    assert {"metrics.jsonl", "summary.json", "config.yaml", "figures"} <= names
    assert len((tmp_path / "two" / "metrics.jsonl").read_text().splitlines()) == 4
    assert len(list((tmp_path / "two" / "tensorboard").iterdir())) == 1  # the leader's
    summary = files.read_json(tmp_path / "two" / "summary.json")
    assert summary["processes"] == 2


@pytest.mark.slow
def test_a_process_that_dies_ends_the_other_and_the_run_goes_on_alone(tmp_path):
    spec = BASE | {"rounds": 12}
    processes = started(2, 2, spec, tmp_path / "run", slow=1.0)
    rows = tmp_path / "run" / "metrics.jsonl"
    while not rows.exists() or len(rows.read_text().splitlines()) < 4:
        assert processes[0].poll() is None, processes[0].communicate()
        time.sleep(0.2)
    processes[1].send_signal(signal.SIGKILL)
    begin = time.monotonic()
    _, said = processes[0].communicate(timeout=120)
    assert processes[0].returncode != 0 and said
    assert time.monotonic() - begin < 2 * distributed.HEARTBEAT + 20
    processes[1].communicate()
    (whole,) = finished(started(1, 4, spec, tmp_path / "whole"))
    # On one process of four devices: it goes on from the checkpoint of the two.
    (again,) = finished(started(1, 4, spec, tmp_path / "run"))
    np.testing.assert_allclose(again["loss"], whole["loss"], rtol=1e-5)
    assert len(rows.read_text().splitlines()) == 13


@pytest.mark.slow
def test_what_processes_cannot_do_together_is_refused(tmp_path):
    spec = BASE | {"execution": {"clients": "vmap"}}
    processes = started(2, 2, spec, tmp_path / "run")
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert all("execution.clients must be 'sharded' where 2 processes" in text for text in said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("127.0.0.1:1", None, 0), "given together; processes is missing"),
        (("127.0.0.1:1", 2, 2), "process must be between 0 and 1, got 2"),
    ],
)
def test_processes_that_say_too_little(arguments, said):
    with pytest.raises(ConfigError, match=said):
        distributed.start(*arguments)


def test_one_process_agrees_with_itself():
    assert distributed.leads() and not distributed.together()
    assert distributed.agree({"a": [1, None]}) == {"a": [1, None]}
    tree = {"a": np.arange(3)}
    assert distributed.agree_arrays(tree) is tree and distributed.local(tree) is tree

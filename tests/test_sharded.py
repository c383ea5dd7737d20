"""Several devices: four that XLA makes of one CPU, in a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernels import KERNELS

PREAMBLE = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import fedjax_sec
from fedjax_sec.runs import config
from fedjax_sec.runs.experiment import train
from fedjax_sec.runs.prepare import prepare

assert jax.device_count() == 4
base = {
    "data": {"num_clients": 6, "max_train": 60},
    "model": {"name": "mlp", "hidden": [6]},
    "client": {"name": "sgd", "steps": 2, "batch_size": 4},
    "threat": {"num_malicious": 2}, "attack": {"name": "alie", "z": 1.0},
    "defense": {"name": "trimmed_mean", "num_byzantine": 1},
    "evaluation": {"every": 1}, "rounds": 3,
}
sharded = {"execution": {"clients": "sharded"}}
flat = lambda result: np.asarray(ravel_pytree(result.params)[0])
"""

RUNS = """
results = {}
for name, changes in {
    "six on four": {},
    "three on three": {"server": {"clients_per_round": 3}},
    "convolutions": {"model": {"name": "small_cnn", "channels": [4], "hidden": 8}},
    "kept state": {"client": base["client"] | {
        "keep_optimizer_state": True,
        "optimizer": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9}}},
    "columns and sums": {
        "defense": "residual_reweighting", "model": {"name": "mlp", "hidden": [7]}},
}.items():
    alone = fedjax_sec.run(base | changes)
    spread = fedjax_sec.run(base | changes | sharded)
    results[name] = {
        "layout": spread.summary["layout"],
        "difference": float(np.abs(flat(alone) - flat(spread)).max()),
        "moved": float(np.abs(flat(alone)).max()),
    }
print(json.dumps(results))
"""

RESUMED = """
cells = [config.from_mapping(base | sharded | {"seed": seed, "rounds": 4}) for seed in (0, 1)]
whole = train(list(map(prepare, cells)))
class Stop(Exception): pass
def stop(done, rows):
    if done == 3: raise Stop
from fedjax_sec.runs.results import RunFolder
cells = [config.from_mapping(c.to_dict() | {"checkpoint": {"every": 1}}) for c in cells]
folders = [RunFolder(f"{sys.argv[1]}/{i}") for i in range(2)]
for folder, cell in zip(folders, cells): folder.open(cell.to_dict())
cells = list(map(prepare, cells))
try: train(cells, folders, checkpoint_dir=f"{sys.argv[1]}/state", on_evaluation=stop)
except Stop: pass
again = train(cells, folders, checkpoint_dir=f"{sys.argv[1]}/state")
print(json.dumps([bool(np.array_equal(flat(a), flat(b))) for a, b in zip(whole, again)]))
"""

SPREAD = """
from fedjax_sec.ops import sorting
from kernels import KERNELS, example

mesh = Mesh(jax.devices(), ("d",))
sorting.column_chunk = lambda rows: 500  # blocks that end inside a shard
results = {}
for name, kernel in KERNELS.items():
    x, valid = example(kernel, 8, 1200)
    x = x.astype(np.float32)
    expected = jax.tree.leaves(jax.jit(kernel.run)(x, valid))
    for spec in (P("d", None), P(None, "d")):
        spread = jax.device_put(x, NamedSharding(mesh, spec))
        got = jax.tree.leaves(jax.jit(kernel.run)(spread, valid))
        worst = []
        for a, b in zip(got, expected):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            with np.errstate(invalid="ignore"):
                apart = np.where(a == b, 0.0, np.abs(a - b))
            worst.append(apart.max() / max(1.0, np.abs(b[np.isfinite(b)]).max()))
        results[f"{name} {spec}"] = float(np.max(worst))  # NaN stays NaN
print(json.dumps(results))
"""


#: Of a round of 16 clients with 19,960 parameters on so many of four devices: the bytes, and the
#: numbers that a device gathers from others.
BYTES = """
import re
from fedjax_sec.ops.client_axis import Layout
from fedjax_sec.runs.program import Program
from fedjax_sec.runs.prepare import make_replicas
from fedjax_sec.runs import program as program_lib

results = {}
for defense in ("mean", {"name": "trimmed_mean", "num_byzantine": 3}, "median", "geometric_median",
                {"name": "krum", "num_byzantine": 3}, {"name": "bulyan", "num_byzantine": 3},
                "residual_reweighting"):
    spec = base | sharded | {
        "data": {"num_clients": 16, "max_train": 160}, "threat": {"num_malicious": 0},
        "attack": None, "defense": defense, "model": {"name": "mlp", "hidden": [266]},
    }
    prepared = [prepare(config.from_mapping(spec))]
    used, gathered = [], []
    for devices in (2, 4):
        program = Program(prepared[0])
        how = Layout(16 // devices, devices)
        program.problem = program.problem._replace(layout=how)
        program.replicated = how.replicated()
        replicas = make_replicas(prepared)
        state = program.state_shapes(replicas)
        used.append(program.needs(state, replicas, 1)[0])
        (round,) = [one for name, one in program._functions.items() if name[0] == "advance 1"]
        shapes = re.findall(r" = f32\\[([0-9,]+)\\]\\S* all-gather\\(", round.as_text())
        gathered.append(sum(int(np.prod([int(n) for n in one.split(",")])) for one in shapes))
    name = defense if isinstance(defense, str) else defense["name"]
    results[name] = used, gathered
print(json.dumps(results))
"""


def on_four_devices(text, *arguments):
    keep = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    env = keep | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "FEDJAX_SEC_COMPILATION_CACHE": "off",
        "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:2])),
    }
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + text, *map(str, arguments)],
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_clients_on_four_devices_equal_clients_on_one():
    outcome = on_four_devices(RUNS)
    layouts = {name: tuple(run["layout"].values()) for name, run in outcome.items()}
    assert layouts == {
        "six on four": (2, 4),
        "three on three": (1, 3),
        "convolutions": (1, 4),
        "kept state": (2, 4),
        "columns and sums": (2, 4),
    }
    for name, run in outcome.items():
        assert run["difference"] <= 1e-5 < run["moved"], name


@pytest.mark.slow
def test_a_run_on_four_devices_is_resumed_to_the_same_bits(tmp_path):
    assert on_four_devices(RESUMED, tmp_path) == [True, True]


@pytest.mark.slow
def test_kernels_take_stacks_that_are_spread_over_devices():
    outcome = on_four_devices(SPREAD)
    assert len(outcome) == 2 * len(KERNELS)
    assert {name: d for name, d in outcome.items() if not d <= 1e-5} == {}


@pytest.mark.slow
def test_the_memory_of_a_device_falls_with_their_number():
    outcome = on_four_devices(BYTES)
    assert len(outcome) == 7
    assert {name: used for name, (used, _) in outcome.items() if used[1] > 0.65 * used[0]} == {}
    # The aggregate is gathered twice; the stack is 16 times as large.
    dim = 19960
    numbers = {name: gathered for name, (_, gathered) in outcome.items()}
    assert all(2 * dim * 0.99 < one < 3 * dim for pair in numbers.values() for one in pair), numbers


@pytest.mark.gpu
def test_sharding_over_one_gpu_is_no_different():
    import fedjax_sec

    result = fedjax_sec.run({"rounds": 2, "execution": {"clients": "sharded"}})
    assert result.summary["layout"]["devices"] == 1

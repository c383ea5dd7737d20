"""Processes that compute a round together, started by Ray: two of two devices each, on loopback."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import typer.testing
from test_together import BASE, environment, finished, started

import fedjax_sec
from fedjax_sec.cli import app
from fedjax_sec.core import ConfigError, files
from fedjax_sec.runs import config
from fedjax_sec.runs.loading import final_params
from fedjax_sec.runs.results import RunFolder
from fedjax_sec.runs.together import Ray, RunFailed, build_starter
from fedjax_sec.runs.together.members import LAST, Members

# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "processes", "said"),
    [
        ("rey", None, "unknown name 'rey'. Did you mean 'ray'?"),
        (3, None, "together: expected one of ray, or a mapping"),
        ({"gpus": 1}, None, "together: unknown name None"),
        ({"name": "ray", "gpu": 1}, None, "unknown key 'gpu'. Did you mean 'gpus'?"),
        ({"name": "ray", "placement": "even"}, None, "together.placement must be one of"),
        ({"name": "ray", "processes": 0}, None, "together.processes must be >= 1"),
        ({"name": "ray", "processes": 2}, 3, "processes = 2 and processes = 3 contradict"),
    ],
)
def test_starters_that_are_none(spec, processes, said):
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
        build_starter(spec, processes)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--together", "rey"], "--together: unknown name 'rey'. Did you mean 'ray'? Known: slurm"),
        (["--together", "{name: slrum}"], "unknown name 'slrum'. Did you mean 'slurm'?"),
        (["--together", "ray", "--process", "0"], "--process 0 contradicts --together ray"),
        (["--together", "{name: ray, cores: 0}"], "--together.cores must be > 0"),
        (["--together", "slurm", "--processes", "2"], "--processes 2 contradicts --together slurm"),
        (["--together", "{name: slurm, gpus: 1}"], "--together slurm has no fields"),
        (["--processes", "2"], "--processes 2 needs --coordinator and --process"),
    ],
)
def test_options_that_contradict(arguments, said, tmp_path):
    path = tmp_path / "experiment.yaml"
    path.write_text(json.dumps(BASE))
    command = ["run", str(path), "--out", str(tmp_path / "run"), *arguments]
    done = typer.testing.CliRunner().invoke(app, command)
    assert done.exit_code == 2 and said in done.output
    assert not (tmp_path / "run").exists()


def test_what_is_refused_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(Ray, "run", lambda *_, **__: pytest.fail("it starts"))
    folder = RunFolder(tmp_path)
    folder.open(config.from_mapping(BASE).to_dict())
    folder.append({"round": 0})

    def refuse(spec, said, **how):
        with pytest.raises(ConfigError, match=said):
            fedjax_sec.run(spec, together="ray", **how)

    refuse({"rounds": 1}, "clients must be 'sharded' where 2 processes .* got 'auto'")
    sharded = {"execution": {"clients": "sharded"}}
    refuse(sharded | {"data": {"num_clients": 1}}, "2 processes .* has 1 client")
    refuse(BASE, "'tensorboard' writes beside a run's folder", logging=["tensorboard"])
    refuse(BASE, "already holds a run", out=tmp_path)
    refuse(BASE, "on_evaluation must be a function", on_evaluation=3)
    refuse(BASE, "<lambda> is an object given from Python", defense=lambda updates: updates[0])
    x, y = np.zeros((20, 3), np.float32), np.arange(20) % 2
    data = fedjax_sec.data.arrays(x, y, x, y)
    spec = sharded | {"data": {"num_clients": 6}}
    refuse(spec, "arrays is an object given from Python", data=data)


def test_without_ray_a_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="'ray' needs the package ray, .*: pip install ray"):
        fedjax_sec.run(BASE, together="ray")


class Stub:
    """Ray's `get` and `wait`, whose references are results or errors, ready one after the other."""

    def __init__(self):
        self.exceptions = pytest.importorskip("ray").exceptions

    def wait(self, refs, num_returns=1, timeout=None):
        return refs[:num_returns], refs[num_returns:]

    def get(self, ref):
        if isinstance(ref, Exception):
            raise ref
        return ref


class Heard:
    """Reports, of which there are none; the seconds for which they were waited."""

    next = "nothing"

    def __init__(self):
        self.waited = []

    def hand_on(self, patience=0.0):
        self.waited.append(patience)


def test_a_death_is_named_rather_than_the_errors_of_others():
    stub, heard = Stub(), Heard()
    exceptions = stub.exceptions
    members = Members(stub, heard)
    assert members.results(["a", "b"]) == ["a", "b"] and heard.waited == [0, 0, LAST]
    members.names = ["10.0.0.1, process id 7", "10.0.0.2, process id 9"]
    missing = exceptions.RayTaskError("work", "Traceback", ValueError("closed by peer"))
    dead = exceptions.ActorDiedError()
    with pytest.raises(RunFailed, match=r"Process 1 \(10.0.0.2, process id 9\) died: .*resume"):
        members.results([missing, dead])
    assert heard.waited[-1] == LAST  # what the first process said last
    with pytest.raises(RunFailed, match=r"Process 0 \(.*\) failed: ValueError: closed by peer"):
        members.results([missing, "b"])
    wrong = exceptions.RayTaskError("work", "Traceback", ConfigError("no data"))
    with pytest.raises(RunFailed, match=r"^Process 1 \(10.0.0.2, process id 9\): no data$"):
        members.results(["a", wrong])


# --- Running --------------------------------------------------------------------------------------

RUN = """
import json, sys
import fedjax_sec
from jax._src import xla_bridge
spec, out, together = json.loads(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
seen = []
result = fedjax_sec.run(
    spec, out=out, resume=True, together=together,
    on_evaluation=lambda done, rows: seen.append(rows[0]["loss"]),
)
print(json.dumps({
    "seen": seen, "loss": result.metrics["loss"].tolist(), "layout": result.summary["layout"],
    "uses devices": xla_bridge.backends_are_initialized(),
}))
"""

#: The command, which hears SIGINT also where the tests were started in the background.
MAIN = """
import signal
from fedjax_sec.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""

#: A module of components that has none: each process that computes the run notes its process id,
#: says where it is, and warns.
NOTE = """
import logging, os, pathlib
import jax
if jax.distributed.is_initialized():
    number = jax.process_index()
    pathlib.Path({folder!r}, str(number)).write_text(str(os.getpid()))
    print("Process", number, "in", os.getcwd())
    logging.getLogger("fedjax_sec.note").warning("Process %d warns", number)
"""


def by_ray(spec, out, cwd=None, **fields):
    """A run that Ray computes in two processes of two devices each."""
    together = {"name": "ray", "processes": 2, "cores": 0.5} | fields
    given = json.dumps(spec), str(out), json.dumps(together)
    return started_by([sys.executable, "-c", RUN, *given], cwd)


def started_by(command, cwd=None):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment(2), cwd=cwd, text=True, **pipes)


def noted(spec, folder):
    """The spec of a run whose processes note their process ids in the folder."""
    folder.mkdir()
    path = folder.parent / "note.py"
    path.write_text(NOTE.format(folder=str(folder)))
    return spec | {"imports": [str(path)]}


def wait_for_rows(process, out, number):
    rows = out / "metrics.jsonl"
    while not rows.exists() or len(rows.read_text().splitlines()) < number:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)


def check_gone(pids):
    end = time.monotonic() + 20
    while alive := [pid for pid in pids if os.path.exists(f"/proc/{pid}")]:
        assert time.monotonic() < end, alive
        time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster of two nodes, of a core each."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        yield cluster.address
    finally:
        cluster.shutdown()


def test_ray_computes_what_processes_by_hand_do(cluster, tmp_path):
    spec = noted(BASE, tmp_path / "pids")
    first, _ = finished(started(2, 2, spec, tmp_path / "hand"))
    ray = by_ray(spec, "ray", tmp_path, address=cluster, placement="strict_spread")
    said, warned = ray.communicate(timeout=150)
    assert ray.returncode == 0, warned
    *lines, got = said.splitlines()
    got = json.loads(got)
    assert got["layout"] == first["layout"] == {"at_once": 2, "devices": 4}
    assert got["seen"] == got["loss"] == first["loss"] and len(got["seen"]) == 4
    assert not got["uses devices"]
    # What the first process prints, in the folder where the command was started.
    assert lines == [f"Process 0 in {tmp_path}"]
    assert "Process 0 warns" in warned and "Process 1 warns" not in warned
    folders = [tmp_path / name for name in ("hand", "ray")]
    rows = [(folder / "metrics.jsonl").read_text() for folder in folders]
    assert rows[0] == rows[1]
    same = jax.tree.map(np.array_equal, *map(final_params, folders))
    assert all(jax.tree.leaves(same))
    assert {p.name for p in folders[0].iterdir()} == {p.name for p in folders[1].iterdir()}
    assert files.read_json(folders[1] / "summary.json")["processes"] == 2


def test_a_process_of_ray_that_dies_ends_the_others_and_one_goes_on(cluster, tmp_path):
    spec, out = noted(BASE | {"rounds": 40}, tmp_path / "pids"), tmp_path / "run"
    process = by_ray(spec, out, address=cluster)
    wait_for_rows(process, out, 4)
    pids = [int((tmp_path / "pids" / str(i)).read_text()) for i in range(2)]
    os.kill(pids[1], signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0
    assert re.search(rf"RunFailed: Process 1 \([\d.]+, process id {pids[1]}\) died:", said), said
    check_gone(pids)
    done = (out / "metrics.jsonl").read_text().splitlines()
    assert 4 <= len(done) < 40
    (again,) = finished([by_ray(spec, out, address=cluster, processes=1)])
    (whole,) = finished(started(1, 4, spec, tmp_path / "whole"))
    assert again["layout"]["devices"] == 2 and len(again["loss"]) == 41
    # It goes on behind the last checkpoint: what was measured before stays.
    assert (out / "metrics.jsonl").read_text().splitlines()[:3] == done[:3]
    np.testing.assert_allclose(again["loss"], whole["loss"], rtol=1e-4)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_all_processes_of_ray(number, cluster, tmp_path):
    spec, out = noted(BASE | {"rounds": 200}, tmp_path / "pids"), tmp_path / "run"
    path = tmp_path / "experiment.yaml"
    path.write_text(json.dumps(spec))
    together = f"{{name: ray, cores: 0.5, address: '{cluster}'}}"
    command = [sys.executable, "-c", MAIN]
    command += ["run", str(path), "--out", str(out), "--together", together, "--processes", "2"]
    process = started_by(command)
    wait_for_rows(process, out, 3)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert f"--resume --together '{together}' --processes 2" in said.replace("'\"'\"'", "'")
    check_gone([int((tmp_path / "pids" / str(i)).read_text()) for i in range(2)])


def test_a_cluster_without_room_is_an_error_in_time(cluster, tmp_path):
    large = by_ray(BASE, tmp_path / "large", address=cluster, processes=3, cores=1, patience=4)
    alone = by_ray(BASE, tmp_path / "alone", placement="strict_spread")
    said = [process.communicate(timeout=120)[1] for process in (large, alone)]
    assert large.returncode and alone.returncode
    assert "no room yet for 3 processes: waiting for at most 4 s" in said[0]
    assert "no room within 4 s for 3 processes of 1 CPUs and 0 GPUs each" in said[0]
    assert "no room for 2 processes of 0.5 CPUs and 0 GPUs each, placement 'strict" in said[1]
    assert not list(tmp_path.iterdir())

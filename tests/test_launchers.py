"""Sweeps on several processes, local, Ray's and submitit's: deaths, hangs, errors, full disks."""

import contextlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import small
from typer.testing import CliRunner

from fedjax_sec import sweeps
from fedjax_sec.cli import app
from fedjax_sec.core import ConfigError, files
from fedjax_sec.sweeps import groups
from fedjax_sec.sweeps.launchers import supervision, worker
from fedjax_sec.sweeps.launchers.choice import build_launcher
from fedjax_sec.sweeps.launchers.local import Local
from fedjax_sec.sweeps.launchers.processes import Processes
from fedjax_sec.sweeps.launchers.slurm import Slurm

BASE = small(rounds=4, checkpoint={"every": 1})


@pytest.fixture
def cells():
    """Four groups of two seeds each."""
    grid = {"defense": ["mean", "median", "geometric_median", "sign"]}
    return sweeps.make_cells(BASE, grid, seeds=(0, 1))


@pytest.fixture(autouse=True)
def environment(monkeypatch, subprocess_env):
    """Workers compile to the bits of this process, and measure no layout."""
    for name, value in (subprocess_env | {"FEDJAX_SEC_TUNING": "off"}).items():
        monkeypatch.setenv(name, value)


def events(out, kind):
    lines = []
    for path in sorted((out / worker.FOLDER).glob("*.jsonl")):
        lines += [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def check_same(results, expected):
    for one, other in zip(results, expected, strict=True):
        assert one.experiment == other.experiment
        for name, values in other.metrics.items():
            np.testing.assert_array_equal(one.metrics[name], values, name)


# --- Choosing -----------------------------------------------------------------------------------


def test_launchers_by_name():
    assert isinstance(build_launcher(), Local) and isinstance(build_launcher(workers=1), Local)
    assert build_launcher("local", 3) == build_launcher({"name": "local", "workers": 3})
    assert build_launcher("slurm", 3).minutes == 240
    given = Processes(2)
    assert build_launcher(given) is given


@pytest.mark.parametrize(
    ("spec", "workers", "said"),
    [
        ("slrum", None, "unknown launcher 'slrum'. Did you mean 'slurm'?"),
        ({"name": ["ray"]}, None, "unknown launcher \\['ray'\\]"),
        ({"name": "ray", "adress": "x"}, None, "unknown key 'adress'. Did you mean 'address'?"),
        ({"name": "local", "workers": 0}, None, "launcher.workers must be >= 1"),
        ({"name": "local", "workers": 2}, 3, "launcher.workers = 2 and workers = 3 contradict"),
        (3, None, "launcher: expected one of local, ray, slurm"),
        (Processes(2), 3, "workers = 3 says nothing"),
    ],
)
def test_launchers_that_are_none(spec, workers, said):
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
        build_launcher(spec, workers)


# --- Working ------------------------------------------------------------------------------------


def test_processes_share_the_groups(cells, tmp_path):
    expected = sweeps.run_cells(cells, tmp_path / "alone")
    seen = []
    got = sweeps.run_cells(cells, tmp_path / "out", launcher=Processes(2), on_status=seen.append)
    check_same(got, expected)
    finished = [line["group"] for line in events(tmp_path / "out", "finishes")]
    assert len(finished) == len(set(finished)) == 4
    assert len({line["where"] for line in events(tmp_path / "out", "takes")}) == 2
    assert seen and seen[-1].counts["finished"] <= 8 and {len(one.runs) for one in seen} == {8}
    assert not list((tmp_path / "out" / "groups").iterdir())


def test_objects_from_python_stay_in_this_process(cells, tmp_path, monkeypatch):
    def unreadable(out, name):
        raise ConfigError("the module is Python's and in no file.")

    monkeypatch.setattr(groups, "read_group", unreadable)
    with pytest.raises(ConfigError, match="launcher: .*is Python's.* Leave the launcher out"):
        sweeps.run_cells(cells, tmp_path, launcher=Processes(2))


# --- Failing ------------------------------------------------------------------------------------


class Broken(Exception):
    """An error inside a run."""


def break_one(monkeypatch, name):
    """Training raises for runs of one defence."""
    train = groups.train

    def training(prepared, *args, **kwargs):
        if prepared[0].experiment.defense.stages[-1].registered_name == name:
            raise Broken("no such luck")
        return train(prepared, *args, **kwargs)

    monkeypatch.setattr(groups, "train", training)


def test_a_group_that_fails_stops_no_other(cells, tmp_path, monkeypatch):
    with monkeypatch.context() as broken:
        break_one(broken, "median")
        with pytest.raises(Broken, match="no such luck"):
            sweeps.run_cells(cells, tmp_path)
    status = sweeps.survey(tmp_path)
    assert (status.counts["finished"], status.counts["failed"]) == (6, 2)
    failed = [run for run in status.runs if run.state == "failed"]
    assert {run.name for run in failed} == {"median/seed0", "median/seed1"}
    assert failed[0].error == "Broken: no such luck"
    said = CliRunner().invoke(app, ["status", str(tmp_path)]).output
    assert "6 finished, 2 failed" in said and "Broken: no such luck" in said
    assert len(sweeps.run_cells(cells, tmp_path)) == 8  # it is tried again
    assert sweeps.survey(tmp_path).counts["failed"] == 0


def test_errors_of_a_caller_and_of_a_full_disk_stop_everything(cells, tmp_path, monkeypatch):
    calls = []

    def on_group(number, total, members):
        calls.append(number)
        raise Broken

    with pytest.raises(Broken):
        sweeps.run_cells(cells, tmp_path / "caller", on_group=on_group)
    assert len(calls) == 1 and sweeps.survey(tmp_path / "caller").counts["failed"] == 0
    worked = []

    def full(out, group, **_):
        worked.append(group.name)
        raise OSError(28, "No space left on device", str(out))

    monkeypatch.setattr(groups, "work_locked", full)
    with pytest.raises(OSError, match="No space left"):
        sweeps.run_cells(cells, tmp_path / "full")
    assert len(worked) == 1


def test_failures_in_workers_are_named(cells, tmp_path, monkeypatch):
    def launch(self, out, planned, **_):
        with pytest.raises(Broken):  # what a worker does
            Local().launch(out, planned)

    monkeypatch.setattr(Processes, "launch", launch)
    break_one(monkeypatch, "sign")
    with pytest.raises(sweeps.SweepFailed) as error:
        sweeps.run_cells(cells, tmp_path, launcher=Processes(2))
    (failure,) = error.value.failures
    assert "2 of 8 runs" in str(error.value) and "sign/seed0 and 1 more: Broken" in str(error.value)
    assert failure.cells == ("sign/seed0", "sign/seed1") and "in training" in failure.traceback


def test_a_group_whose_workers_die_again_and_again_fails(cells, tmp_path):
    planned = sweeps.plan(cells, tmp_path)[0]
    (tmp_path / worker.FOLDER).mkdir()
    log = worker._Log(tmp_path, 0)
    for _ in range(3):  # each takes the group and dies
        with worker._held(tmp_path, planned, 0, 2, log):
            pass
    assert groups.failure_of(tmp_path, planned.name) is None
    assert worker._held(tmp_path, planned, 0, 2, log) is None
    said = groups.failure_of(tmp_path, planned.name).error
    assert said.startswith("its workers died 3 times behind round 0")
    groups.forget_failures(tmp_path, [planned.name])
    assert worker._held(tmp_path, planned, 0, 2, log) is not None


# --- Watching -----------------------------------------------------------------------------------


class Stubs:
    """Workers that are numbers: what `supervise` starts and stops, and when they end."""

    def __init__(self, endings):
        self.endings, self.started, self.stopped = endings, [], []

    def start(self, numbers):
        self.started += numbers

    def ended(self, number):
        return self.endings.pop(0) if self.endings else ""

    def stop(self, number):
        self.stopped.append(number)


@pytest.fixture
def job(cells, tmp_path, monkeypatch):
    planned = sweeps.plan(cells, tmp_path)
    monkeypatch.setattr(supervision, "PAUSE", 0.01)
    return supervision.job_of(tmp_path, planned, None, 3)


def test_a_worker_that_cannot_start_ends_the_launch(job):
    stubs = Stubs(["no GPU"] * 9)
    with pytest.raises(ConfigError, match="Worker 0 cannot start: no GPU"):
        supervision.supervise(job, stubs, 1, patience=60)
    assert stubs.started == [0, 0, 0]


def test_a_silent_worker_is_replaced(job, tmp_path):
    name = job.groups[0]
    lock = groups.take(tmp_path, name)
    content = {"worker": 0, "where": "here", "round": 0, "tries": 1}

    class Hung(Stubs):
        def start(self, numbers):
            super().start(numbers)
            if len(self.started) == 1:  # it takes a group, and nothing more is heard of it
                files.write_json(tmp_path / "groups" / name / groups.WORKER, content)

        def ended(self, number):
            return None if len(self.started) == 1 else ""

        def stop(self, number):
            super().stop(number)
            lock.release()

    stubs = Hung([])
    supervision.supervise(job, stubs, 1, patience=0.2)
    assert stubs.started == [0, 0] and stubs.stopped == [0]


def test_an_interruption_stops_the_workers(job):
    def interrupt():
        raise KeyboardInterrupt

    stubs = Stubs([None] * 99)
    with pytest.raises(KeyboardInterrupt):
        supervision.supervise(job, stubs, 2, patience=60, on_status=interrupt)
    assert stubs.stopped == [0, 1]


def test_locks_that_exclude_nobody_are_refused(tmp_path, monkeypatch):
    files.check_locks(tmp_path)

    class Nothing:
        def __init__(self, path):
            pass

        def acquire(self, **_):
            pass

        def release(self, **_):
            pass

    monkeypatch.setattr(files.filelock, "FileLock", Nothing)
    with pytest.raises(ConfigError, match="Locks exclude nobody .*NFS 4"):
        files.check_locks(tmp_path)


def test_a_worker_notices_that_the_launcher_does_not_exclude_it(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "BEAT", 0.5)
    (tmp_path / "locks").mkdir()
    worker.check_exclusion(tmp_path)  # nobody launches
    with worker.launching(tmp_path):
        worker.check_exclusion(tmp_path)
        # Another machine, whose locks are its own, gets the lock while the launcher lives.
        monkeypatch.setattr(worker, "LOCK", "other.lock")
        with pytest.raises(ConfigError, match="do not exclude those of the launcher"):
            worker.check_exclusion(tmp_path)


def test_a_task_of_ray_works_in_the_folder_of_its_launcher(tmp_path, monkeypatch):
    """Nodes that were started elsewhere: a path of a configuration may be relative."""
    from fedjax_sec.sweeps.launchers import ray as launcher

    monkeypatch.chdir(tmp_path.parent)
    seen = []
    launcher._work(lambda number: seen.append((number, Path.cwd())), 3, str(tmp_path))
    launcher._work(lambda number: seen.append((number, Path.cwd())), 4, str(tmp_path / "missing"))
    assert seen == [(3, tmp_path), (4, tmp_path)]


# --- Killed at random moments ---------------------------------------------------------------------


def rounds_done(out):
    """How many rounds of all runs are measured so far."""
    try:
        return sum(run.done for run in sweeps.survey(out).runs)
    except ConfigError:  # the folder is not written yet
        return 0


def kill_some(process, out, kills, number=signal.SIGKILL):
    """Kills workers that hold groups, at random moments; gives how many were killed.

    Moments are counts of rounds, the last one before three quarters of all: the machine's speed
    doesn't decide how many kills the sweep lasts for.
    """
    rng, killed = random.Random(0), set()
    runs = len(SWEEP["seeds"]) * math.prod(map(len, SWEEP["grid"].values()))
    rounds = runs * SWEEP["experiment"]["rounds"]
    moments = sorted(rng.uniform(0, 0.75 * rounds) for _ in range(kills))
    while len(killed) < kills and process.poll() is None:
        time.sleep(0.05)
        if rounds_done(out) < moments[len(killed)]:
            continue
        known = set()
        for path in out.glob(f"groups/*/{groups.WORKER}"):
            with contextlib.suppress(ConfigError, KeyError, ValueError):
                known.add(int(files.read_json(path)["where"].rpartition(" ")[2]))
        if alive := sorted(known - killed):
            with contextlib.suppress(ProcessLookupError):
                pid = rng.choice(alive)
                os.kill(pid, number)
                killed.add(pid)
    return len(killed)


SWEEP = {
    "experiment": small(rounds=1000, checkpoint={"every": 10}, evaluation={"every": 10}),
    "grid": {
        "defense": ["mean", "median", "geometric_median", "sign"],
        "client.optimizer.learning_rate": [0.05, 0.1],
    },
    "seeds": [0, 1, 2],
    "group_size": 3,
}


def launch(spec, out, launcher):
    """Starts a sweep in a process of its own."""
    code = (
        "import json, signal, sys, fedjax_sec\n"
        # A shell lets what it starts in the background ignore interrupts, tests included.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "spec, out, launcher = sys.argv[1:]\n"
        "fedjax_sec.sweep(json.loads(spec), out=out, launcher=json.loads(launcher))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(spec), str(out), json.dumps(launcher)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """24 cells in this process."""
    folder = tmp_path_factory.mktemp("alone")
    settings, cells = sweeps.load(SWEEP)
    return cells, sweeps.run_cells(cells, folder, group_size=settings.group_size)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        {"name": "local", "workers": 2, "retries": 20},
        {"name": "slurm", "cluster": "local", "workers": 2, "retries": 20},
        {"name": "ray", "workers": 2, "retries": 20},
    ],
    ids=lambda spec: spec["name"],
)
def test_workers_killed_at_ten_moments_lose_nothing(launcher, alone, tmp_path):
    if launcher["name"] != "local":
        pytest.importorskip("ray" if launcher["name"] == "ray" else "submitit")
    cells, expected = alone
    out = tmp_path / "out"
    process = launch(SWEEP, out, launcher)
    killed = kill_some(process, out, 10)
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said
    assert killed == 10, (killed, said)
    finished = [line["group"] for line in events(out, "finishes")]
    assert len(finished) == len(set(finished)), "a group was run twice"
    check_same(sweeps.collect(cells, out), expected)


@pytest.mark.slow
def test_two_nodes_of_ray_and_one_that_is_lost(alone, tmp_path):
    """A cluster that exists already, by its address; what the lost node's worker had goes on."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cells, expected = alone
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        cluster.wait_for_nodes()
        launcher = {"name": "ray", "address": cluster.address, "workers": 2, "retries": 20}
        process = launch(SWEEP, tmp_path / "out", launcher)
        while len(events(tmp_path / "out", "takes")) < 2:
            assert process.poll() is None, process.communicate()
            time.sleep(0.5)
        cluster.remove_node(nodes[0], allow_graceful=False)
        time.sleep(5)
        cluster.add_node(num_cpus=1)
        said, _ = process.communicate(timeout=900)
    finally:
        cluster.shutdown()
    assert process.returncode == 0, said
    check_same(sweeps.collect(cells, tmp_path / "out"), expected)


@pytest.mark.slow
def test_a_hung_worker_is_replaced(alone, tmp_path):
    cells, expected = alone
    out = tmp_path / "out"
    process = launch(SWEEP, out, {"name": "local", "workers": 2, "patience": 10})
    assert kill_some(process, out, 1, signal.SIGSTOP) == 1
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said
    check_same(sweeps.collect(cells, out), expected)


@pytest.mark.slow
def test_a_full_disk_ends_the_launch_and_loses_nothing(alone, tmp_path):
    """A limit on the size of files stands in for the disk: writing fails as soon as it is met."""
    cells, expected = alone
    out = tmp_path / "out"
    code = (
        "import json, sys, fedjax_sec\n"
        "spec, out = sys.argv[1:]\n"
        "try:\n"
        "    fedjax_sec.sweep(json.loads(spec), out=out, launcher='local', workers=2)\n"
        "except ValueError as error:\n"
        "    sys.exit(str(error))\n"
    )
    command = [sys.executable, "-c", code, json.dumps(SWEEP), str(out)]
    limited = ["bash", "-c", 'ulimit -f 4; exec "$@"', "bash", *command]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=600)
    assert done.returncode != 0, done.stdout
    assert "File too large" in done.stderr, done.stderr
    again = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert again.returncode == 0, again.stderr
    check_same(sweeps.collect(cells, out), expected)


@pytest.mark.slow
def test_ctrl_c_ends_the_workers_and_the_next_start_goes_on(alone, tmp_path):
    cells, expected = alone
    out = tmp_path / "out"
    process = launch(SWEEP, out, {"name": "local", "workers": 2})
    while not list(out.glob(f"groups/*/{groups.WORKER}")):
        time.sleep(0.2)
        assert process.poll() is None, process.communicate()
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "KeyboardInterrupt" in said
    pids = {int(line["where"].rpartition(" ")[2]) for line in events(out, "starts")}
    assert pids and not any(Path(f"/proc/{pid}").exists() for pid in pids)
    check_same(sweeps.run_cells(cells, out, group_size=3), expected)


# --- SLURM ----------------------------------------------------------------------------------------

SBATCH = """#!{python}
import sys
if "--partition=nowhere" in open(sys.argv[-1]).read():
    sys.exit("sbatch: error: invalid partition specified: nowhere")
text = open(sys.argv[-1]).read()
open({saved!r}, "a").write(text)
print("Submitted batch job 4711")
"""


@pytest.fixture
def submitted(tmp_path, monkeypatch):
    """What a stand-in for sbatch was given: nothing here can run it."""
    pytest.importorskip("submitit")
    (tmp_path / "bin").mkdir()
    saved = tmp_path / "submitted.sh"
    for tool, text in (("sbatch", SBATCH), ("srun", "#!/bin/sh\n"), ("scancel", "#!/bin/sh\n")):
        path = tmp_path / "bin" / tool
        path.write_text(text.format(python=sys.executable, saved=str(saved)))
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return saved


def test_a_sweep_that_slurm_does_not_take(cells, tmp_path, submitted, monkeypatch):
    planned = sweeps.plan(cells, tmp_path / "out")
    with pytest.raises(ConfigError, match="SLURM took no jobs: sbatch: error: invalid partition"):
        Slurm(2, partition="nowhere").launch(tmp_path / "out", planned)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="no sbatch and no srun, .* choose cluster: local"):
        Slurm(2).launch(tmp_path / "out", planned)


def test_a_submission_to_slurm(cells, tmp_path, submitted):
    import submitit

    launcher = Slurm(
        workers=8,
        partition="gpu",
        minutes=90,
        gpus=1,
        cores=4,
        memory_gb=16,
        options={"qos": "low"},
    )
    planned = sweeps.plan(cells, tmp_path / "out")
    job = supervision.job_of(tmp_path / "out", planned, None, 3)
    executor = launcher.executor(submitit, tmp_path / "out", 4)
    jobs = executor.map_array(job, [0, 1, 2, 3])
    assert [one.job_id for one in jobs] == ["4711_0", "4711_1", "4711_2", "4711_3"]
    text = submitted.read_text()
    for line in (
        "--array=0-3%4",
        "--partition=gpu",
        "--time=90",
        "--gpus-per-node=1",
        "--cpus-per-task=4",
        "--mem=16GB",
        "--qos=low",
        "--signal=USR2@",
    ):
        assert f"#SBATCH {line}" in text, text
    again = job.checkpoint(2)  # what submitit submits when SLURM takes the machine back
    assert isinstance(again, submitit.helpers.DelayedSubmission)
    assert (again.function, again.args) == (job, (2,))


# --- What it costs --------------------------------------------------------------------------------


def test_costs_of_a_sweep(cells, tmp_path):
    (first, *others) = sweeps.estimate(cells[:4], group_size=1, rounds=2)
    assert [len(one.groups) for one in (first, *others)] == [2, 2] and first.size == 1
    state = 4 * first.dim  # the parameters; keys and empty states come on top
    assert state <= first.state_bytes < 3 * state and first.working_bytes > state
    one = cells[0].experiment
    evaluations = one.rounds // one.evaluation.every + 1
    expected = first.start + one.rounds * first.round + evaluations * first.evaluation
    assert first.seconds == pytest.approx(expected) and first.round > 0
    assert not list(tmp_path.iterdir())
    nothing = sweeps.estimate(cells, rounds=0)
    assert [(one.size, one.round) for one in nothing] == [(2, None)] * 4
    assert sweeps.duration_on(nothing, 3) is None
    with pytest.raises(ConfigError, match="rounds must be an integer >= 0, got -1"):
        sweeps.estimate(cells, rounds=-1)


def test_the_command_says_what_a_sweep_costs(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(json.dumps({"experiment": BASE, "seeds": list(range(6)), "group_size": 3}))
    done = CliRunner().invoke(app, ["plan", str(path), "--workers", "2", "--rounds", "1"])
    assert done.exit_code == 0, done.output
    assert "6 runs of 24 rounds in all; groups: 2; programs: 1" in done.output
    assert "estimated on 2 workers like this:" in done.output

"""Groups run in processes of this machine, one a device."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from fedjax_sec.core import COUNT, static
from fedjax_sec.core.caching import usable_cores
from fedjax_sec.sweeps.launchers import supervision, worker

#: Seconds between asking a process to end and ending it.
_GRACE = 5.0
#: Bytes of what a worker printed last that its error shows.
_TAIL = 2000


@dataclasses.dataclass(frozen=True)
class Processes:
    """Worker processes of this machine, each with a GPU of its own, or a share of the cores.

    With several workers a GPU they share its memory in equal parts. A worker that dies is replaced,
    and its group goes on from its checkpoint.
    """

    workers: int | None = static(
        None, "Processes (null: one a GPU; without one, one a core).", low=1, high=10_000
    )
    retries: int = static(
        3, "How often a group whose worker died begins again at the same round.", low=0, high=COUNT
    )
    patience: float = static(
        300.0, "Seconds without a sign of life after which a worker is replaced.", low=1, high=1e6
    )

    def launch(self, out, groups, *, at_once=None, on_group=None, on_wait=None, on_status=None):
        """See `fedjax_sec.sweeps.launchers.Launcher`; the only callback is `on_status`."""
        gpus = visible_gpus()
        count = self.workers or len(gpus) or usable_cores()
        job = supervision.job_of(out, groups, at_once, self.retries)
        pool = _Pool(job, min(count, len(groups)), gpus)
        supervision.supervise(job, pool, count, patience=self.patience, on_status=on_status)


class _Pool:
    def __init__(self, job: worker.Job, count: int, gpus: Sequence[str]):
        self.folder, self.count, self.gpus = Path(job.out) / worker.FOLDER, count, gpus
        self.folder.mkdir(exist_ok=True)
        self.job = self.folder / "job.json"
        self.job.write_text(json.dumps(dataclasses.asdict(job)))
        self.processes: dict[int, subprocess.Popen] = {}

    def start(self, numbers):
        for number in numbers:
            with open(self._log(number), "ab") as log:
                self.processes[number] = self._process(number, log)

    def _process(self, number: int, log: IO) -> subprocess.Popen:
        command = [sys.executable, "-m", worker.__name__, str(self.job), str(number)]
        changes = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        if self.gpus:
            changes["CUDA_VISIBLE_DEVICES"] = self.gpus[number % len(self.gpus)]
            if (sharing := -(-self.count // len(self.gpus))) > 1:
                share = f"{0.9 / sharing:.3f}"
                changes["XLA_PYTHON_CLIENT_MEM_FRACTION"] = share
        elif cores := _cores(number, self.count):
            command = [*_pinned(cores), *command]
        return subprocess.Popen(
            command,
            env=os.environ | changes,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is the launcher's
        )

    def _log(self, number: int) -> Path:
        return self.folder / f"{number}.log"

    def ended(self, number):
        status = self.processes[number].poll()
        if status is None or status == 0:
            return None if status is None else ""
        how = f"status {status}" if status > 0 else f"signal {-status}"
        said = self._log(number).read_bytes()[-_TAIL:].decode(errors="replace").strip()
        return f"it ended with {how}: {said.splitlines()[-1] if said else 'nothing was said'}"

    def stop(self, number):
        process = self.processes[number]
        process.terminate()
        try:
            process.wait(timeout=_GRACE)
        except subprocess.TimeoutExpired:  # stopped, or in a call that does not return
            process.kill()
            process.wait()


def _cores(number: int, count: int) -> list[int]:
    """Every `count`-th core from the `number`-th on; none where the system does not tell."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    return sorted(os.sched_getaffinity(0))[number::count]


def _pinned(cores: Sequence[int]) -> list[str]:
    """The command that gives the next one these cores alone."""
    tool = shutil.which("taskset")
    return [tool, "-c", ",".join(map(str, cores))] if tool else []


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES has for them.

    Without starting JAX, which would take their memory.
    """
    if os.environ.get("JAX_PLATFORMS", "").lower() == "cpu":
        return []
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [one for one in chosen.split(",") if one.strip() not in ("", "-1")]
    if (tool := shutil.which("nvidia-smi")) is None:
        return []
    done = subprocess.run(
        [tool, "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True
    )
    return done.stdout.split() if done.returncode == 0 else []

"""A deployed run on processes of this machine: Flower's SuperLink, its SuperNodes, and the run."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedjax_sec.core import ConfigError, files
from fedjax_sec.flower.apps import RUN
from fedjax_sec.flower.folder import read_experiment, write_app
from fedjax_sec.runs.experiment import Result, read_result
from fedjax_sec.runs.results import RunFolder

#: The folder of Flower's files within the results: the app, its home, the logs.
FLOWER = "flower"
LINK = "local"
_GRACE = 10.0  # seconds that a process gets to end
_HEALTHY = 60.0  # seconds that the SuperLink gets to listen
_TAIL = 2000  # characters of a log in an error


class Processes:
    """Flower's processes of one run, all of which end with it.

    `start` runs a command of Flower's in a process group of its own, its output in a log; `node`
    starts the SuperNode of a share of the clients.
    """

    def __init__(self, folder: Path, port: int | None = None):
        self.folder, self.port = folder, port or free_port()
        self.running: dict[str, subprocess.Popen] = {}
        home = folder / "home"
        home.mkdir(parents=True, exist_ok=True)
        self.environment = os.environ | {
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
        }

    def start(self, name: str, *command: str) -> subprocess.Popen:
        """The process of one of Flower's commands."""
        with open(self.folder / f"{name}.log", "ab") as log:
            self.running[name] = subprocess.Popen(
                [self.tool(command[0]), *command[1:]],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self.running[name]

    def tool(self, name: str) -> str:
        """The path of one of Flower's commands."""
        path = shutil.which(name, path=self.environment["PATH"])
        if path is None:
            raise ConfigError(
                f"{name} is not installed here; Flower comes with fedjax_sec[flower], in an "
                f"environment of its own (constraints-flower.txt)."
            )
        return path

    def link(self, *options: str) -> None:
        """Starts the SuperLink, and waits until it listens."""
        process = self.start(
            "superlink",
            "flower-superlink",
            *(options or ("--insecure",)),
            "--disable-runtime-dependency-installation",
            "--port",
            str(self.port),
        )
        deadline = time.monotonic() + _HEALTHY
        while not listens(self.port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise ConfigError(f"Flower's SuperLink does not start: {self.said('superlink')}")
            time.sleep(0.1)

    def node(self, number: int, count: int, *options: str, **config) -> None:
        """Starts the SuperNode of one of `count` shares of the clients."""
        shares = {"partition-id": number, "num-partitions": count} | config
        values = [
            f"{key}={value!r}".replace("'", '"') if isinstance(value, str) else f"{key}={value}"
            for key, value in shares.items()
        ]
        self.start(
            f"node-{number}",
            "flower-supernode",
            *(options or ("--insecure",)),
            "--superlink",
            f"127.0.0.1:{self.port}",
            "--port",
            str(free_port()),
            "--node-config",
            " ".join(values),
        )

    def point(self, **access) -> None:
        """Tells Flower's commands how to reach the SuperLink: `insecure`, `root-certificates`."""
        lines = {"address": f"127.0.0.1:{self.port}"} | (access or {"insecure": True})
        text = "\n".join(f"{key} = {json.dumps(value)}" for key, value in lines.items())
        config = Path(self.environment["FLWR_HOME"]) / "config.toml"
        files.write_atomically(config, f"[superlink.{LINK}]\n{text}\n")

    def run(self, app: Path, **access) -> subprocess.Popen:
        """Starts the app on the SuperLink; the process ends with the run."""
        self.point(**access)
        return self.start("run", "flwr", "run", str(app), LINK, "--stream")

    def said(self, name: str) -> str:
        """The end of a process's log."""
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace")[-_TAIL:].strip() if path.exists() else ""

    def kill(self, name: str, how: signal.Signals = signal.SIGKILL) -> None:
        """Signals a process and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.running[name].pid, how)

    def stop(self) -> None:
        """Ends all processes, and what they started."""
        for name in reversed(list(self.running)):
            self.kill(name, signal.SIGTERM)
        deadline = time.monotonic() + _GRACE
        for name, process in self.running.items():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            self.kill(name)
            process.wait()


@contextlib.contextmanager
def processes(folder: Path) -> Iterator[Processes]:
    """Flower's processes, which end with the block."""
    running = Processes(folder)
    try:
        yield running
    finally:
        running.stop()


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def listens(port: int) -> bool:
    """Whether somebody listens on a port of this machine."""
    with socket.socket() as one:
        one.settimeout(1.0)
        return one.connect_ex(("127.0.0.1", port)) == 0


def deploy(
    config: Any,
    *,
    out: str | Path,
    nodes: int = 2,
    overrides: Mapping | None = None,
    resume: bool = False,
    overwrite: bool = False,
    timeout: float = 600.0,
    quorum: int | None = None,
) -> Result:
    """Runs an experiment whose clients are on SuperNodes, processes of this machine.

    Args:
      config: a YAML file, a mapping or an `Experiment`, as in `fedjax_sec.run`.
      out: folder for the results (`run`, as a simulation's), the journal of the rounds and Flower's
        logs.
      nodes: how many SuperNodes share the clients; a round starts a Python process on each.
      overrides, resume, overwrite: as in `fedjax_sec.run`.
      timeout, quorum: as in `write_app`.

    Returns: the result, read from `out`/run.

    Raises: `ConfigError` for an experiment that cannot be deployed; `RuntimeError` where the run
    fails, with the end of Flower's log.
    """
    experiment, out = read_experiment(config, overrides), Path(out).absolute()
    clients = experiment.data.num_clients
    if not 1 <= nodes <= clients:
        raise ConfigError(f"nodes must be in 1 .. {clients}, the clients, got {nodes}.")
    folder, run = out / FLOWER, RunFolder(out / RUN)
    run.check(experiment.to_dict(), resume=resume, overwrite=overwrite)
    options = {"timeout": timeout, "quorum": quorum, "resume": resume, "overwrite": overwrite}
    app = write_app(experiment, folder / "app", out, **options)
    with processes(folder) as running:
        running.link()
        for number in range(nodes):
            running.node(number, nodes)
        running.run(app).wait()
        if not run.finished:
            raise RuntimeError(f"The run did not finish; Flower says: {running.said('run')}")
    return read_result(experiment, run)

"""Processes that compute a run together, started by Ray (extra `[ray]`)."""

import contextlib
import dataclasses
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

from fedjax_sec.core import ConfigError, distributed, ray_cluster, static
from fedjax_sec.core.optional import require
from fedjax_sec.runs.together import reports
from fedjax_sec.runs.together.members import PAUSE, Members

_log = logging.getLogger(__name__)

_PURPOSE = "A run with together = 'ray'"
#: Seconds without room in the cluster after which a line says that it is waited for.
_SILENT = 3.0


@dataclasses.dataclass(frozen=True)
class Ray:
    """Processes of a Ray cluster, in a placement group that has room for all of them at once.

    Source: Ray 2 (`ray.util.placement_group`, actors).
    """

    processes: int = static(2, "Processes.", low=1, high=10_000)
    address: str | None = static(
        None, "An existing cluster's address, or auto (null: a cluster of this machine alone)."
    )
    gpus: int | None = static(
        None, "GPUs a process (null: 1 where the cluster has any, else 0).", low=0, high=1024
    )
    cores: float = static(1.0, "CPU cores a process.", above=0, high=100_000)
    placement: str = static(
        "spread",
        "Over the nodes evenly, a node for each process or not at all, or on few nodes.",
        choices=("spread", "strict_spread", "pack"),
    )
    patience: float = static(
        60.0, "Seconds to wait until an existing cluster has room.", low=0, high=1e6
    )

    def run(self, work: Callable, *args: Any, on_evaluation: Callable | None = None) -> Any:
        """`work(*args, on_evaluation=...)` in every process; returns what the first one returns.

        What Python prints in the first process is printed here.

        Args:
          work: a function of a module that all nodes have.
          *args: plain values for it.
          on_evaluation: called in this process with what the first process reports.

        Raises: `ConfigError` where Ray is not installed, no cluster answers or it has no room;
        `RunFailed` where a process fails or dies.
        """
        with ray_cluster.joined(self.address, _PURPOSE) as ray:
            gpus = int(ray_cluster.gpus_each(ray, self.gpus))
            with (
                self._room(ray, gpus) as group,
                contextlib.closing(reports.Reports(ray, _PURPOSE, on_evaluation)) as heard,
            ):
                members = Members(ray, heard)
                actors, refs = self._start(ray, group, gpus), []
                try:
                    where = members.results([one.where.remote(os.getcwd()) for one in actors])
                    members.names = [f"{node}, process id {pid}" for node, pid, _ in where]
                    common = f"{where[0][0]}:{where[0][2]}", gpus, heard.queue, work, args
                    refs = [
                        one.work.remote(self.processes, i, *common) for i, one in enumerate(actors)
                    ]
                    return members.results(refs)[0]
                finally:
                    members.end(actors, refs)

    @contextlib.contextmanager
    def _room(self, ray, gpus: int) -> Iterator[Any]:
        """A placement group with a bundle for each process, while the block runs."""
        groups = require("ray.util.placement_group", _PURPOSE)
        bundle = {"CPU": self.cores} | ({"GPU": gpus} if gpus else {})
        if self.address is None and self._too_large(ray, gpus):  # its size is fixed
            raise ConfigError(self._no_room(ray, gpus))
        bundles = [dict(bundle) for _ in range(self.processes)]
        group = groups.placement_group(bundles, strategy=self.placement.upper())
        try:
            begin, said = time.monotonic(), False
            while not group.wait(PAUSE):  # in short waits, between which Ctrl-C is seen
                waited = time.monotonic() - begin
                if waited > self.patience:
                    raise ConfigError(self._no_room(ray, gpus, f" within {self.patience:g} s"))
                if waited > _SILENT and not said:
                    said = True
                    _log.warning(
                        "The cluster has no room yet for %d processes: waiting for at most %g s.",
                        self.processes,
                        self.patience,
                    )
            yield group
        finally:
            groups.remove_placement_group(group)

    def _too_large(self, ray, gpus: int) -> bool:
        has = ray.cluster_resources()
        wanted = {"CPU": self.processes * self.cores, "GPU": self.processes * gpus}
        short = any(number > has.get(name, 0) for name, number in wanted.items())
        return short or (self.placement == "strict_spread" and self.processes > _nodes(ray))

    def _no_room(self, ray, gpus: int, when: str = "") -> str:
        def count(resources):
            return f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"

        return (
            f"together: the cluster has no room{when} for {self.processes} processes of "
            f"{self.cores:g} CPUs and {gpus} GPUs each, placement {self.placement!r}. It has "
            f"{_nodes(ray)} node(s) with {count(ray.cluster_resources())}, of which "
            f"{count(ray.available_resources())} are free. Ask for fewer processes, cores or gpus, "
            f"or for another placement."
        )

    def _start(self, ray, group, gpus: int) -> list:
        strategies = require("ray.util.scheduling_strategies", _PURPOSE)
        return [
            ray.remote(_Process)
            .options(
                num_cpus=self.cores,
                num_gpus=gpus,
                runtime_env=ray_cluster.environment(),
                scheduling_strategy=strategies.PlacementGroupSchedulingStrategy(group, i),
            )
            .remote()
            for i in range(self.processes)
        ]


def _nodes(ray) -> int:
    return sum(node["Alive"] for node in ray.nodes())


class _Process:
    """One of the processes, an actor of Ray."""

    def where(self, folder: str) -> tuple[str, int, int]:
        """Its node's address, its process id, and a port that is free; it goes to `folder`."""
        ray_cluster.go_to(folder)
        ray = require("ray", _PURPOSE)
        with socket.socket() as one:
            one.bind(("", 0))
            return ray.util.get_node_ip_address(), os.getpid(), one.getsockname()[1]

    def work(self, processes, process, coordinator, gpus, queue, work, args):
        """`work(*args)` together with the others; its result in the first process, else None."""
        numbers = range(gpus) if gpus else None
        distributed.start(coordinator, processes, process, gpus=numbers)
        if process > 0:
            work(*args, on_evaluation=None)
            return None
        with reports.sent(queue) as report:
            return work(*args, on_evaluation=report)

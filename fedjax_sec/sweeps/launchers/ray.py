"""Groups run by tasks of a Ray cluster (extra `[ray]`)."""

import dataclasses
import os

from fedjax_sec.core import COUNT, ray_cluster, static
from fedjax_sec.sweeps.launchers import supervision, worker


@dataclasses.dataclass(frozen=True)
class Ray:
    """Tasks of a Ray cluster, each a worker that takes groups until none is left.

    The folder must be one that all nodes see. Ray starts a task whose process or node was lost
    again, and its group goes on from its checkpoint.

    Source: Ray 2 (`ray.remote`, `max_retries`).
    """

    workers: int = static(1, "Tasks.", low=1, high=10_000)
    address: str | None = static(
        None, "An existing cluster's address, or auto (null: a cluster of this machine alone)."
    )
    gpus: float | None = static(
        None, "GPUs a task (null: 1 where the cluster has any, else 0).", low=0, high=1024
    )
    cores: float = static(1.0, "CPU cores a task.", low=0, high=100_000)
    retries: int = static(
        3, "How often a group whose worker died begins again at the same round.", low=0, high=COUNT
    )
    patience: float = static(
        300.0, "Seconds without a sign of life after which a worker is replaced.", low=1, high=1e6
    )

    def launch(self, out, groups, *, at_once=None, on_group=None, on_wait=None, on_status=None):
        """See `fedjax_sec.sweeps.launchers.Launcher`; the only callback is `on_status`."""
        job = supervision.job_of(out, groups, at_once, self.retries)
        with ray_cluster.joined(self.address, "The launcher 'ray'") as ray:
            task = ray.remote(_work).options(
                num_cpus=self.cores,
                num_gpus=ray_cluster.gpus_each(ray, self.gpus),
                max_retries=self.retries,
                runtime_env=ray_cluster.environment(),
            )
            supervision.supervise(
                job,
                _Pool(ray, task, job),
                self.workers,
                patience=self.patience,
                on_status=on_status,
            )


def _work(job: worker.Job, number: int, folder: str) -> None:
    ray_cluster.go_to(folder)
    job(number)


class _Pool:
    def __init__(self, ray, task, job: worker.Job):
        self.ray, self.task, self.job = ray, task, job
        self.tasks: dict = {}

    def start(self, numbers):
        for number in numbers:
            self.tasks[number] = self.task.remote(self.job, number, os.getcwd())

    def ended(self, number):
        done, _ = self.ray.wait([self.tasks[number]], timeout=0)
        if not done:
            return None
        try:
            self.ray.get(done[0])
        except Exception as error:
            return str(getattr(error, "cause", None) or error)
        return ""

    def stop(self, number):
        if number in self.tasks:  # not where it could not be started
            self.ray.cancel(self.tasks[number], force=True)

"""Groups run by tasks of a Ray cluster (extra `[ray]`)."""

import dataclasses
import os

from fedjax_sec.core import COUNT, static
from fedjax_sec.core.optional import require
from fedjax_sec.sweeps.launchers import supervision, worker

#: Settings of the environment that tasks have from the process that launches.
_INHERITED = (
    *("FEDJAX_SEC_", "JAX_", "XLA_", "TF_CPP_"),
    *("WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_BASE_URL"),  # no key: it would be shown
)


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
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray = require("ray", "The launcher 'ray'")
        job = supervision.job_of(out, groups, at_once, self.retries)
        ours = not ray.is_initialized()
        if ours:
            ray.init(
                address=self.address, include_dashboard=False, log_to_driver=False, logging_level=30
            )
        try:
            gpus = self.gpus
            if gpus is None:
                gpus = float(ray.cluster_resources().get("GPU", 0) > 0)
            settings = {k: v for k, v in os.environ.items() if k.startswith(_INHERITED)}
            task = ray.remote(_work).options(
                num_cpus=self.cores,
                num_gpus=gpus,
                max_retries=self.retries,
                runtime_env={"env_vars": settings},
            )
            supervision.supervise(
                job,
                _Pool(ray, task, job),
                self.workers,
                patience=self.patience,
                on_status=on_status,
            )
        finally:
            if ours:
                ray.shutdown()


def _work(job: worker.Job, number: int) -> None:
    job(number)


class _Pool:
    def __init__(self, ray, task, job: worker.Job):
        self.ray, self.task, self.job = ray, task, job
        self.tasks: dict = {}

    def start(self, numbers):
        for number in numbers:
            self.tasks[number] = self.task.remote(self.job, number)

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
        self.ray.cancel(self.tasks[number], force=True)

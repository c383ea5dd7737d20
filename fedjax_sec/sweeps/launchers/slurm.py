"""Groups run by jobs of SLURM, submitted through submitit (extra `[slurm]`)."""

import dataclasses
import shutil
from pathlib import Path

from fedjax_sec.core import COUNT, ConfigError, one_line, static
from fedjax_sec.core.optional import require
from fedjax_sec.sweeps.launchers import supervision, worker


@dataclasses.dataclass(frozen=True)
class Slurm:
    """An array of SLURM jobs, each a worker that takes groups until none is left.

    The folder must be one that all machines see. A job that SLURM ends because of its time limit or
    of another job (pre-emption) is submitted again by submitit, with the same number; one whose
    machine was lost, by the launcher. Its group goes on from its checkpoint. The launcher waits for
    the jobs; stopping it cancels them.

    `cluster: local` runs the jobs as processes of this machine, all at once, without SLURM.

    Source: submitit 1.5 (`AutoExecutor`, `helpers.DelayedSubmission`).
    """

    workers: int = static(1, "Jobs of the array.", low=1, high=10_000)
    cluster: str = static("slurm", "Who runs the jobs.", choices=("slurm", "local"))
    partition: str | None = static(None, "Partition (null: the site's default).")
    minutes: int = static(240, "Time limit of a job.", low=1, high=COUNT)
    gpus: int = static(0, "GPUs a job.", low=0, high=1024)
    cores: int = static(1, "CPU cores a job.", low=1, high=100_000)
    memory_gb: int | None = static(None, "Memory of a job (null: the site's default).", low=1)
    options: dict = static({}, "Further options of sbatch, such as {account: mine, qos: low}.")
    requeues: int = static(
        100, "How often submitit submits a job again that ran out of time.", low=0, high=COUNT
    )
    retries: int = static(
        3, "How often a group whose worker died begins again at the same round.", low=0, high=COUNT
    )
    patience: float = static(
        300.0, "Seconds without a sign of life after which a worker is replaced.", low=1, high=1e6
    )

    def launch(self, out, groups, *, at_once=None, on_group=None, on_wait=None, on_status=None):
        """See `fedjax_sec.sweeps.launchers.Launcher`; the only callback is `on_status`."""
        submitit = require("submitit", "The launcher 'slurm'")
        job = supervision.job_of(out, groups, at_once, self.retries)
        count = min(self.workers, len(groups))
        executor = self.executor(submitit, out, count)
        pool = _Pool(executor, job)
        supervision.supervise(job, pool, count, patience=self.patience, on_status=on_status)

    def executor(self, submitit, out: Path, count: int):
        """submitit's executor for `count` jobs, with these fields as its parameters.

        Raises: `ConfigError` where this machine has no SLURM.
        """
        absent = [name for name in ("sbatch", "srun") if shutil.which(name) is None]
        if self.cluster == "slurm" and absent:
            raise ConfigError(
                f"launcher: this machine has no {' and no '.join(absent)}, so SLURM takes no jobs "
                f"from it. Start the sweep on a machine of the cluster, or choose cluster: local, "
                f"which needs no SLURM."
            )
        executor = submitit.AutoExecutor(
            folder=out / worker.FOLDER / "jobs",
            cluster=self.cluster,
            slurm_max_num_timeout=self.requeues,
        )
        settings = {
            "name": "fedjax-sec",
            "timeout_min": self.minutes,
            "gpus_per_node": self.gpus,
            "cpus_per_task": self.cores,
            "mem_gb": self.memory_gb,
            "slurm_partition": self.partition,
            "slurm_array_parallelism": count,
            "slurm_additional_parameters": self.options or None,
        }
        executor.update_parameters(**{k: v for k, v in settings.items() if v is not None})
        return executor


class _Pool:
    def __init__(self, executor, job: worker.Job):
        self.executor, self.job = executor, job
        self.jobs: dict = {}

    def start(self, numbers):
        from submitit.core.utils import FailedJobError

        try:
            submitted = self.executor.map_array(self.job, list(numbers))
        except FailedJobError as error:
            raise ConfigError(f"launcher: SLURM took no jobs: {one_line(error)}") from error
        self.jobs |= dict(zip(numbers, submitted, strict=True))

    def ended(self, number):
        job = self.jobs[number]
        if not job.done():
            return None
        if not job.paths.result_pickle.exists():  # for which `exception` would wait
            return f"job {job.job_id} ended without a result: {job.state}"
        error = job.exception()
        return "" if error is None else str(error).strip().splitlines()[-1]

    def stop(self, number):
        if number in self.jobs:  # not where it could not be submitted
            self.jobs[number].cancel(check=False)

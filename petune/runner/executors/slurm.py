"""Runs as Slurm jobs, through submitit. A job that is preempted, or whose node dies, resumes from its checkpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from petune.base.config import Config
from petune.base.errors import MissingExtra, UsageError
from petune.base.text import plural
from petune.runner.executors.executor import RUN, Failure, Wanted, WatchWork, Work, read_finished
from petune.runner.executors.worker import WorkerJob, read_answer
from petune.runner.run_config import RunConfig
from petune.training.events import Note
from petune.training.stop import StopFlag

POLL_S = 1.0


class SlurmOptions(Config):
    """Resources that each job requests.

    Attributes:
        cpus, gpus, memory_gb, time_min: Per run.
        partition, account, qos: As for `sbatch`.
        retries: How often a run is submitted again after its job died.
        logs: submitit's folder: job scripts, their arguments (pickled by submitit) and output.
        cluster: `slurm`; `local` makes each job a process on this machine.
        max_jobs: Jobs at the same time.
    """

    cpus: int = Field(4, ge=1)
    gpus: int = Field(0, ge=0)
    memory_gb: int | None = Field(None, ge=1)
    time_min: int = Field(240, ge=1)
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    retries: int = Field(3, ge=0)
    logs: Path = Path("runs/slurm")
    cluster: Literal["slurm", "local"] = "slurm"
    max_jobs: int = Field(32, ge=1)


class SlurmExecutor:
    """See `Executor`. All machines must share the run directories and `logs`.

    Raises:
        MissingExtra: submitit is not installed.
    """

    def __init__(self, options: SlurmOptions) -> None:
        if find_spec("submitit") is None:
            raise MissingExtra("the executor slurm", "slurm")
        self.options = options

    def __call__(
        self, configs: Sequence[RunConfig], wanted: Wanted, watch: WatchWork, work: Work = RUN
    ) -> Iterator[tuple[int, Any]]:
        """Submit the runs, at most `max_jobs` at the same time, and yield their results."""
        finished = read_finished(configs, work)
        yield from finished.items()
        waiting = [index for index in range(len(configs)) if index not in finished]
        if not waiting:
            return
        submitter = self._submitter()
        attempts = dict.fromkeys(waiting, 0)
        jobs: dict[int, Any] = {}
        with StopFlag() as stop:
            try:
                while waiting or jobs:
                    stop.check()
                    while waiting and len(jobs) < self.options.max_jobs:
                        index = waiting.pop(0)
                        if wanted(configs[index]):
                            job = WorkerJob.create(configs[index], self.options.cpus, work)
                            jobs[index] = submitter.submit(RequeuedJob(job))
                            attempts[index] += 1
                            watch(Note(f"{configs[index].output}: job {jobs[index].job_id}"))
                    for index in [index for index, job in jobs.items() if job.done()]:
                        outcome = _read_outcome(jobs.pop(index), configs[index], work)
                        if outcome is not None:
                            yield index, outcome
                        elif attempts[index] <= self.options.retries:
                            watch(Note(f"{configs[index].output}: the job died, submitting it again"))
                            waiting.insert(0, index)
                        else:
                            yield (
                                index,
                                Failure("JobDied", f"{plural(attempts[index], 'time')}, see {self.options.logs}"),
                            )
                    if jobs:
                        time.sleep(POLL_S)
            finally:
                for job in jobs.values():
                    job.cancel(check=False)

    def _submitter(self) -> Any:
        import submitit

        options = self.options
        try:
            submitter = submitit.AutoExecutor(folder=options.logs, cluster=options.cluster)
        except RuntimeError as error:
            raise UsageError(f"Slurm does not answer here: {error}. slurm:cluster=local works without it") from None
        parameters = {
            "name": "petune",
            "cpus_per_task": options.cpus,
            "gpus_per_node": options.gpus,
            "timeout_min": options.time_min,
            "mem_gb": options.memory_gb,
            "slurm_partition": options.partition,
            "slurm_account": options.account,
            "slurm_qos": options.qos,
        }
        submitter.update_parameters(**{key: value for key, value in parameters.items() if value is not None})
        return submitter


@dataclass(frozen=True)
class RequeuedJob:
    """A Slurm job. submitit queues it again when it is preempted or out of time."""

    job: WorkerJob

    def __call__(self) -> dict[str, Any]:
        """Do the run."""
        return self.job()

    def checkpoint(self) -> Any:
        """Return what to submit again; submitit calls this when Slurm is about to end the job."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(RequeuedJob(self.job))


def _read_outcome(job: Any, config: RunConfig, work: Work) -> Config | Failure | None:
    """Return the result of a job; None if the job died."""
    from submitit.core.utils import FailedJobError, UncompletedJobError

    try:
        return read_answer(job.result(), config, work)
    except (FailedJobError, UncompletedJobError):
        return None

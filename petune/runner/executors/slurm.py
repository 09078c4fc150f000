"""Runs as Slurm jobs, through submitit; one that is preempted, or whose node dies, goes on from its checkpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from petune.base.config import Config
from petune.base.errors import MissingExtra, UsageError
from petune.runner.executors.trial import RUN, Failure, Trial, Wanted, Watch, Work, outcome_of
from petune.runner.run_config import RunConfig
from petune.training import Note, StopFlag

POLL_S = 1.0


class SlurmOptions(Config):
    """What each job asks for.

    Attributes:
        cpus, gpus, memory_gb, time_min: Of each run.
        partition, account, qos: As `sbatch` takes them.
        retries: How often a run is submitted again whose job died.
        logs: submitit's folder: job scripts, their arguments (pickled by submitit) and output.
        cluster: `slurm`; `local` makes each job a process of this machine, at most `at_once` of them.
        at_once: Most jobs at a time.
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
    at_once: int = Field(32, ge=1)


class SlurmExecutor:
    """See `Executor`. Run directories and `logs` must lie where all nodes see them.

    Raises:
        MissingExtra: submitit is not installed.
    """

    def __init__(self, options: SlurmOptions) -> None:
        if find_spec("submitit") is None:
            raise MissingExtra("--executor slurm", "slurm")
        self.options = options

    def __call__(
        self, configs: Sequence[RunConfig], wanted: Wanted, watch: Watch, work: Work = RUN
    ) -> Iterator[tuple[int, Any]]:
        """Submit the runs, `at_once` at a time, and yield them as they finish."""
        waiting: list[int] = []
        for index, config in enumerate(configs):
            found = work.finished(config)
            if found is not None:
                yield index, found
            else:
                waiting.append(index)
        submit: Any = self._submitter() if waiting else None
        jobs: dict[int, Any] = {}
        tried = dict.fromkeys(waiting, 0)
        with StopFlag() as stop:
            try:
                while waiting or jobs:
                    stop.check()
                    while waiting and len(jobs) < self.options.at_once:
                        index = waiting.pop(0)
                        if wanted(configs[index]):
                            jobs[index] = submit.submit(Job(Trial.of(configs[index], self.options.cpus, work)))
                            tried[index] += 1
                            watch(Note(f"{configs[index].output}: job {jobs[index].job_id}"))
                    for index in [i for i, job in jobs.items() if job.done()]:
                        outcome = _outcome(jobs.pop(index), configs[index], work)
                        if outcome is None and tried[index] <= self.options.retries:
                            watch(Note(f"{configs[index].output}: its job died and is submitted again"))
                            waiting.insert(0, index)
                        else:
                            yield (
                                index,
                                outcome or Failure(f"its job died {tried[index]} times; see {self.options.logs}"),
                            )
                    if jobs:
                        time.sleep(POLL_S)
            finally:
                for job in jobs.values():
                    job.cancel(check=False)

    def _submitter(self) -> Any:
        import submitit

        try:
            executor = submitit.AutoExecutor(folder=self.options.logs, cluster=self.options.cluster)
        except RuntimeError as error:
            raise UsageError(
                f"Slurm must answer here, but: {error}; --executor slurm:cluster=local tries it out"
            ) from None
        o = self.options
        own: Mapping[str, Any] = {"partition": o.partition, "account": o.account, "qos": o.qos}
        executor.update_parameters(
            name="petune",
            cpus_per_task=o.cpus,
            gpus_per_node=o.gpus,
            timeout_min=o.time_min,
            **({"mem_gb": o.memory_gb} if o.memory_gb else {}),
            **{f"slurm_{key}": value for key, value in own.items() if value},
        )
        return executor


@dataclass(frozen=True)
class Job:
    """What Slurm runs; preempted or out of time it is queued again and goes on from its checkpoint."""

    trial: Trial

    def __call__(self) -> dict[str, Any]:
        """The run."""
        return self.trial()

    def checkpoint(self) -> Any:
        """submitit asks this when Slurm is about to end the job."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(Job(self.trial))


def _outcome(job: Any, config: RunConfig, work: Work) -> Config | Failure | None:
    """What became of a run; None where its job died."""
    from submitit.core.utils import FailedJobError, UncompletedJobError

    try:
        return outcome_of(job.result(), config, work)
    except (FailedJobError, UncompletedJobError):
        return None

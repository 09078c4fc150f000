"""Several runs at a time on this machine, each in a process of its own with its share of the threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import Field

from petune.base.config import Config
from petune.base.errors import ConfigError
from petune.base.text import plural
from petune.runner.executors.executor import (
    RUN,
    Failure,
    FromRun,
    Started,
    Wanted,
    WatchWork,
    Work,
    read_finished,
)
from petune.runner.executors.local_process import Answer, Process, Processes
from petune.runner.executors.memory import available_memory
from petune.runner.executors.worker import WorkerJob, read_answer
from petune.runner.run_config import RunConfig
from petune.training.events import Note, StepDone
from petune.training.stop import StopFlag

POLL_S = 0.2
SMALLEST_RUN = 0.6e9
"""Bytes that the smallest run takes: mostly PyTorch itself."""
SPARE = 1.1
"""A run may take a little more than the largest before it did."""


class LocalOptions(Config):
    """Processes and threads.

    Attributes:
        jobs: Runs at the same time.
        threads: Of each run; None divides the cores.
    """

    jobs: int = Field(2, ge=1)
    threads: int | None = Field(None, ge=1)


class LocalExecutor:
    """See `Executor`. Runs on a GPU share it, and its memory is not looked at.

    The results are those of runs one after the other with the same number of threads, to the bit. The first run trains
    alone until its first step, so that images are decoded once, and then as many others as the memory has room for.

    Raises:
        ConfigError: There are more jobs than cores.
    """

    def __init__(self, options: LocalOptions) -> None:
        cores = num_cores()
        if options.jobs > cores:
            raise ConfigError(
                f"{plural(options.jobs, 'job')} at a time on {plural(cores, 'core')} would slow each other down. "
                f"Use at most {cores}",
                cli_hint="Set it with --jobs",
            )
        self.options = options
        self.threads = options.threads or cores // options.jobs

    def __call__(
        self, configs: Sequence[RunConfig], wanted: Wanted, watch: WatchWork, work: Work = RUN
    ) -> Iterator[tuple[int, Any]]:
        """Do the runs, at most `jobs` at the same time, and yield their results."""
        finished = read_finished(configs, work)
        for index, result in finished.items():
            watch(Started(index))
            yield index, result
        waiting = deque(index for index in range(len(configs)) if index not in finished)
        if not waiting:
            return
        jobs = min(self.options.jobs, len(waiting))
        with StopFlag() as stop, Processes(jobs, self.threads) as processes:
            watch(Note(f"{plural(jobs, 'run')} at a time, {plural(self.threads, 'thread')} each"))
            room = _Room(watch)
            while waiting or processes.busy:
                if stop.signal_name is not None:
                    processes.stop()
                    stop.check()
                while waiting and (process := processes.idle()) is not None and room.fits(processes.busy):
                    index = waiting.popleft()
                    if wanted(configs[index]):
                        watch(Started(index))
                        process.start(index, WorkerJob.create(configs[index], self.threads, work))
                        room.entered(process)
                for event in processes.events(POLL_S):
                    if isinstance(event, Answer):
                        yield event.index, _outcome(event, configs[event.index], work)
                    else:
                        room.note(event)
                        watch(event)


def _outcome(answer: Answer, config: RunConfig, work: Work) -> Config | Failure:
    if isinstance(answer.content, Failure):
        return answer.content
    return read_answer(answer.content, config, work)


class _Room:
    """Decides by the memory that runs were seen to take whether another one may start.

    Args:
        watch: Told once that fewer runs than wanted fit.
    """

    def __init__(self, watch: WatchWork) -> None:
        self.watch = watch
        self.processes: dict[int, Process] = {}
        self.has_stepped: set[int] = set()
        self.largest = SMALLEST_RUN
        self.is_told = False
        self.entered_at = 0.0

    def entered(self, process: Process) -> None:
        """Remember which process does a run."""
        assert process.index is not None
        self.processes[process.index] = process

    def note(self, event: FromRun) -> None:
        """Look at the memory of a run that has begun to train."""
        if isinstance(event.event, StepDone) and event.index not in self.has_stepped and event.event.step >= 1:
            self.has_stepped.add(event.index)
            self.largest = max(self.largest, self.processes[event.index].peak_memory())

    def fits(self, busy: Sequence[Process]) -> bool:
        """Return True if another run may start: nothing runs, or all runs have begun to train and memory is left."""
        if not busy:
            return True
        if not all(process.index in self.has_stepped for process in busy):
            return False
        self.largest = max(self.largest, *(process.peak_memory() for process in busy))
        available = available_memory()
        if available is None or available >= SPARE * self.largest:
            return True
        if not self.is_told:
            self.is_told = True
            self.watch(
                Note(
                    f"no more than {plural(len(busy), 'run')} at a time for now: a run takes {self.largest / 1e9:.1f} "
                    f"GB of memory, and {available / 1e9:.1f} GB are available"
                )
            )
        return False


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""Executors do many runs. This one does them here, one after the other; Ray and Slurm have their own files."""

from __future__ import annotations

import contextlib
import gc
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from petune.base.config import Config
from petune.base.distributed import init_group
from petune.base.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    HubError,
    PetuneError,
    ProcessLost,
    Stopped,
    UsageError,
    WeightsUnavailable,
)
from petune.runner.recipes import complete_run
from petune.runner.result import RunResult
from petune.runner.run import run
from petune.runner.run_config import RunConfig
from petune.runner.run_dir import open_run_dir
from petune.training.events import Event
from petune.training.stop import StopFlag

TRACEBACK_SUFFIX = ".traceback.txt"
ENVIRONMENT_ERRORS = (DataError, WeightsUnavailable, HubError, CheckpointError)
"""Errors of data, weights, network or disk: the same configuration may succeed later."""


@dataclass(frozen=True)
class Failure:
    """A run that failed.

    Attributes:
        kind: The class of the error.
        message: What it says.
        is_retryable: Data, weights, network or disk were the cause, so another try may succeed.
    """

    kind: str
    message: str
    is_retryable: bool = False

    @property
    def reason(self) -> str:
        """Kind and message, for a table."""
        return f"{self.kind}: {self.message}"


@dataclass(frozen=True)
class Started:
    """The run at `index` starts in this process; its events follow."""

    index: int


@dataclass(frozen=True)
class FromRun:
    """An event of the run at `index`, one of several that are done at the same time."""

    index: int
    event: Event


Outcome = RunResult | Failure
WatchWork = Callable[[Event | Started | FromRun], None]
Wanted = Callable[[RunConfig], bool]


@dataclass(frozen=True)
class Work:
    """The work of an executor on each configuration, as two functions of a module, which workers import by name.

    Attributes:
        do: Works in the configuration's directory, or resumes there, and returns the result.
        read_result: Returns the result of finished work; None if it is not finished.
    """

    do: Callable[[RunConfig, Callable[[Event], None]], Config]
    read_result: Callable[[RunConfig], Config | None]


def _run(config: RunConfig, watch: Callable[[Event], None]) -> RunResult:
    return run(config, watch=watch)


def _read_run(config: RunConfig) -> RunResult | None:
    if config.output is None or not RunResult.exists(config.output):
        return None
    complete = complete_run(config)
    with open_run_dir(config.output, complete, resume=True, command="run"):
        return RunResult.read(config.output)  # opened, so that a run of another configuration is refused


RUN = Work(_run, _read_run)
"""The whole run, test included."""


class Executor(Protocol):
    """Does runs and yields the index and result of each, in any order.

    If it is also a context manager, a caller with several calls enters it, so that it can keep a connection open.
    """

    def __call__(
        self, configs: Sequence[RunConfig], wanted: Wanted, watch: WatchWork, work: Work = RUN
    ) -> Iterator[tuple[int, Any]]:
        """Do all `configs` and yield for each what `work` returned, or a Failure.

        Args:
            configs: Each with its own directory, to be resumed there.
            wanted: Called before a run starts; false skips the run.
            watch: Called with every event.
            work: What to do with each; finished work is not repeated.

        Raises:
            Stopped: A signal arrived; progress is saved.
            UsageError: A configuration makes no sense, or a directory is in use.
        """


def serial(
    configs: Sequence[RunConfig], wanted: Wanted, watch: WatchWork, work: Work = RUN
) -> Iterator[tuple[int, Any]]:
    """Do one run after the other in this process."""
    group = init_group()
    with StopFlag() as stop:
        for index, config in enumerate(configs):
            stop.check(group)  # a signal that came when the run before had nothing left to stop
            if wanted(config):
                watch(Started(index))
                yield index, attempt(config, watch, work)


def read_finished(configs: Sequence[RunConfig], work: Work) -> dict[int, Config]:
    """Return the results of the runs that are finished, by index."""
    results = {index: work.read_result(config) for index, config in enumerate(configs)}
    return {index: result for index, result in results.items() if result is not None}


def attempt(config: RunConfig, watch: Callable[[Event], None], work: Work = RUN) -> Config | Failure:
    """Do the work; an error that concerns this configuration alone is returned as a Failure.

    Args:
        config: The configuration.
        watch: Called with every event.
        work: What to do with it.

    Raises:
        Stopped: A signal arrived.
        UsageError: The call makes no sense for any configuration.
        ProcessLost: A process of a distributed run is gone.
    """
    gc.collect()  # models of earlier runs would count in this one's peak memory
    try:
        return work.do(config, watch)
    except PetuneError as error:
        if isinstance(error, (Stopped, UsageError, ProcessLost)) and not isinstance(error, ConfigError):
            raise
        return Failure(type(error).__name__, str(error), isinstance(error, ENVIRONMENT_ERRORS))
    except Exception as error:
        if init_group().size > 1:  # the other processes wait for this one
            raise
        first_line = str(error).strip().partition("\n")[0]
        return Failure(type(error).__name__, f"{first_line}{_save_traceback(config)}")


def _save_traceback(config: RunConfig) -> str:
    """Write the traceback of the current error and return a note with the file, or nothing if that fails."""
    if config.output is None:
        return ""
    # next to the directory: that of a run that failed before its first step is removed
    file = config.output.with_name(f"{config.output.name}{TRACEBACK_SUFFIX}")
    with contextlib.suppress(OSError):
        file.write_text(traceback.format_exc(), encoding="utf-8")
        return f" (traceback: {file})"
    return ""

"""One of many runs, or of other work on as many configurations: done here, or in a worker that may be killed."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from petune.base.config import Config
from petune.base.distributed import init_group
from petune.base.errors import ConfigError, PetuneError, ProcessLost, Stopped, UsageError
from petune.runner.result import RunResult
from petune.runner.run import run
from petune.runner.run_config import RunConfig
from petune.runner.run_dir import open_run_dir
from petune.training.events import Event

TRACEBACK = ".traceback.txt"
CARRIED = ("PETUNE_", "HF_", "TORCH_")
"""Environment variables that a worker gets from here, by how they begin: where data and weights lie."""


@dataclass(frozen=True)
class Failure:
    """A run that could not be done, and why: the error's class and message."""

    reason: str


@dataclass(frozen=True)
class Started:
    """The run at `index` begins here and now; its events follow."""

    index: int


Outcome = RunResult | Failure
Watch = Callable[[Event | Started], None]
Wanted = Callable[[RunConfig], bool]


@dataclass(frozen=True)
class Work:
    """What is done with each configuration, by functions of a module: a worker is told their names.

    Attributes:
        do: Does it in the configuration's directory, or goes on with it there, and returns what came of it.
        finished: What came of it before; None where that is not known yet.
    """

    do: Callable[[RunConfig, Callable[[Event], None]], Config]
    finished: Callable[[RunConfig], Config | None]


def _run(config: RunConfig, watch: Callable[[Event], None]) -> RunResult:
    return run(config, watch=watch)


def _result(config: RunConfig) -> RunResult | None:
    if config.output is None or not RunResult.exists(config.output):
        return None
    with open_run_dir(
        config.output, config, resume=True, command="petune run --config config.yaml"
    ):  # of just this run
        return RunResult.read(config.output)


RUN = Work(_run, _result)
"""The whole run, test included."""


class Executor(Protocol):
    """Does runs, and yields the index of each with what became of it, in any order.

    One that is a context manager, too, is entered by who calls it more than once, and may keep a connection meanwhile.
    """

    def __call__(
        self, configs: Sequence[RunConfig], wanted: Wanted, watch: Watch, work: Work = RUN
    ) -> Iterator[tuple[int, Any]]:
        """Do all `configs`; what came of each is what `work` returned (of a run an `Outcome`), or a Failure.

        Args:
            configs: Each with a directory of its own, and to be resumed there.
            wanted: Asked before a run begins: whether it is still worth it.
            watch: Told what happens.
            work: What is done with each; not again where it is finished.

        Raises:
            Stopped: A signal came; what was done is saved.
            UsageError: A configuration cannot mean anything, or a directory is in use.
        """


def serial(configs: Sequence[RunConfig], wanted: Wanted, watch: Watch, work: Work = RUN) -> Iterator[tuple[int, Any]]:
    """The executor that does one after the other in this process."""
    for index, config in enumerate(configs):
        if wanted(config):
            watch(Started(index))
            yield index, attempt(config, watch, work)


def attempt(config: RunConfig, watch: Callable[[Event], None], work: Work = RUN) -> Config | Failure:
    """Do it; what goes wrong with this configuration alone is what came of it."""
    gc.collect()  # models of runs before, which would count in this one's peak memory
    try:
        return work.do(config, watch)
    except PetuneError as error:
        of_all = isinstance(error, (Stopped, UsageError, ProcessLost))
        if of_all and not isinstance(error, ConfigError):  # which may be of this method alone
            raise
        return Failure(f"{type(error).__name__}: {error}")
    except Exception as error:
        if init_group().size > 1:  # the others wait for this process, and cannot be told
            raise
        return Failure(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}{_kept_traceback(config)}")


def _kept_traceback(config: RunConfig) -> str:
    """Where the traceback of what is handled now was written, to be said behind the error."""
    if config.output is None:
        return ""
    file = config.output.with_name(f"{config.output.name}{TRACEBACK}")  # beside it: a run that had not begun is gone
    with contextlib.suppress(OSError):
        file.write_text(traceback.format_exc(), encoding="utf-8")
        return f" (traceback: {file})"
    return ""


@dataclass(frozen=True)
class Trial:
    """A run for a worker: plain data and names of functions there, plain data back.

    Attributes:
        config: As JSON.
        directory: Where it is to be done, so that relative paths mean the same.
        environment: Variables for it.
        threads: For torch.
        work: What is done with it.
    """

    config: str
    directory: str
    environment: Mapping[str, str]
    threads: int
    work: Work = RUN

    @classmethod
    def of(cls, config: RunConfig, threads: int, work: Work = RUN) -> Trial:
        """The run, as it would be done here."""
        environment = {key: value for key, value in os.environ.items() if key.startswith(CARRIED)}
        return cls(config.model_dump_json(), str(Path.cwd()), environment, threads, work)

    def __call__(self) -> dict[str, Any]:
        """Do the run, or go on with it from its checkpoint, in this process.

        Raises:
            Stopped: A signal came.
        """
        import torch

        os.environ.update(self.environment)
        torch.set_num_threads(self.threads)
        try:
            os.chdir(self.directory)
        except OSError as error:
            problem = f"{self.directory} must be a directory that {platform.node()} shares, but: {error.strerror}"
            return {"usage": f"{problem}. Start petune in a shared one"}
        config = RunConfig.model_validate_json(self.config)
        try:
            outcome = attempt(config, _noting(config), self.work)
        except UsageError as error:
            return {"usage": str(error)}
        return {"failed": outcome.reason} if isinstance(outcome, Failure) else {}


def outcome_of(answer: Mapping[str, Any], config: RunConfig, work: Work = RUN) -> Config | Failure:
    """What a worker's answer means here: nothing said, it is done, and what came of it lies in the directory.

    Raises:
        UsageError: What the worker said; or its directory is not seen from here.
    """
    if "usage" in answer:
        raise UsageError(answer["usage"])
    if "failed" in answer:
        return Failure(answer["failed"])
    found = work.finished(config)
    if found is None:
        raise UsageError(f"{config.output} must lie where all workers see it, but its result is not seen from here")
    return found


def _noting(config: RunConfig) -> Callable[[Event], None]:
    """On the first event write in the run's notes which worker does it: one line an attempt."""
    noted: list[bool] = []

    def watch(event: Event) -> None:
        if not noted and config.output is not None:
            noted.append(True)
            with (config.output / "notes.txt").open("a") as file:
                file.write(f"done by process {os.getpid()} on {platform.node()}\n")

    return watch

"""One of many runs: done here, or in a worker that may be killed and started again."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from petune.errors import PetuneError, ProcessLost, Stopped, UsageError
from petune.results import RunResult
from petune.run import RunConfig, run
from petune.train import Event

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


class Executor(Protocol):
    """Does runs, and yields the index of each with what became of it, in any order."""

    def __call__(self, configs: Sequence[RunConfig], wanted: Wanted, watch: Watch) -> Iterator[tuple[int, Outcome]]:
        """Do all `configs`.

        Args:
            configs: Each with a directory of its own, and to be resumed there.
            wanted: Asked before a run begins: whether it is still worth it.
            watch: Told what happens.

        Raises:
            Stopped: A signal came; what was done is saved.
            UsageError: A configuration cannot mean anything, or a directory is in use.
        """


def serial(configs: Sequence[RunConfig], wanted: Wanted, watch: Watch) -> Iterator[tuple[int, Outcome]]:
    """The executor that does one after the other in this process."""
    for index, config in enumerate(configs):
        if wanted(config):
            watch(Started(index))
            yield index, attempt(config, watch)


def attempt(config: RunConfig, watch: Callable[[Event], None]) -> Outcome:
    """Do a run; what goes wrong with it alone is its outcome."""
    try:
        return run(config, watch=watch)
    except (Stopped, UsageError, ProcessLost):
        raise
    except PetuneError as error:
        return Failure(f"{type(error).__name__}: {error}")


@dataclass(frozen=True)
class Trial:
    """A run for a worker: plain data there and back.

    Attributes:
        config: As JSON.
        directory: Where it is to be done, so that relative paths mean the same.
        environment: Variables for it.
        threads: For torch.
    """

    config: str
    directory: str
    environment: Mapping[str, str]
    threads: int

    @classmethod
    def of(cls, config: RunConfig, threads: int) -> Trial:
        """The run, as it would be done here."""
        environment = {key: value for key, value in os.environ.items() if key.startswith(CARRIED)}
        return cls(config.model_dump_json(), str(Path.cwd()), environment, threads)

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
            outcome = attempt(config, _noting(config))
        except UsageError as error:
            return {"usage": str(error)}
        return {"failed": outcome.reason} if isinstance(outcome, Failure) else {"done": outcome.model_dump(mode="json")}


def outcome_of(answer: Mapping[str, Any], config: RunConfig) -> Outcome:
    """What a worker's answer means here.

    Raises:
        UsageError: What the worker said; or its directory is not seen from here.
    """
    if "usage" in answer:
        raise UsageError(answer["usage"])
    if "failed" in answer:
        return Failure(answer["failed"])
    if config.output is None or not RunResult.exists(config.output):
        raise UsageError(f"{config.output} must lie where all workers see it, but its result is not seen from here")
    return RunResult.build(answer["done"], "a worker's answer")


def _noting(config: RunConfig) -> Callable[[Event], None]:
    """On the first event write in the run's notes which worker does it: one line an attempt."""
    noted: list[bool] = []

    def watch(event: Event) -> None:
        if not noted and config.output is not None:
            noted.append(True)
            with (config.output / "notes.txt").open("a") as file:
                file.write(f"done by process {os.getpid()} on {platform.node()}\n")

    return watch

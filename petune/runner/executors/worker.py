"""A run in another process or on another machine, which may be killed at any time and started again."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from petune.base.config import Config
from petune.base.errors import UsageError
from petune.runner.executors.executor import RUN, Failure, Work, attempt
from petune.runner.run_config import RunConfig
from petune.training.events import Event, ignore

FORWARDED = ("PETUNE_", "HF_", "TORCH_")
"""Prefixes of environment variables that workers get from here: where data and weights are."""
NOTES_FILE = "notes.txt"


@dataclass(frozen=True)
class WorkerJob:
    """A run for a worker. Only plain data and names of functions travel; the result stays in the run directory.

    Attributes:
        config: What was given, as JSON: the run completes the rest, as it would here.
        directory: The working directory, so that relative paths mean the same.
        environment: Variables to set.
        threads: For torch.
        work: What to do with the configuration.
    """

    config: str
    directory: str
    environment: Mapping[str, str]
    threads: int
    work: Work = RUN

    @classmethod
    def create(cls, config: RunConfig, threads: int, work: Work = RUN) -> Self:
        """Return the job that does in a worker what would be done here."""
        environment = {key: value for key, value in os.environ.items() if key.startswith(FORWARDED)}
        return cls(config.model_dump_json(exclude_unset=True), str(Path.cwd()), environment, threads, work)

    def __call__(self, watch: Callable[[Event], None] = ignore) -> dict[str, Any]:
        """Do the run, or resume it from its checkpoint; return an answer for `read_answer`.

        Args:
            watch: Called with every event.

        Raises:
            Stopped: A signal arrived.
        """
        import torch

        from petune.data.images import limit_threads

        os.environ.update(self.environment)
        torch.set_num_threads(self.threads)
        limit_threads(self.threads)
        try:
            os.chdir(self.directory)
        except OSError as error:
            problem = f"{platform.node()} cannot open {self.directory}: {error.strerror}"
            return {"usage_error": f"{problem}. Start petune in a directory that all machines share"}
        config = RunConfig.model_validate_json(self.config)
        try:
            outcome = attempt(config, _note_worker(config, watch), self.work)
        except UsageError as error:
            return {"usage_error": str(error)}
        return {"failure": asdict(outcome)} if isinstance(outcome, Failure) else {}


def read_answer(answer: Mapping[str, Any], config: RunConfig, work: Work = RUN) -> Config | Failure:
    """Return the result of a run that a worker did; an empty answer means that it is in the run directory.

    Raises:
        UsageError: The worker raised it, or its directory is not visible here.
    """
    if "usage_error" in answer:
        raise UsageError(answer["usage_error"])
    if "failure" in answer:
        return Failure(**answer["failure"])
    result = work.read_result(config)
    if result is None:
        raise UsageError(f"the worker finished, but {config.output} has no result here. Use a directory that all share")
    return result


def _note_worker(config: RunConfig, also: Callable[[Event], None]) -> Callable[[Event], None]:
    """Return a function that writes at the first event which worker does the run: a line per attempt in notes.txt."""
    is_noted = False

    def watch(event: Event) -> None:
        nonlocal is_noted
        also(event)
        if not is_noted and config.output is not None:
            is_noted = True
            with (config.output / NOTES_FILE).open("a") as file:
                file.write(f"done by process {os.getpid()} on {platform.node()}\n")

    return watch

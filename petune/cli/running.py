"""Run something that takes long: its directory, its progress and tracker, and how to resume it after a stop."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from petune.base.distributed import is_main_process
from petune.base.errors import Stopped, UsageError
from petune.cli.progress import ProgressDisplay

if TYPE_CHECKING:
    from petune.runner.events import RunEvent, RunStarted
    from petune.runner.run_config import RunConfig
    from petune.training.events import Event

RUNS = Path("runs")


def run_directory(config: RunConfig, name: str, *, resume: bool) -> Path:
    """Return the directory of a run: `--output`, else a new one under `runs/`, or the latest one to resume.

    Args:
        config: The run.
        name: The name of the directory without `--output`.
        resume: `--resume` was given, so there must be a run to resume. `resume: true` in the configuration is for
            jobs that a scheduler may start again: it resumes a run if there is one, and starts one otherwise.

    Raises:
        UsageError: There is no run to resume.
    """
    from petune.runner.run_dir import latest_path, make_unique_dir

    if config.output is not None:
        if resume:
            check_resumable(config.output)
        return config.output
    latest = latest_path(RUNS / name) if config.resume else None
    if latest is None and resume:
        raise UsageError(f"nothing to resume: there is no {RUNS / name}. Name the run's directory with --output")
    return latest or make_unique_dir(RUNS / name)


def check_resumable(directory: Path) -> None:
    """Check that a directory has something that `--resume` can continue.

    Args:
        directory: That of a run, or of several runs with a configuration of their own.

    Raises:
        UsageError: It has no configuration.
    """
    from petune.runner.file_names import CONFIG_FILE

    if not (directory / CONFIG_FILE).is_file():
        raise UsageError(
            f"nothing to resume in {directory}. Start without --resume; for jobs that may be requeued use "
            "--set resume=true"
        )


def check_directory(config: RunConfig, name: str, *, command: str, resume: bool) -> None:
    """Check for a dry run that the directory of a run can be used; nothing is created.

    Args:
        config, name, resume: See `run_directory`.
        command: `run` or `pretrain`.

    Raises:
        UsageError: It cannot.
    """
    from petune.runner.run_dir import check_run_dir, latest_path

    is_new = config.output is None and not (config.resume and latest_path(RUNS / name))
    if resume or not is_new:
        path = run_directory(config, name, resume=resume)
        check_run_dir(path, config, resume=config.resume, command=command)


@contextmanager
def resume_hint(command: str, config: Path, *flags: str, tracker: str | None = None) -> Iterator[None]:
    """Add the resume command to the error when a signal stops training; remove the directory if it is still empty.

    Args:
        command: `run`, `pretrain`, `compare` or `sweep`.
        config: Its configuration, in its directory.
        flags: Further words of the command.
        tracker: The tracker that follows; its curves are to go on.
    """
    flags += ("--tracker", tracker) if tracker else ()
    try:
        yield
    except Stopped as error:
        if not config.exists() and "--resume" in flags:
            error.cli_hint = (
                "Nothing is saved yet: start it again as it was, without --resume. --set resume=true does both, for "
                "jobs that may be requeued"
            )
        elif config.exists():
            words = ("petune", command, "--config", str(config), "--output", str(config.parent), *flags)
            error.cli_hint = f"Resume with:\n  {shlex.join(words)}"
        raise
    finally:
        with suppress(OSError):
            config.parent.rmdir()


@contextmanager
def watching(tracker: str | None, output: Path) -> Iterator[Callable[[Event | RunStarted | RunEvent], None]]:
    """Show progress, and log to a tracker if one is named.

    Args:
        tracker: The tracker's name.
        output: The directory of the run, or of several runs, which then log to one directory each.

    Raises:
        UnknownName: There is no such tracker.
        MissingExtra: Its package is not installed.
    """
    if not is_main_process():
        yield lambda event: None
        return
    tracking = _Tracking(tracker, output) if tracker else None
    with ProgressDisplay() as progress:

        def watch(event: Event | RunStarted | RunEvent) -> None:
            progress(event)
            if tracking is not None:
                tracking(event)

        try:
            yield watch
        finally:
            if tracking is not None:
                tracking.close()


def check_tracker(name: str | None) -> None:
    """Check that a tracker is available, before anything else is done.

    Raises:
        UnknownName, MissingExtra: See `watching`.
    """
    if name:
        from petune.training.trackers import check_tracker as check

        check(name)


def check_executor(name: str, tracker: str | None) -> None:
    """Check that an executor is available, before anything else is done.

    Raises:
        PetuneError: See `petune.runner.executors.choose_executor`.
        UsageError: A tracker is named too; it can only follow runs in this process.
    """
    from petune.runner.executors import choose_executor

    choose_executor(name)
    if tracker and name != "serial":
        raise UsageError(f"--tracker only follows runs in this process, not those of --executor {name}. Leave one out")


class _Tracking:
    """A tracker that starts a new log for each run."""

    def __init__(self, name: str, output: Path) -> None:
        from petune.training.trackers import Tracker

        self._name = name
        self._directory = output / name
        self._started: Counter[str] = Counter()
        self._tracker = Tracker(name, self._directory)

    def __call__(self, event: Event | RunStarted | RunEvent) -> None:
        from petune.runner.events import RunEvent, RunStarted
        from petune.training.trackers import Tracker

        if isinstance(event, RunStarted):
            self.close()
            name = _file_name("-".join(filter(None, (event.method, event.dataset, f"seed{event.seed}"))))
            self._started[name] += 1
            number = f"-{self._started[name]}" if self._started[name] > 1 else ""
            self._tracker = Tracker(self._name, self._directory / f"{name}{number}")
        elif not isinstance(event, RunEvent):  # a tracker follows one run at a time
            self._tracker(event)

    def close(self) -> None:
        self._tracker.close()


def _file_name(text: str) -> str:
    return "".join(c if c.isalnum() or c in "._=-" else "_" for c in text)

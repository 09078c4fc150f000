"""Where a run goes, who watches it, and what to say when it was stopped."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from petune.base.distributed import is_main_process
from petune.base.errors import Stopped, UsageError
from petune.cli.progress import Progress

if TYPE_CHECKING:
    from petune.runner.events import RunStarted
    from petune.runner.run_config import RunConfig
    from petune.training import Event

RUNS = Path("runs")


def place_of(config: RunConfig, name: str, *, resume: bool) -> Path:
    """The directory of a run: `--output`, else a free one under `runs/`, or with --resume the latest.

    Args:
        config: The run.
        name: What the directory is called without `--output`.
        resume: Whether `--resume` was given, which wants something to go on in. `resume: true` in a configuration is
            for jobs that a scheduler starts again: begin, or go on.

    Raises:
        UsageError: There is nothing to go on in.
    """
    from petune.runner.run_dir import CONFIG_FILE, latest_path, unique_path

    if config.output is not None:
        if resume and not (config.output / CONFIG_FILE).is_file():
            raise UsageError(
                f"--resume needs a run to go on in, but {config.output} holds none; begin one without --resume, or "
                "begin or go on, as suits a job that is started again: --set resume=true"
            )
        return config.output
    if not config.resume:
        return unique_path(RUNS / name)
    latest = latest_path(RUNS / name)
    if latest is None:
        raise UsageError(f"--resume needs a run to go on in, but there is no {RUNS / name}; give --output DIR")
    return latest


@contextmanager
def resumable(command: str, place: Path) -> Iterator[None]:
    """Add to a stop by a signal how to go on; leave no empty directory."""
    try:
        yield
    except Stopped as error:
        if not (place / "config.yaml").exists():  # it had not begun, and left nothing to go on in
            raise
        where, config = shlex.quote(str(place)), shlex.quote(str(place / "config.yaml"))
        again = f"petune {command} --config {config} --output {where} --resume"
        raise Stopped(f"{error}:\n  {again}") from None
    finally:
        with suppress(OSError):
            place.rmdir()  # of a run that failed before it had anything to keep


@contextmanager
def started_again(command: str, place: Path, file: str, executor: str) -> Iterator[None]:
    """Add to a stop of many runs that the same command goes on, and which one else does.

    Args:
        command: `compare` or `sweep`.
        place: Its directory.
        file: The configuration in it that goes on.
        executor: As `--executor` names it.
    """
    try:
        yield
    except Stopped as error:
        if not (place / file).exists():  # it had not begun
            raise
        said, where = str(error).partition(", resume it")[0], shlex.quote(str(place))
        elsewhere = "" if executor == "serial" else f" --executor {shlex.quote(executor)}"
        again = f"petune {command} --config {where}/{file} --output {where}{elsewhere}"
        raise Stopped(f"{said}; the same command goes on, or:\n  {again}") from None


@contextmanager
def watching(track: str | None, place: Path) -> Iterator[Callable[[Event | RunStarted], None]]:
    """Show progress, and log to a tracker if one is named.

    Args:
        track: The tracker's name.
        place: The directory of the run, or of a comparison, whose runs then log beside their results.

    Raises:
        UnknownName: No tracker of that name.
        MissingExtra: Its package is not installed.
    """
    if not is_main_process():
        yield lambda event: None
        return
    tracker = _Tracking(track, place) if track else None
    with Progress() as progress:

        def watch(event: Event | RunStarted) -> None:
            progress(event)
            if tracker is not None:
                tracker(event)

        try:
            yield watch
        finally:
            if tracker is not None:
                tracker.close()


def check_tracker(name: str | None) -> None:
    """Say before anything else is done that a tracker cannot be had.

    Raises:
        UnknownName, MissingExtra: See `watching`.
    """
    if name:
        from petune.training.trackers import check_tracker as check

        check(name)


def check_executor(name: str, track: str | None) -> None:
    """Say before anything else is done that an executor cannot be had, or cannot be tracked.

    Raises:
        PetuneError: See `petune.executors.choose_executor`.
        UsageError: A tracker follows the runs of this process only.
    """
    from petune.runner.executors import choose_executor

    choose_executor(name)
    if track and name != "serial":
        raise UsageError(f"--tracker follows the runs of this process, and --executor {name} has them elsewhere")


class _Tracking:
    """A tracker that moves to the next run's directory when it begins."""

    def __init__(self, name: str, place: Path) -> None:
        from petune.training.trackers import Tracker

        self._name, self._place = name, place / name
        self._tracker = Tracker(name, self._place)

    def __call__(self, event: Event | RunStarted) -> None:
        from petune.runner.events import RunStarted
        from petune.training.trackers import Tracker

        if isinstance(event, RunStarted):
            self.close()
            self._tracker = Tracker(self._name, self._place / _file_name(f"{event.method}-seed{event.seed}"))
        else:
            self._tracker(event)

    def close(self) -> None:
        self._tracker.close()


def _file_name(text: str) -> str:
    return "".join(c if c.isalnum() or c in "._=-" else "_" for c in text)

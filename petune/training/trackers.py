"""Log training curves to a tracker, through accelerate. Nothing leaves this machine unless it is asked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from petune.base.errors import MissingExtra, UnknownName
from petune.training.events import EpochEnded, Event, StepDone

PROJECT = "petune"
LOG_EVERY = 10
"""Steps between two points: accelerate flushes its file at every call, which costs more than a small model's step."""


def _tensorboard(directory: Path) -> Any:
    from accelerate.tracking import TensorBoardTracker

    return TensorBoardTracker(directory.name, directory.parent)


def _trackio(directory: Path) -> Any:
    """Log to trackio's own database (TRACKIO_DIR), where `trackio show` finds all runs."""
    from accelerate.tracking import TrackioTracker

    return TrackioTracker(PROJECT, name=_run_name(directory), embed=False, auto_log_cpu=False, auto_log_gpu=False)


def _wandb(directory: Path) -> Any:
    """Log offline, for `wandb sync` later, unless WANDB_MODE says otherwise."""
    from accelerate.tracking import WandBTracker

    directory.mkdir(parents=True, exist_ok=True)
    mode = os.environ.get("WANDB_MODE", "offline")
    return WandBTracker(PROJECT, name=_run_name(directory), dir=str(directory), mode=mode, settings={"silent": True})


def _mlflow(directory: Path) -> Any:
    """Log to files in `directory`, unless MLFLOW_TRACKING_URI names a server or a database."""
    import mlflow
    from accelerate.tracking import MLflowTracker

    if "MLFLOW_TRACKING_URI" not in os.environ:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow 3 refuses files without it
        mlflow.set_tracking_uri(directory.resolve().as_uri())
    return MLflowTracker(PROJECT, run_name=_run_name(directory))


def _run_name(directory: Path) -> str:
    """Return a run's name: `runs/x/wandb` → `x`; for a run of a comparison, `c/wandb/y` → `c-y`."""
    parts = [part for part in directory.resolve().parts if part not in TRACKERS]
    return "-".join(parts[-1:] if directory.name in TRACKERS else parts[-2:])


TRACKERS: dict[str, Callable[[Path], Any]] = {
    "tensorboard": _tensorboard,
    "trackio": _trackio,
    "wandb": _wandb,
    "mlflow": _mlflow,
}
"""Each name is also that of its package and of petune's extra."""


def check_tracker(name: str) -> None:
    """Check that a tracker can be used.

    Raises:
        UnknownName: There is no such tracker.
        MissingExtra: Its package is not installed.
    """
    if name not in TRACKERS:
        raise UnknownName("tracker", name, TRACKERS)
    if find_spec(name) is None:
        raise MissingExtra(f"the tracker {name}", name)


class Tracker:
    """Logs loss, learning rate and speed every few steps, and the metrics of every epoch.

    Args:
        name: One of `TRACKERS`.
        directory: Where the logs go. It is created at the first event, so that a run can open its directory first.

    Raises:
        UnknownName, MissingExtra: See `check_tracker`.
    """

    def __init__(self, name: str, directory: Path) -> None:
        check_tracker(name)
        self._name = name
        self._directory = directory
        self._tracker: Any = None
        self._step = 0

    def __call__(self, event: Event) -> None:
        """Log an event; notes are not logged."""
        if isinstance(event, StepDone):
            self._step = event.step
            if event.step % LOG_EVERY == 0:
                values = {"loss": event.loss, "lr": event.lr, "images_per_s": event.images_per_s}
                self._log({f"train/{key}": value for key, value in values.items()})
        elif isinstance(event, EpochEnded):
            self._log({f"epoch/{key}": value for key, value in event.metrics.items()})

    def close(self) -> None:
        """Complete the files."""
        if self._tracker is not None:
            with redirect_stdout(sys.stderr):
                self._tracker.finish()
            self._tracker = None

    def _log(self, values: dict[str, float]) -> None:
        with redirect_stdout(sys.stderr):  # trackio prints, and stdout is for data
            if self._tracker is None:
                self._tracker = _start(TRACKERS[self._name](self._directory))
            self._tracker.log(values, step=self._step)


def _start(tracker: Any) -> Any:
    import accelerate

    accelerate.PartialState()  # trackers log on the main process only, and ask this which one it is
    if hasattr(tracker, "start"):  # accelerate before 1.9 starts in the constructor
        tracker.start()
    return tracker

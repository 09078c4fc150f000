"""Training curves for a viewer: a `watch` callback on accelerate's trackers. Nothing leaves this machine unasked."""

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
EVERY_STEPS = 10
"""accelerate flushes its file at every call, which would cost a small model more than the step itself."""


def _tensorboard(directory: Path) -> Any:
    from accelerate.tracking import TensorBoardTracker

    return TensorBoardTracker(directory.name, directory.parent)


def _trackio(directory: Path) -> Any:
    """In trackio's own database (TRACKIO_DIR), where `trackio show` finds all runs."""
    from accelerate.tracking import TrackioTracker

    return TrackioTracker(PROJECT, name=_name(directory), embed=False, auto_log_cpu=False, auto_log_gpu=False)


def _wandb(directory: Path) -> Any:
    """Offline, for `wandb sync` later, unless WANDB_MODE says otherwise."""
    from accelerate.tracking import WandBTracker

    directory.mkdir(parents=True, exist_ok=True)
    mode = os.environ.get("WANDB_MODE", "offline")
    return WandBTracker(PROJECT, name=_name(directory), dir=str(directory), mode=mode, settings={"silent": True})


def _mlflow(directory: Path) -> Any:
    """In files in `directory`, unless MLFLOW_TRACKING_URI names a server or a database."""
    import mlflow
    from accelerate.tracking import MLflowTracker

    if "MLFLOW_TRACKING_URI" not in os.environ:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # else mlflow 3 wants a database
        mlflow.set_tracking_uri(directory.resolve().as_uri())
    return MLflowTracker(PROJECT, run_name=_name(directory))


def _name(directory: Path) -> str:
    """Of a run: its directory's, `runs/x/wandb` → `x`; of one of a comparison `c/wandb/y` → `c-y`."""
    parts = [part for part in directory.resolve().parts if part not in TRACKERS]
    return "-".join(parts[-1:] if directory.name in TRACKERS else parts[-2:])


TRACKERS: dict[str, Callable[[Path], Any]] = {
    "tensorboard": _tensorboard,
    "trackio": _trackio,
    "wandb": _wandb,
    "mlflow": _mlflow,
}
"""Each is also the name of its package and of petune's extra."""


def check_tracker(name: str) -> None:
    """Say that there is no such tracker.

    Raises:
        UnknownName: No tracker of that name.
        MissingExtra: Its package is not installed.
    """
    if name not in TRACKERS:
        raise UnknownName("tracker", name, TRACKERS)
    if find_spec(name) is None:
        raise MissingExtra(f"--tracker {name}", name)


class Tracker:
    """Logs loss, learning rate and rate every few steps, and every epoch's numbers.

    Args:
        name: One of `TRACKERS`.
        directory: Where the logs go; made at the first event, so that a run can claim its directory before.

    Raises:
        UnknownName, MissingExtra: See `check_tracker`.
    """

    def __init__(self, name: str, directory: Path) -> None:
        check_tracker(name)
        self._name, self._directory = name, directory
        self._tracker: Any = None
        self._step = 0

    def __call__(self, event: Event) -> None:
        """Log the event; notes are not logged."""
        if isinstance(event, StepDone):
            self._step = event.step
            if event.step % EVERY_STEPS == 0:
                shown = {"loss": event.loss, "lr": event.lr, "images_per_s": event.images_per_s}
                self._log({f"train/{key}": value for key, value in shown.items()})
        elif isinstance(event, EpochEnded):
            self._log({f"epoch/{key}": value for key, value in event.metrics.items()})

    def close(self) -> None:
        """Finish the files."""
        if self._tracker is not None:
            with redirect_stdout(sys.stderr):
                self._tracker.finish()
            self._tracker = None

    def _log(self, values: dict[str, float]) -> None:
        with redirect_stdout(sys.stderr):  # trackio talks there, where `--json` prints data
            if self._tracker is None:
                self._tracker = _started(TRACKERS[self._name](self._directory))
            self._tracker.log(values, step=self._step)


def _started(tracker: Any) -> Any:
    import accelerate

    accelerate.PartialState()  # trackers log on the main process only, and ask it which one this is
    if hasattr(tracker, "start"):  # accelerate before 1.9 starts in the constructor
        tracker.start()
    return tracker

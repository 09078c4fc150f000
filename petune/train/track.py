"""Training curves for a viewer: a `watch` callback on accelerate's trackers."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from petune.errors import MissingExtra, UnknownName
from petune.train.events import EpochEnded, Event, StepDone

TRACKERS = ("tensorboard",)
EVERY_STEPS = 10
"""accelerate flushes its file at every call, which would cost a small model more than the step itself."""


class Tracker:
    """Logs loss, learning rate and rate every few steps, and every epoch's numbers.

    Args:
        name: One of `TRACKERS`.
        directory: Where the logs go; made at the first event, so that a run can claim its directory before.

    Raises:
        UnknownName: No tracker of that name.
        MissingExtra: Its package is not installed.
    """

    def __init__(self, name: str, directory: Path) -> None:
        if name not in TRACKERS:
            raise UnknownName("tracker", name, TRACKERS)
        if find_spec("tensorboard") is None:
            raise MissingExtra("tensorboard logs", "tensorboard")
        self._directory = directory
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
        """Finish the file."""
        if self._tracker is not None:
            self._tracker.finish()
            self._tracker = None

    def _log(self, values: dict[str, float]) -> None:
        if self._tracker is None:
            self._tracker = _started(self._directory)
        self._tracker.log(values, step=self._step)


def _started(directory: Path) -> Any:
    import accelerate
    from accelerate.tracking import TensorBoardTracker

    accelerate.PartialState()  # trackers log on the main process only, and ask it which one this is
    tracker = TensorBoardTracker(directory.name, directory.parent)
    if hasattr(tracker, "start"):  # accelerate before 1.9 starts in the constructor
        tracker.start()
    return tracker

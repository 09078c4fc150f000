"""The events of a training, which the function `watch` of `petune.run` and its relatives receives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from petune.base.metric import Metric


@dataclass(frozen=True)
class StepDone:
    """An optimizer step is done.

    Attributes:
        step: Steps done so far in this run, from 1; a resumed run continues to count.
        total_steps: Steps of the whole run.
        epoch: The current epoch, from 0.
        loss: Mean training loss of this epoch so far.
        lr: Learning rate of this step.
        images_per_s: Mean training speed of the run; of clips, if it trains on videos.
        unit: `images` or `clips`.
    """

    step: int
    total_steps: int
    epoch: int
    loss: float
    lr: float
    images_per_s: float
    unit: str = "images"


@dataclass(frozen=True)
class EpochEnded:
    """An epoch is done.

    Attributes:
        epoch: The epoch that ended, from 1.
        epochs: Epochs of the whole run.
        metrics: Its line of metrics.jsonl: `epoch`, `train_loss`, and after an evaluation `val_loss` and `val_NAME` for
            each metric.
        metric: The metric that chooses the epoch.
    """

    epoch: int
    epochs: int
    metrics: dict[str, float]
    metric: Metric | None = None


@dataclass(frozen=True)
class Note:
    """A message for the user.

    Attributes:
        text: One sentence or two.
    """

    text: str


Event = StepDone | EpochEnded | Note
Watch = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Do nothing with an event: the default for functions that take a `watch`."""

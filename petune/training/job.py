"""One training as data: what trains, on which images, with which options, and where its files go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from petune.data.dataset import Dataset
from petune.data.preprocess import Preprocess
from petune.injector.attachment import Attachment
from petune.training.config import TrainConfig
from petune.training.task import Task


@dataclass(frozen=True)
class TrainJob:
    """Inputs of a `Trainer`.

    Attributes:
        attachment: What trains; its model is already on `device`.
        task: Loss and metrics, fitted to the training split.
        dataset: Training, validation and test images; the validation split is already cut.
        preprocess: Converts stored pixels to the backbone's input.
        config: Options of the training; learning rate, weight decay, optimizer and augmentation are filled in.
        device: Where the model is.
        directory: The run directory; `metrics.jsonl` and `checkpoints/` are written here.
        seed: Of order, augmentation, mixup and dropout.
        keep: `best` keeps the epoch that is the best on val, `last` the last one.
        last_epoch: End after this epoch, whatever is left of the schedule; None trains all epochs of `config`.
    """

    attachment: Attachment
    task: Task[Any]
    dataset: Dataset
    preprocess: Preprocess
    config: TrainConfig
    device: torch.device
    directory: Path
    seed: int = 0
    keep: Literal["best", "last"] = "best"
    last_epoch: int | None = None

    @property
    def epochs(self) -> int:
        """Epochs to train."""
        return self.last_epoch or self.config.epochs

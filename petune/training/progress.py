"""Progress of a training, and its result."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from petune.base.errors import CheckpointError
from petune.base.metric import SplitMetrics
from petune.data.batches import AUGMENT_FORMAT, TrainBatches
from petune.training.config import NumberFormat


@dataclass(frozen=True)
class FitResult:
    """Result of a training; the model holds the tensors of the kept epoch.

    Attributes:
        epoch: The kept epoch, from 1.
        val: Its metrics on val; None without a val split.
        images_per_s: Mean training speed, without evaluations.
        step_time_s: Mean time of a training step.
        time_s: Time of the whole training, evaluations included.
        epochs: The metrics of every epoch.
        precision: Number format of the forward passes.
        micro_batch_size: Images that went through the model at once.
        lr: Peak learning rate.
        num_processes: Processes that trained together.
        stopped_early: Whether `patience` ended the training.
    """

    epoch: int
    val: SplitMetrics | None
    images_per_s: float
    step_time_s: float
    time_s: float
    epochs: list[dict[str, float]]
    precision: str
    micro_batch_size: int
    lr: float
    num_processes: int
    stopped_early: bool = False


@dataclass
class Progress:
    """Position of the training; saved with every checkpoint.

    Attributes:
        epoch, batch: Complete epochs, and complete batches of the next one.
        step: Complete optimizer steps.
        time_s: Time since the start, evaluations included; not while the run was interrupted.
        train_time_s: Time of the training steps.
        best_epoch: The kept epoch, from 1; -1 before the first evaluation.
        best_values: Its metrics on val, by name.
        log_bytes: Size of metrics.jsonl.
        loss_sum: Sum of the losses of this epoch's batches.
        micro_batch: Images that go through the model at once; 0 before it is known.
        peak_bytes: Peak memory of the processes before a resume.
        precision: Number format of the forward passes.
        steps_per_epoch: Batches of an epoch; 0 in checkpoints of older versions.
        augment_format: See `petune.data.batches`; 0 in checkpoints of older versions.
        epochs: The metrics of complete epochs.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    time_s: float = 0.0
    train_time_s: float = 0.0
    best_epoch: int = -1
    best_values: dict[str, float] = field(default_factory=dict)
    log_bytes: int = 0
    loss_sum: float = 0.0
    micro_batch: int = 0
    peak_bytes: int = 0
    precision: NumberFormat = "fp32"
    steps_per_epoch: int = 0
    augment_format: int = 0
    epochs: list[dict[str, float]] = field(default_factory=list)

    def check_batches(self, batches: TrainBatches, directory: Path) -> None:
        """Check that a checkpoint's epochs had the same batches as now, and its images the same augmentation.

        Args:
            batches: The batches of today.
            directory: The run, for the message.

        Raises:
            CheckpointError: An older version left out the images that fill no batch, or cropped in another way.
        """
        full, num_images = batches.full_size, len(batches.split)
        if (self.steps_per_epoch or num_images // full) != len(batches):
            raise CheckpointError(
                f"{directory} was started by an older version of petune, which left out {num_images % full} of "
                f"{num_images} images in every epoch. Start again in another output, to train on all of them",
                cli_hint="Name a new directory with --output",
            )
        if batches.policy is not None and self.augment_format != AUGMENT_FORMAT:
            raise CheckpointError(
                f"{directory} was started by another version of petune, which cropped images in another way. Start "
                "again in another output",
                cli_hint="Name a new directory with --output",
            )

    def record_batches(self, batches: TrainBatches) -> None:
        """Keep what `check_batches` compares."""
        self.steps_per_epoch = len(batches)
        self.augment_format = AUGMENT_FORMAT

    @property
    def best_loss(self) -> float:
        """Loss on val of the kept epoch; infinite before the first evaluation."""
        return self.epochs[self.best_epoch - 1]["val_loss"] if self.best_epoch > 0 else math.inf

    def best(self, num_val: int) -> SplitMetrics:
        """Return the metrics on val of the kept epoch.

        Args:
            num_val: Size of the val split.
        """
        return SplitMetrics(self.best_values, self.best_loss, num_val)

    def is_done(self, epochs: int, patience: int | None) -> bool:
        """Return True after all epochs, or after an evaluation `patience` epochs or more after the kept one."""
        evaluated = max((number for number, row in enumerate(self.epochs, start=1) if "val_loss" in row), default=0)
        waited = evaluated - self.best_epoch if self.best_epoch > 0 else 0
        return self.epoch >= epochs or (patience is not None and waited >= patience)

    def early_stop(self, epochs: int) -> str:
        """Say why a training has fewer than `epochs` epochs."""
        return f"stopped after epoch {self.epoch} of {epochs}: none was better on val since epoch {self.best_epoch}"

    def images_per_s(self, num_images: int) -> float:
        """Return the mean training speed.

        Args:
            num_images: Images of all steps.
        """
        return num_images / self.train_time_s if self.train_time_s else 0.0

    def result(self, *, epochs: int, num_val: int, num_images: int, lr: float, num_processes: int) -> FitResult:
        """Return the result of a finished training.

        Args:
            epochs: Epochs that were asked for.
            num_val: Size of the val split.
            num_images: Images of all steps.
            lr: Peak learning rate.
            num_processes: Processes that trained together.
        """
        val = self.best(num_val) if self.best_epoch > 0 else None
        return FitResult(
            epoch=self.best_epoch if val else self.epoch,
            val=val,
            images_per_s=self.images_per_s(num_images),
            step_time_s=self.train_time_s / max(1, self.step),
            time_s=self.time_s,
            epochs=self.epochs,
            precision=self.precision,
            micro_batch_size=self.micro_batch,
            lr=lr,
            num_processes=num_processes,
            stopped_early=self.epoch < epochs,
        )

"""Let a method choose what it trains before the first step, and a task what it needs to predict when training ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from petune.base.errors import ConfigError
from petune.base.plugins import plugin_errors
from petune.data.batches import TrainBatches
from petune.injector.calibration import CalibrationBatch
from petune.sites.logits import logits_of
from petune.training.batch_loss import BatchLoss
from petune.training.config import NumberFormat
from petune.training.job import TrainJob
from petune.training.meter import Meter
from petune.training.precision import autocast
from petune.training.task import Task
from petune.training.task_registry import TASKS


def calibrate_method(
    job: TrainJob, batches: TrainBatches, loss: BatchLoss, precision: NumberFormat, *, sharded: bool
) -> None:
    """Call `Attachment.calibrate` with the training batches; a method that does not define it costs nothing.

    Every process reads all images of a batch, and the values of the main one are shared afterwards.

    Args:
        job: The training.
        batches: Of the training split. Those of epoch 0 are read, as training will augment them, but not mixed.
        loss: The loss of a batch.
        precision: Number format of the forward passes.
        sharded: The frozen weights are spread over processes.

    Raises:
        ConfigError: The weights are sharded, so that no process can run the whole model alone.
    """
    att = job.attachment
    if att.is_calibrated:
        return
    if sharded:
        raise ConfigError(
            f"{att.name} looks at the whole model before it trains, which train.shard spreads over processes. Use "
            "train.shard=false"
        )
    with autocast(job.device, precision):
        att.calibrate(_Epoch(job, batches, loss))


@dataclass(frozen=True)
class _Epoch:
    """The batches of the first epoch, in pieces of the size that fits; each iteration begins with the first."""

    job: TrainJob
    batches: TrainBatches
    loss: BatchLoss

    def __iter__(self) -> Iterator[CalibrationBatch]:
        model, size = self.job.attachment.model, self.job.config.micro_batch_size or self.batches.batch_size
        for batch in self.batches.epoch(0):
            weights = self.loss.weights(batch)
            for start in range(0, len(batch.x_BCHW), size):
                piece = slice(start, start + size)
                loss = _Loss(self.loss, None if weights is None else weights[piece], len(batch.x_BCHW))
                yield CalibrationBatch(model, batch.x_BCHW[piece], batch.y_B[piece], loss)


@dataclass(frozen=True)
class _Loss:
    """The share of a piece in the mean loss of its batch, with the weights of its images.

    So what a method sums up over all pieces does not depend on their size.
    """

    loss: BatchLoss
    weights_B: Tensor | None
    num_images: int

    def __call__(self, output: Any, target: Any) -> Tensor:
        return self.loss(logits_of(output), target, self.weights_B, self.num_images)


def calibrate(task: Task[Any], evaluate_on_val: Callable[[Meter], object] | None) -> None:
    """Add to the state of a task what its `calibrate` returns; a task that does not define it costs no evaluation.

    Args:
        task: The task, fitted.
        evaluate_on_val: Evaluates the kept epoch on val and updates a meter; None without a val split.
    """
    if not task.calibrates:
        return
    meter = None
    if evaluate_on_val is not None:
        meter = task.new_meter()
        evaluate_on_val(meter)
    with plugin_errors(TASKS, task.name, type(task), "was calibrated"):
        task.bind(task.target, {**task.state, **task.calibrate(meter)})

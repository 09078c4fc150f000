"""Metrics and loss of a model on a split; every image counts once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from petune.base.distributed import SINGLE_PROCESS, Group
from petune.base.errors import PluginError
from petune.base.metric import LOSS, SplitMetrics
from petune.base.plugins import plugin_errors
from petune.data.batches import Batch, eval_batches, samples_per_batch
from petune.data.dataset import Split
from petune.training.batch_loss import image_losses
from petune.training.config import NumberFormat
from petune.training.job import TrainJob
from petune.training.meter import Meter
from petune.training.precision import autocast
from petune.training.stop import StopFlag
from petune.training.task import Task
from petune.training.task_registry import TASKS


def evaluate(
    job: TrainJob,
    split: Split,
    precision: NumberFormat,
    *,
    stop: StopFlag,
    by_position: Callable[[Tensor], Tensor] | None = None,
    group: Group = SINGLE_PROCESS,
    sharded: bool = False,
    meter: Meter | None = None,
    image_values: bool = False,
) -> SplitMetrics:
    """Evaluate a model in eval mode without gradients; training flags are restored afterwards.

    Args:
        job: Its model, task, preprocessing, eval_batch_size and device.
        split: The images.
        precision: Number format of the forward passes.
        stop: Checked before every batch.
        by_position: From positions in the split to outputs, where features are cached; None runs the model.
        group: Each process evaluates a part of the split, and gets the metrics on all of it.
        sharded: The processes meet inside the forward, because frozen blocks are spread over them. An error is raised
            at once then.
        meter: A new meter of the task, for callers that use it afterwards; None makes one.
        image_values: Return what the task measures of each image as well.

    Raises:
        Stopped: A signal came.
    """
    model = job.attachment.model
    forward = by_position or model
    with plugin_errors(TASKS, job.task.name, type(job.task), "made a meter"):
        meter = meter or job.task.new_meter()
    totals = _Totals(job.task, meter, job.device, image_values=image_values)
    errors: list[Exception] = []
    with eval_mode(model), torch.no_grad():
        for batch in _batches(job, split, group, positions_only=by_position is not None):
            stop.check(group, errors)
            with nullcontext() if sharded else group.collect_errors(errors):
                with autocast(job.device, precision):
                    outputs = mean_of_views(forward(batch.x_BCHW), batch.views)
                if len(batch.y_B):
                    totals.add(outputs, batch.y_B)
    group.any_rank(errors=errors)
    return totals.metrics(group, len(split))


class _Totals:
    """The meter and the sum of losses so far."""

    def __init__(self, task: Task[Any], meter: Meter, device: torch.device, *, image_values: bool) -> None:
        self.task = task
        self.meter = meter.to(device)
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.loss_and_count = torch.zeros(2, device=device, dtype=dtype)
        self.keeps_image_values = image_values
        self.image_values: dict[str, list[Tensor]] = {}

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        with plugin_errors(TASKS, self.task.name, type(self.task), "updated its metrics"):
            self.meter.update(outputs.float(), targets)
        loss_B = image_losses(self.task, outputs, targets)
        self.loss_and_count[0] += loss_B.sum()
        self.loss_and_count[1] += len(outputs)
        if not self.keeps_image_values:
            return
        with plugin_errors(TASKS, self.task.name, type(self.task), "computed its values of images"):
            values = self.task.image_values(outputs.float(), targets)
        for name, value_B in {LOSS.name: loss_B, **values}.items():
            self.image_values.setdefault(name, []).append(value_B.float())

    def metrics(self, group: Group, num_images: int) -> SplitMetrics:
        loss, count = group.all_reduce_sum(self.loss_and_count).tolist()
        with plugin_errors(TASKS, self.task.name, type(self.task), "computed its metrics"):
            values = self.meter.compute()  # adds up over processes
        missing = [metric.name for metric in self.task.metrics if metric.name not in values]
        if missing:
            raise PluginError(f"the meter of the task {self.task.name} does not compute {', '.join(missing)}")
        defined = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        return SplitMetrics(defined, loss / count, num_images, self._gathered(group, num_images))

    def _gathered(self, group: Group, num_images: int) -> dict[str, NDArray[np.float32]]:
        """Return the values of all images, of which each process has its own."""
        gathered = {}
        for name, batches in sorted(self.image_values.items()):
            values_N = torch.cat(batches)
            if len(values_N) != num_images:
                whole_N = torch.zeros(num_images, device=values_N.device)
                whole_N[group.shard(num_images)] = values_N
                values_N = group.all_reduce_sum(whole_N)
            gathered[name] = values_N.cpu().numpy()
        return gathered


def mean_of_views(outputs: Tensor, views: int) -> Tensor:
    """Return the mean of the outputs for all views of a video, (B, …).

    Args:
        outputs: (B * V, …), all views of the first video, then those of the next.
        views: V; 1 for images.
    """
    return outputs if views == 1 else outputs.view(-1, views, *outputs.shape[1:]).mean(1)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode; the training flags of its modules are restored afterwards."""
    in_train_mode = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in in_train_mode:
            module.training = True


def _batches(job: TrainJob, split: Split, group: Group, *, positions_only: bool) -> Iterator[Batch]:
    """Yield this process's batches, then blank ones without labels until every process has had equally many."""
    batch_size = job.config.eval_batch_size
    own, largest = split, len(split)
    if group.size > 1 and len(split) >= group.size:  # else every process evaluates the few images
        own = split.take(np.arange(len(split))[group.shard(len(split))])
        largest = -(-len(split) // group.size)
    batches = eval_batches(own, job.preprocess, batch_size, job.device, positions_only=positions_only)
    no_labels = torch.empty(0, dtype=torch.int64, device=job.device)
    blank = Batch(job.preprocess.blank(job.device), no_labels, np.empty(0, np.int64), 0)
    for _ in range(0, largest, samples_per_batch(split, batch_size)):
        yield next(batches, blank)

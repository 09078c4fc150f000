"""The loss of a batch: the task's loss of each image, weighted, divided once by the images of the whole batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from petune.base.errors import ConfigError, DataError, PluginError
from petune.base.plugins import plugin_errors
from petune.data.batches import Batch, batch_bounds
from petune.data.dataset import Split
from petune.data.preprocess import to_device
from petune.training.config import TrainConfig
from petune.training.mixup import check_even
from petune.training.task import Task
from petune.training.task_registry import TASKS


class BatchLoss:
    """Computes the loss of training batches, and of parts of them.

    Args:
        task: The task, fitted.
        train: The training split. Its weights are scaled to a mean of 1.
        label_smoothing: What is left for the loss to apply.
        device: Where the batches are.
    """

    def __init__(self, task: Task[Any], train: Split, label_smoothing: float, device: torch.device) -> None:
        self.task = task
        self.label_smoothing = label_smoothing
        self.device = device
        self._weights_N = None if train.weights is None else train.weights / train.weights.mean()

    def weights(self, batch: Batch) -> Tensor | None:
        """Return the weight of each image of a batch, float32 (B,); None if all count the same."""
        if self._weights_N is None:
            return None
        return to_device(torch.from_numpy(self._weights_N[batch.positions].astype(np.float32)), self.device)

    def __call__(self, outputs: Tensor, targets: Tensor, weights_B: Tensor | None, num_images: int) -> Tensor:
        """Return the share of some images in the loss of their batch: the parts of a batch add up to its mean loss.

        Args:
            outputs: Of the head, for these images.
            targets: Of these images.
            weights_B: Their weights.
            num_images: Images of the whole batch, of all processes and micro-batches together.
        """
        loss_B = image_losses(self.task, outputs, targets, self.label_smoothing)
        return (loss_B if weights_B is None else loss_B * weights_B).sum() / num_images


def image_losses(task: Task[Any], outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the task's loss of each image, (B,).

    Raises:
        PluginError: The task failed, or returned something else than one loss per image.
    """
    with plugin_errors(TASKS, task.name, type(task), "computed its loss"):
        loss_B = task.loss(outputs.float(), targets, label_smoothing)
    if loss_B.shape != (len(outputs),):
        raise PluginError(
            f"the loss of the task {task.name} has shape {tuple(loss_B.shape)} for {len(outputs)} images. It must "
            f"return one loss per image: shape ({len(outputs)},)"
        )
    return loss_B


def check_task_config(task: Task[Any], config: TrainConfig) -> None:
    """Check, before an image is read, that a task can be trained with these options.

    Raises:
        ConfigError: It cannot.
    """
    if config.label_smoothing and not task.smooths_labels:
        raise ConfigError(
            f"label_smoothing does not go with the task {_with_options(task)}. Set train.label_smoothing to 0",
            cli_hint="Drop --label-smoothing",
        )
    if config.mixes:
        with plugin_errors(TASKS, task.name, type(task), "was asked to mix targets"):
            task.mix(config.mixup, config.cutmix, config.label_smoothing)
    if config.sampling == "balanced" and task.target_kind != "class":
        raise ConfigError(
            f"sampling=balanced draws every class equally often, but the task {task.name} is for targets of kind "
            f"{task.target_kind!r}. Use train.sampling=all"
        )


def check_task_options(task: Task[Any], config: TrainConfig, train: Split, num_processes: int) -> None:
    """Check, before a model is built, that a task can be trained with these options on these images.

    Raises:
        ConfigError: It cannot.
        DataError: The weights of the images are negative, not finite, or all 0.
    """
    check_task_config(task, config)
    if config.mixes:
        if train.weights is not None:
            raise ConfigError(
                "mixup and cutmix do not go with weights of the images. Set both to 0, or drop the weights",
                cli_hint="Drop --mixup and --cutmix",
            )
        largest = int(np.diff(batch_bounds(len(train), config.batch_size, even=True)).max())
        check_even(largest)
    micro_batch = config.micro_batch_size
    if task.needs_whole_batch and (num_processes > 1 or (micro_batch and micro_batch < config.batch_size)):
        raise ConfigError(
            f"the loss of the task {_with_options(task)} depends on the whole batch. Train in one process, without "
            "train.micro_batch_size"
        )
    weights = train.weights
    if weights is not None and not (np.isfinite(weights).all() and weights.min() >= 0 and weights.sum() > 0):
        raise DataError("weights of the training images must be 0 or more, finite, and not all 0. Correct them")


def _with_options(task: Task[Any]) -> str:
    """Return the name of a task and the options that differ from their defaults: `multi_label:loss=zlpr`."""
    options = task.config.model_dump(exclude_defaults=True)
    return ":".join([task.name, *([",".join(f"{key}={value}" for key, value in options.items())] if options else [])])

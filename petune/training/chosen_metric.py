"""Check before a training that the metric that is to choose the epoch has a value on val."""

from __future__ import annotations

import math
from typing import Any

import torch

from petune.base.errors import ConfigError
from petune.base.metric import LOSS, Metric
from petune.base.plugins import plugin_errors
from petune.data.dataset import Split
from petune.training.task import Task, choose_metrics
from petune.training.task_registry import TASKS

CHUNK = 4096


def check_chosen_metric(task: Task[Any], choose: str | None, val: Split, device: torch.device) -> str:
    """Return a note if the task's first metric has no value on val, so that the loss chooses; empty if it has one.

    Args:
        task: The task, fitted.
        choose: As in `train.choose`.
        val: The val split.
        device: Where metrics are computed; several processes compute them together.

    Raises:
        ConfigError: `choose` names a metric without a value, such as R² where all numbers are equal.
    """
    metric = choose_metrics(task, choose)[0]
    if metric.name in {LOSS.name, *task.always_defined} or not len(val) or val.has_masks:
        return ""
    if _is_defined(task, metric, val, device):
        return ""
    if choose is None:
        return f"{metric.label} has no value on the images of val, so the loss on val chooses the epoch"
    raise ConfigError(
        f"train.choose is {choose}, but {metric.label} has no value on the images of val: their targets do not vary "
        "enough, or a class has no image. Choose another metric, or loss",
        cli_hint="Write --set train.choose=loss",
    )


def _is_defined(task: Task[Any], metric: Metric, val: Split, device: torch.device) -> bool:
    """Return whether a metric has a value, which depends on the targets alone, by measuring random outputs."""
    with plugin_errors(TASKS, task.name, type(task), "measured random outputs"):
        return _value(task, metric, val, device)


def _value(task: Task[Any], metric: Metric, val: Split, device: torch.device) -> bool:
    meter = task.new_meter().to(device)
    generator = torch.Generator().manual_seed(0)
    for start in range(0, len(val), CHUNK):
        targets = torch.tensor(val.targets[start : start + CHUNK])
        outputs = torch.randn(len(targets), task.num_outputs(), generator=generator)
        meter.update(outputs.to(device), targets.to(device))
    value = meter.compute().get(metric.name)
    return value is not None and math.isfinite(value)

"""Let a task choose on val what it needs to predict, such as thresholds, when training ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from petune.base.plugins import plugin_errors
from petune.training.meter import Meter
from petune.training.task import Task
from petune.training.task_registry import TASKS


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

"""`check_task`: the contract of tasks in executable form, for authors of losses and metrics."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import torch
from pydantic_core import to_jsonable_python
from torch import Tensor

from petune.base.arguments import check_arguments
from petune.base.errors import ConfigError
from petune.plugin_dev.finding import Finding, Property, examine_all, names_of
from petune.plugin_dev.task_trial import TaskTrial
from petune.training.task import Task
from petune.training.task_registry import build_task

TOLERANCE = 1e-5


def check_task(task: str | Task[Any]) -> list[str]:
    """Check the contract of a task on made-up targets of its kind.

    Args:
        task: A registered name, with options if needed, as `count:power=2`; or a Task.

    Returns:
        The names of the properties, all of which hold.

    Raises:
        ContractViolation: The first property that does not hold.
        UnknownName: There is no such task.
    """
    check_arguments("petune.check_task", task=(task, str | Task))
    return names_of(examine_task(task), task if isinstance(task, str) else type(task).__name__)


def examine_task(task: str | Task[Any]) -> Iterator[Finding]:
    """Yield the finding for each property, as `check_task`, without stopping at the first that does not hold."""
    built = build_task(task) if isinstance(task, str) else task
    yield from examine_all(PROPERTIES, TaskTrial(built))


def _state(t: TaskTrial) -> str:
    state = t.task.fit(t.split, t.target)
    if json.loads(json.dumps(state)) != state:
        return f"fit() returned {state}, which JSON changes"
    return "" if t.task.num_outputs() >= 1 else f"num_outputs() is {t.task.num_outputs()}"


def _loss_per_image(t: TaskTrial) -> str:
    loss_B = t.loss(t.outputs)
    if loss_B.shape != (len(t.outputs),):
        return f"loss() returned shape {tuple(loss_B.shape)} for {len(t.outputs)} images"
    if loss_B.dtype != torch.float32:
        return f"loss() returned {loss_B.dtype}"
    return "" if loss_B.isfinite().all() else "the loss of finite outputs is NaN or infinite"


def _gradients(t: TaskTrial) -> str:
    outputs = t.outputs.clone().requires_grad_()
    t.loss(outputs).sum().backward()  # type: ignore[no-untyped-call]
    if outputs.grad is None or not outputs.grad.isfinite().all():
        return "the outputs have no finite gradient"
    silent = (outputs.grad.flatten(1) == 0).all(1)
    return "the outputs of no image have a gradient other than zero" if silent.all() else ""


def _independent_images(t: TaskTrial) -> str:
    if t.task.needs_whole_batch:
        return ""
    alone = torch.cat([t.loss(t.outputs[i : i + 1], t.targets[i : i + 1]) for i in range(len(t.outputs))])
    change = float((alone - t.loss(t.outputs)).abs().max())
    if change < TOLERANCE * max(1.0, float(alone.abs().max())):
        return ""
    return f"an image alone has a loss that differs by {change:.2g}. If that is intended, set needs_whole_batch = True"


def _unchanged_targets(t: TaskTrial) -> str:
    targets = t.targets
    t.loss(t.outputs, targets)
    return "" if torch.equal(targets, t.targets) else "loss() changed the targets in place"


def _learning(t: TaskTrial) -> str:
    before, after = float(t.loss(t.outputs).mean()), float(t.loss(t.fitted_outputs).mean())
    return "" if after < before else f"gradient steps on the outputs took the loss from {before:.3g} to {after:.3g}"


def _metric_values(t: TaskTrial) -> str:
    values, names = t.measured(t.outputs, len(t.outputs)), {metric.name for metric in t.task.metrics}
    if not names:
        return "metrics is empty"
    if names - values.keys():
        return f"compute() returned {sorted(values)}, without {sorted(names - values.keys())}"
    wrong = [name for name, value in values.items() if not isinstance(value, float) or math.isinf(value)]
    return f"compute() returned {values[wrong[0]]!r} for {wrong[0]}" if wrong else ""


def _metrics_by_batch(t: TaskTrial) -> str:
    whole = t.measured(t.outputs, len(t.outputs))
    for size in (1, 5):
        for name, value in t.measured(t.outputs, size).items():
            both_undefined = math.isnan(value) and math.isnan(whole[name])
            if not both_undefined and not math.isclose(value, whole[name], rel_tol=1e-4, abs_tol=1e-4):
                return f"{name} is {value:.5g} in batches of {size}, and {whole[name]:.5g} in one"
    return ""


def _direction(t: TaskTrial) -> str:
    main = t.task.metrics[0]
    before, after = (t.measured(outputs, len(outputs))[main.name] for outputs in (t.outputs, t.fitted_outputs))
    if (after > before) == main.higher_is_better and after != before:
        return ""
    return (
        f"{main.name} went from {before:.4g} to {after:.4g} while the loss fell, and higher_is_better is "
        f"{main.higher_is_better}"
    )


def _predictions(t: TaskTrial) -> str:
    predictions = list(t.task.predict(t.outputs))
    if len(predictions) != len(t.outputs):
        return f"{len(predictions)} for {len(t.outputs)} images"
    for prediction in predictions:
        text = json.dumps(to_jsonable_python(prediction))  # as `petune predict` shows it
        if json.loads(text) is None:
            return "predict() returned None for an image"
        if "NaN" in text or "Infinity" in text:
            return f"predict() returned {text} for finite outputs"
    alone = t.task.predict(t.outputs[:1])
    return "" if len(alone) == 1 else f"{len(alone)} for a single image"


def _calibration(t: TaskTrial) -> str:
    if not t.task.calibrates:
        return ""
    with_val, without = t.task.calibrate(t.metered(t.outputs, len(t.outputs))), t.task.calibrate(None)
    if json.loads(json.dumps([with_val, without])) != [with_val, without]:
        return f"calibrate() returned {with_val}, and {without} without val, which JSON changes"
    if with_val.keys() != without.keys():
        return f"calibrate() returned {sorted(with_val)}, and {sorted(without)} without val"
    calibrated = t.restored(with_val)
    predictions = calibrated.predict(t.outputs)
    return "" if len(predictions) == len(t.outputs) else f"{len(predictions)} predictions for {len(t.outputs)} images"


def _restored(t: TaskTrial) -> str:
    again = t.restored()
    if again.num_outputs() != t.task.num_outputs():
        return f"num_outputs() is {again.num_outputs()}, and was {t.task.num_outputs()}"
    if not torch.equal(again.loss(t.outputs, t.targets), t.loss(t.outputs)):
        return "the loss differs"
    return "" if repr(again.predict(t.outputs)) == repr(t.task.predict(t.outputs)) else "predictions differ"


def _smoothing(t: TaskTrial) -> str:
    if not t.task.smooths_labels:
        return ""
    smoothed = t.task.loss(t.outputs, t.targets, 0.1)
    if torch.equal(smoothed, t.loss(t.outputs)):
        return "label_smoothing changes nothing. Set smooths_labels = False"
    return "" if smoothed.isfinite().all() else "the smoothed loss is NaN or infinite"


def _mixing(t: TaskTrial) -> str:
    try:
        mix = t.task.mix(0.8, 1.0, 0.0)
    except ConfigError:
        return ""
    images = torch.rand(len(t.targets), 3, 16, 16)
    _, targets = mix(images, t.targets.clone())
    loss_B: Tensor = t.task.loss(t.outputs, targets)
    fits = loss_B.shape == (len(t.outputs),) and bool(loss_B.isfinite().all())
    return "" if fits else "mixed targets have no finite loss per image"


PROPERTIES: tuple[Property[TaskTrial], ...] = (
    Property("state", "what fit() returns survives JSON", _state),
    Property("loss per image", "loss() returns one finite float32 per image", _loss_per_image),
    Property("gradients", "the loss has a gradient", _gradients),
    Property("independent images", "the loss of an image does not depend on the others", _independent_images),
    Property("unchanged targets", "loss() leaves the targets alone", _unchanged_targets),
    Property("learning", "gradient steps reduce the loss", _learning),
    Property("metric values", "the meter returns every metric", _metric_values),
    Property("metrics by batch", "the metrics do not depend on the batches", _metrics_by_batch),
    Property("direction", "the first metric improves as the loss falls", _direction),
    Property("predictions", "predict() returns one prediction per image, of what JSON has", _predictions),
    Property("calibration", "what calibrate() returns survives JSON, and is complete without val", _calibration),
    Property("restored", "restored from JSON, the task computes the same", _restored),
    Property("label smoothing", "it acts, if smooths_labels says so", _smoothing),
    Property("mixing", "mixed targets have a loss, if they can be mixed", _mixing),
)

"""Evaluate a model on images: the task's metrics, and one row for each image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from petune.base.plugins import plugin_errors
from petune.serving.evaluation.eval_images import EvalImages
from petune.serving.evaluation.metrics import Evaluation, compute_class_metrics, compute_metrics
from petune.serving.evaluation.rows import ImageRow, image_rows
from petune.serving.predict import Predictor
from petune.training.batch_loss import image_losses
from petune.training.evaluate import mean_of_views
from petune.training.task_registry import TASKS


@dataclass(frozen=True)
class Evaluated:
    """An evaluation with the result of each image.

    Attributes:
        evaluation: The metrics.
        rows: One for each image, in order.
        predictor, images: Model and images, to show some of them.
    """

    evaluation: Evaluation
    rows: list[ImageRow]
    predictor: Predictor
    images: EvalImages


def evaluate_images(predictor: Predictor, images: EvalImages, batch_size: int) -> Evaluated:
    """Evaluate a model on images, each once.

    Args:
        predictor: The model.
        images: What to evaluate on.
        batch_size: Images per forward.
    """
    task = predictor.task
    meter = task.new_meter().to(predictor.device)
    rows: list[ImageRow] = []
    batches: list[tuple[Tensor, Tensor]] = []
    for names, x_BCHW, targets in images.batches(batch_size):
        outputs, targets = mean_of_views(predictor.outputs(x_BCHW), images.views), targets.to(predictor.device)
        with plugin_errors(TASKS, task.name, type(task), "updated its metrics"):
            meter.update(outputs, targets)
        rows += image_rows(task, names, outputs, targets, image_losses(task, outputs, targets))
        if task.target_kind == "class":
            batches.append((outputs.cpu(), targets.cpu()))
    with plugin_errors(TASKS, task.name, type(task), "computed its metrics"):
        values = {name: float(value) for name, value in meter.compute().items() if math.isfinite(value)}
    about: dict[str, Any] = {
        "method": str(predictor.method),
        "task": task.name,
        "dataset": images.dataset,
        "split": images.split,
        "source": images.source,
        "precision": predictor.precision,
        "run_precision": predictor.run_precision,
        "num_images": len(rows),
        "trained_on": None if images.num_trained_on is None else images.num_trained_on > 0,
        "num_trained_on": images.num_trained_on,
        "loss": sum(row.loss for row in rows) / len(rows),
        "metrics": values,
        "metric_info": task.metrics,
    }
    if any(row.is_wrong is None for row in rows) or not batches:
        return Evaluated(Evaluation(**about), rows, predictor, images)
    outputs_NC, labels_N = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    evaluation = _class_evaluation(rows, outputs_NC, labels_N, predictor.classes, about)
    return Evaluated(evaluation, rows, predictor, images)


def _class_evaluation(
    rows: Sequence[ImageRow], outputs_NC: Tensor, labels_N: Tensor, classes: Sequence[str], about: dict[str, Any]
) -> Evaluation:
    """Return the metrics of predicted classes; of their probabilities as well, if the outputs are logits of them."""
    confidences = [row.confidence for row in rows if row.confidence is not None]
    if outputs_NC.shape == (len(confidences), len(classes)):
        largest_N = outputs_NC.softmax(1).amax(1)
        if torch.allclose(largest_N, torch.tensor(confidences), atol=1e-4):
            return compute_metrics(outputs_NC, labels_N, classes, **about)
    numbers = {name: number for number, name in enumerate(classes)}
    predicted_N = torch.tensor([numbers[row.prediction] for row in rows])
    return compute_class_metrics(predicted_N, labels_N, classes, **about)

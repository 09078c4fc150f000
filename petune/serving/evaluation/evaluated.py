"""Evaluate a model on images: the task's metrics, and one row for each image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from petune.serving.evaluation.eval_images import EvalImages
from petune.serving.evaluation.metrics import Evaluation, compute_metrics
from petune.serving.evaluation.rows import ImageRow, image_rows
from petune.serving.predict import Predictor
from petune.training.batch_loss import image_losses
from petune.training.tasks.classification import Classification


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
    logits: list[tuple[Tensor, Tensor]] = []
    for names, x_BCHW, targets in images.batches(batch_size):
        outputs, targets = predictor.outputs(x_BCHW), targets.to(predictor.device)
        meter.update(outputs, targets)
        rows += image_rows(task, names, outputs, targets, image_losses(task, outputs, targets))
        if isinstance(task, Classification):  # the outputs of other tasks need not be logits
            logits.append((outputs.cpu(), targets.cpu()))
    values = {name: float(value) for name, value in meter.compute().items() if math.isfinite(value)}
    about: dict[str, Any] = {
        "method": str(predictor.method),
        "task": task.name,
        "dataset": images.dataset,
        "split": images.split,
        "source": images.source,
        "precision": predictor.precision,
        "num_images": len(rows),
        "loss": sum(row.loss for row in rows) / len(rows),
        "metrics": values,
        "metric_info": task.metrics,
    }
    evaluation = Evaluation(**about)
    if logits:
        outputs_NC, labels_N = (torch.cat(tensors) for tensors in zip(*logits, strict=True))
        evaluation = compute_metrics(outputs_NC, labels_N, predictor.classes, **about)
    return Evaluated(evaluation, rows, predictor, images)

"""Names of tasks and metrics on the Hugging Face Hub, and the line of a card's example that prints a prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from petune.base.metric import Metric

PIPELINES = {"class": "image-classification", "multi_hot": "image-classification", "mask": "image-segmentation"}
"""Kind of targets to the hub's `pipeline_tag`; the hub has none for numbers."""
HUB_TASKS = {**PIPELINES, "number": "image-regression"}
"""Kind of targets to the type of task in the results."""
HUB_METRICS = {
    "top1": ("accuracy", "top-1 accuracy"),
    "top5": ("top_5_accuracy", "top-5 accuracy"),
    "macro_f1": ("f1", "macro-F1"),
    "micro_f1": ("f1", "micro-F1"),
    "r2": ("r_squared", "R²"),
    "miou": ("mean_iou", "mIoU"),
}
"""The hub's type and name of a metric, where it has its own."""
BUILT_IN = {"classification", "multi_label", "regression", "segmentation"}
SHOWN = {"multi_hot": "prediction.top", "number": "prediction.numbers", "mask": "prediction.fractions"}
"""Kind of targets to what an example prints."""


def target_kind(task: Mapping[str, Any] | None) -> str:
    """Return the kind of targets of a recorded task; adapters that record none are of classification."""
    target = (task or {}).get("target")
    kind = target.get("kind") if isinstance(target, Mapping) else None
    return kind if isinstance(kind, str) and kind in HUB_TASKS else "class"


def target_names(task: Mapping[str, Any] | None) -> list[str]:
    """Return the names of the targets of a recorded task."""
    target = (task or {}).get("target")
    names = target.get("names") if isinstance(target, Mapping) else None
    return [str(name) for name in names] if isinstance(names, list | tuple) else []


def example_of(task: Mapping[str, Any] | None) -> tuple[str, str]:
    """Return the further arguments of a predictor in an example, and the expression that it prints."""
    if (task or {}).get("name", "classification") not in BUILT_IN:
        return "", "prediction"
    kind = target_kind(task)
    return ", top_k=3" if kind == "class" else "", SHOWN.get(kind, "prediction.top")


def num_outputs(metadata: Mapping[str, Any]) -> int | None:
    """Return the outputs of the classifier; None if it is not known."""
    task, classes = metadata.get("task"), metadata.get("classes")
    if isinstance(metadata.get("num_outputs"), int):
        return int(metadata["num_outputs"])
    if isinstance(task, Mapping) and target_names(task):
        return len(target_names(task))
    return len(classes) if isinstance(classes, list | tuple) and classes else None


def hub_metric(metric: Metric) -> tuple[str, str]:
    """Return the hub's type and name of a metric."""
    return HUB_METRICS.get(metric.name, (metric.name, metric.label))


def dense_head_code(task: Mapping[str, Any] | None) -> str:
    """Return the line that adds the head of segmentation to `model`; empty for other tasks."""
    if (task or {}).get("name") != "segmentation":
        return ""
    options = (task or {}).get("options")
    blocks = options.get("blocks", "last:1") if isinstance(options, Mapping) else "last:1"
    return f"petune.add_dense_head(model, {len(target_names(task))}, blocks={blocks!r})"

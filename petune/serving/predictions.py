"""Predictions for people: classes, labels, numbers, or what the task of a plugin returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic_core import to_jsonable_python
from torch import Tensor

from petune.base.errors import PluginError
from petune.base.plugins import plugin_errors
from petune.training.task import Task
from petune.training.task_registry import TASKS

PredictionKind = Literal["classes", "labels", "numbers", "other"]
"""`classes`: the most probable first; `labels`: those at or above their thresholds; `numbers`: by name."""


class ClassProbability(NamedTuple):
    """A class or a label, and its probability, 0 to 1."""

    name: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The prediction for one image.

    Attributes:
        image: Its path, or its position among the given images.
        top: The most probable classes, or all labels at or above their thresholds, the most probable first; empty for
            other tasks, and if the image cannot be read.
        error: Why the image cannot be read; empty if it can.
        kind: Which fields hold the prediction: `top` for classes and labels, `numbers`, or `output`.
        numbers: Predicted numbers by name, in the units of the targets.
        output: What the task of a plugin predicts, as JSON data.
    """

    image: str
    top: tuple[ClassProbability, ...] = ()
    error: str = ""
    kind: PredictionKind = "classes"
    numbers: Mapping[str, float] | None = None
    output: Any = None


def predictions_of(task: Task[Any], names: list[str], outputs: Tensor, top_k: int | None) -> list[Prediction]:
    """Return the predictions of a batch.

    Args:
        task: What the model was trained for.
        names: Of the images.
        outputs: Of the head, float32 (B, …).
        top_k: Number of classes for an image; None gives all.

    Raises:
        PluginError: The task of a plugin fails, or does not predict each image.
    """
    with plugin_errors(TASKS, task.name, type(task), "predicted"):
        values = list(task.predict(outputs))
    if len(values) != len(names):
        raise PluginError(f"the task {task.name} returned {len(values)} predictions for {len(names)} images")
    return [_prediction(task, name, value, top_k) for name, value in zip(names, values, strict=True)]


def _prediction(task: Task[Any], name: str, value: Any, top_k: int | None) -> Prediction:
    kind = _kind_of(task, value)
    if kind == "other":
        return Prediction(name, kind=kind, output=to_jsonable_python(value, fallback=_plain))
    if kind == "numbers":
        return Prediction(name, kind=kind, numbers={key: float(number) for key, number in value.items()})
    pairs = [ClassProbability(key, float(value[key])) for key in sorted(value, key=lambda key: -value[key])]
    return Prediction(name, tuple(pairs[:top_k] if kind == "classes" else pairs), kind=kind)


def _kind_of(task: Task[Any], value: Any) -> PredictionKind:
    """Return the form of a prediction; only names of the targets with numbers have one that petune knows."""
    is_named = isinstance(value, Mapping) and value.keys() <= set(task.target.names)
    if not is_named or not all(isinstance(number, int | float) for number in value.values()):
        return "other"
    if task.target_kind == "number":
        return "numbers"
    if task.target_kind == "mask" or not all(0 <= probability <= 1 for probability in value.values()):
        return "other"
    return "classes" if task.target_kind == "class" else "labels"


def _plain(value: Any) -> Any:
    """Return a value that JSON lacks as one that it has."""
    if isinstance(value, Tensor):
        return value.tolist()
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)

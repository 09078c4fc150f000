"""Predictions for people: classes, labels, numbers, or what the task of a plugin returns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic_core import to_jsonable_python
from torch import Tensor

from petune.base.errors import PluginError
from petune.base.plugins import plugin_errors
from petune.serving.whole_image import classes_of
from petune.training.task import Task
from petune.training.task_registry import TASKS

PredictionKind = Literal["classes", "labels", "numbers", "mask", "other"]
"""`classes`: the most probable first; `labels`: those at or above their thresholds; `numbers`: by name; `mask`: of all
pixels."""


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
        kind: Which fields hold the prediction: `top` for classes and labels, `numbers`, `mask` and `fractions`, or
            `output`.
        numbers: Predicted numbers by name, in the units of the targets.
        mask: The class of each pixel as its number, uint8 in the size of the image (after its EXIF orientation).
        fractions: The share of the pixels that each class has, by name, the largest first.
        output: What the task of a plugin predicts, as JSON data.
    """

    image: str
    top: tuple[ClassProbability, ...] = ()
    error: str = ""
    kind: PredictionKind = "classes"
    numbers: Mapping[str, float] | None = None
    mask: NDArray[np.uint8] | None = field(default=None, compare=False, repr=False)
    fractions: Mapping[str, float] | None = None
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
    with plugin_errors(TASKS, task.name, type(task), "predicted"):
        return [_prediction(task, name, value, top_k) for name, value in zip(names, values, strict=True)]


def prediction_text(prediction: Prediction) -> str:
    """Return a prediction of any kind as text: what a task returns as text as it is, everything else as JSON."""
    output = prediction.output
    if prediction.kind != "other":
        output = dict(prediction.top or prediction.numbers or prediction.fractions or {})
    return output if isinstance(output, str) else json.dumps(output, ensure_ascii=False)


def mask_prediction(task: Task[Any], name: str, outputs_Chw: Tensor, size: tuple[int, int]) -> Prediction:
    """Return the prediction of a whole image.

    Args:
        task: What the model was trained for.
        name: Of the image.
        outputs_Chw: See `whole_outputs`.
        size: Height and width of the image.

    Raises:
        PluginError: The task of a plugin fails.
    """
    (prediction,) = predictions_of(task, [name], outputs_Chw[None], None)
    if len(outputs_Chw) != len(task.target.names):
        return prediction
    mask = classes_of(outputs_Chw, size)
    if prediction.kind != "mask":
        return replace(prediction, mask=mask)
    return replace(prediction, mask=mask, fractions=fractions_of(mask, task.target.names))


def fractions_of(mask: NDArray[np.uint8], names: Sequence[str]) -> dict[str, float]:
    """Return the share of the pixels of a mask that each class has, by name, the largest first."""
    shares = np.bincount(mask.ravel(), minlength=len(names)) / mask.size
    pairs = zip(names, shares.tolist(), strict=True)
    return dict(sorted(pairs, key=lambda pair: -pair[1]))


def _prediction(task: Task[Any], name: str, value: Any, top_k: int | None) -> Prediction:
    kind = _kind_of(task, value)
    if kind == "other":
        return Prediction(name, kind=kind, output=to_jsonable_python(value, fallback=_plain))
    if kind == "numbers":
        return Prediction(name, kind=kind, numbers={key: float(number) for key, number in value.items()})
    if kind == "mask":
        return Prediction(name, kind=kind, fractions={key: float(share) for key, share in value.items()})
    pairs = [ClassProbability(key, float(value[key])) for key in sorted(value, key=lambda key: -value[key])]
    return Prediction(name, tuple(pairs[:top_k] if kind == "classes" else pairs), kind=kind)


def _kind_of(task: Task[Any], value: Any) -> PredictionKind:
    """Return the form of a prediction; only names of the targets with numbers have one that petune knows."""
    is_named = isinstance(value, Mapping) and value.keys() <= set(task.target.names)
    if not is_named or not all(isinstance(number, Real) for number in value.values()):
        return "other"
    if not value and task.target_kind != "multi_hot":
        return "other"
    if task.target_kind == "number":
        return "numbers"
    if not all(0 <= probability <= 1 for probability in value.values()):
        return "other"
    if task.target_kind == "mask":
        return "mask"
    return "classes" if task.target_kind == "class" else "labels"


def _plain(value: Any) -> Any:
    """Return a value that JSON lacks as one that it has."""
    if isinstance(value, Tensor):
        return value.tolist()
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)

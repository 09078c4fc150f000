"""One row per evaluated image: target, prediction, loss and the outputs, for a table and for the pages of mistakes.

Shapes: B batch, C classes, K numbers.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from petune.serving.predictions import Prediction, prediction_text, predictions_of
from petune.training.task import Task
from petune.training.tasks.multi_label import MultiLabel

if TYPE_CHECKING:
    import pyarrow as pa

Cells = dict[str, Any]
"""The columns of one image that depend on the kind of targets."""


@dataclass(frozen=True)
class ImageRow:
    """The result of one image.

    Attributes:
        image: Its file or key, or its position in the split.
        target, prediction: For people.
        loss: The task's loss.
        is_wrong: The prediction differs from the target; always True for numbers and masks, and None for what the task
            of a plugin predicts, if it is no class or label.
        confidence: How sure the model is of what is wrong, 0 to 1; None for numbers and masks.
        cells: Further columns of the table.
    """

    image: str
    target: str
    prediction: str
    loss: float
    is_wrong: bool | None
    confidence: float | None
    cells: Cells


def image_rows(
    task: Task[Any], names: Sequence[str], outputs: Tensor, targets: Tensor, losses_B: Tensor
) -> list[ImageRow]:
    """Return the rows of a batch.

    Args:
        task: What the model was trained for.
        names: Of the images.
        outputs: Of the head, float32 (B, …).
        targets: As in the dataset, (B, …).
        losses_B: The task's loss of each image.
    """
    outputs, values = outputs.cpu(), targets.cpu().numpy()
    describe = {"class": _class_row, "multi_hot": _labels_row, "number": _numbers_row, "mask": _mask_row}[
        task.target_kind
    ]
    has_masks = task.target_kind == "mask" and outputs.shape[1] == len(task.target.names)
    predictions = [Prediction("")] * len(names) if has_masks else predictions_of(task, list(names), outputs, None)
    return [
        describe(task, name, values[i], predictions[i], outputs[i], float(loss))
        for i, (name, loss) in enumerate(zip(names, losses_B.tolist(), strict=True))
    ]


def _class_row(
    task: Task[Any], name: str, value: Any, prediction: Prediction, output_C: Tensor, loss: float
) -> ImageRow:
    label = task.target.names[int(value)]
    if prediction.top:
        predicted, confidence = prediction.top[0]
    elif prediction.output in task.target.names:
        predicted, confidence = prediction.output, None
    else:
        return _other_row(name, {"label": label}, label, prediction, loss)
    cells = {"label": label, "prediction": predicted, "correct": label == predicted, "loss": loss}
    if prediction.top:
        cells |= {f"p({other})": dict(prediction.top).get(other) for other in task.target.names}
    return ImageRow(name, label, predicted, loss, label != predicted, confidence, cells)


def _labels_row(
    task: Task[Any], name: str, value_C: Any, prediction: Prediction, output_C: Tensor, loss: float
) -> ImageRow:
    names = task.target.names
    labels = [names[i] for i in np.flatnonzero(value_C)]
    text = ", ".join(labels) or "none"
    named = _predicted_labels(prediction)
    if named is None or not named <= {*names}:
        return _other_row(name, {"labels": labels}, text, prediction, loss)
    predicted = [other for other in names if other in named]
    probabilities = dict(prediction.top)
    if isinstance(task, MultiLabel) and len(output_C) == len(names):  # also of labels below their thresholds
        probabilities = dict(zip(names, torch.sigmoid(output_C).tolist(), strict=True))
    wrong = {*labels} ^ {*predicted}
    sure = [p if other in named else 1 - p for other, p in probabilities.items() if other in wrong]
    cells = {"labels": labels, "predictions": predicted, "correct": not wrong, "loss": loss}
    cells |= {f"p({other})": probabilities.get(other) for other in names} if probabilities else {}
    predicted_text = ", ".join(predicted) or "none"
    return ImageRow(name, text, predicted_text, loss, bool(wrong), max(sure, default=None), cells)


def _predicted_labels(prediction: Prediction) -> set[str] | None:
    """Return the labels that are predicted; None if the prediction is something else."""
    if prediction.kind == "labels":
        return {name for name, _ in prediction.top}
    is_list = isinstance(prediction.output, list) and all(isinstance(label, str) for label in prediction.output)
    return {*prediction.output} if is_list else None


def _numbers_row(
    task: Task[Any], name: str, value_K: Any, prediction: Prediction, output_K: Tensor, loss: float
) -> ImageRow:
    names, true = task.target.names, task.target.text(value_K)
    numbers = _predicted_numbers(names, prediction)
    targets = {_column(number): value for number, value in zip(names, value_K.tolist(), strict=True)}
    if numbers is None:
        return _other_row(name, targets, true, prediction, loss)
    cells: Cells = {}
    for number, (column, value) in zip(names, targets.items(), strict=True):
        predicted = numbers[number]
        cells |= {column: value, f"predicted {number}": predicted, f"error of {number}": predicted - value}
    text = task.target.text([numbers[number] for number in names])
    return ImageRow(name, true, text, loss, True, None, {**cells, "loss": loss})


def _column(number: str) -> str:
    """Return the name of the column of the true values of a number, which no other column has."""
    is_taken = number in {"image", "loss", "prediction"} or number.startswith(("true ", "predicted ", "error of "))
    return f"true {number}" if is_taken else number


def _predicted_numbers(names: Sequence[str], prediction: Prediction) -> dict[str, float] | None:
    """Return the predicted numbers by name; None unless all are predicted, by name or in order."""
    if prediction.kind == "numbers":
        numbers = dict(prediction.numbers or {})
    else:
        output = prediction.output
        listed = output if isinstance(output, list) else [output]
        is_numbers = len(listed) == len(names) and all(isinstance(number, int | float) for number in listed)
        numbers = dict(zip(names, listed, strict=True)) if is_numbers else {}
    return numbers if numbers.keys() == {*names} else None


def _other_row(name: str, target: Cells, target_text: str, prediction: Prediction, loss: float) -> ImageRow:
    """Return the row of a prediction that cannot be compared with the target; it is shown as it is, or as JSON."""
    text = prediction_text(prediction)
    return ImageRow(name, target_text, text, loss, None, None, {**target, "prediction": text, "loss": loss})


def _mask_row(
    task: Task[Any], name: str, mask_SS: Any, prediction: Prediction, output_CSS: Tensor, loss: float
) -> ImageRow:
    if len(output_CSS) != len(task.target.names):
        return _other_row(name, {}, "", prediction, loss)
    counted = mask_SS != task.target.ignore_index
    true, predicted = mask_SS[counted], output_CSS.argmax(0).numpy()[counted]
    accuracy = 100 * float((true == predicted).mean()) if counted.any() else None
    names = dict(enumerate(task.target.names))
    ious = {names.get(c): _iou(true == c, predicted == c) for c in np.union1d(true, predicted).tolist()}
    miou = float(np.mean(list(ious.values()))) if ious else None
    text = "" if accuracy is None else f"{accuracy:.1f} % of the pixels right"
    cells = {"pixel_accuracy": accuracy, "miou": miou, "loss": loss}
    cells |= {f"iou({other})": ious.get(other) for other in task.target.names}
    return ImageRow(name, "", text, loss, True, None, cells)


def _iou(true_P: Any, predicted_P: Any) -> float:
    """Return intersection over union of two sets of pixels, at least one of which is not empty, in percent."""
    return 100 * float((true_P & predicted_P).sum() / (true_P | predicted_P).sum())


def table_of(rows: Sequence[ImageRow]) -> pa.Table:
    """Return the rows as a table: `image` first, then what the kind of targets has."""
    import pyarrow as pa

    columns = dict.fromkeys(["image", *(column for row in rows for column in row.cells)])
    return pa.Table.from_pylist([{**columns, "image": row.image, **row.cells} for row in rows])


def to_parquet(table: pa.Table) -> bytes:
    """Return a table as a Parquet file."""
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def to_csv(table: pa.Table) -> bytes:
    """Return a table as a CSV file; several labels are one cell, separated by `;`, or JSON if a label has one."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.csv

    for i, field in enumerate(table.schema):
        if pa.types.is_list(field.type):
            labels = table.column(i).cast(pa.list_(pa.string()))
            joined = pc.binary_join(labels, ";")
            if any(";" in label for row in labels.to_pylist() for label in row or ()):
                joined = pa.array([json.dumps(row, ensure_ascii=False) for row in labels.to_pylist()])
            table = table.set_column(i, field.name, joined)
    buffer = io.BytesIO()
    pyarrow.csv.write_csv(table, buffer)
    return buffer.getvalue()

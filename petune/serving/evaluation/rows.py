"""One row per evaluated image: target, prediction, loss and the outputs, for a table and for the pages of mistakes.

Shapes: B batch, C classes, K numbers.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from petune.training.task import Task

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
        is_wrong: The prediction differs from the target; always True for numbers and masks.
        confidence: How sure the model is of what is wrong, 0 to 1; None for numbers and masks.
        cells: Further columns of the table.
    """

    image: str
    target: str
    prediction: str
    loss: float
    is_wrong: bool
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
    form = {"class": _class_row, "multi_hot": _labels_row, "number": _numbers_row, "mask": _mask_row}[task.target_kind]
    predictions = [None] * len(names) if task.target_kind == "mask" else task.predict(outputs)
    rows = []
    for i, (name, loss) in enumerate(zip(names, losses_B.tolist(), strict=True)):
        known = predictions[i] is None or isinstance(predictions[i], Mapping)
        describe = form if known else _other_row
        rows.append(describe(task, name, values[i], predictions[i], outputs[i], float(loss)))
    return rows


def _other_row(task: Task[Any], name: str, value: Any, prediction: Any, output: Tensor, loss: float) -> ImageRow:
    """Describe what the task of a plugin predicts in a form of its own, such as the name of a class."""
    target, text = task.target.text(value), str(prediction)
    is_wrong = text != target
    column = "label" if task.target_kind == "class" else "target"
    correct = {"correct": not is_wrong} if text in task.target.names else {}
    cells = {column: target, "prediction": text, **correct, "loss": loss}
    return ImageRow(name, target, text, loss, is_wrong, None, cells)


def _class_row(task: Task[Any], name: str, value: Any, prediction: Any, output_C: Tensor, loss: float) -> ImageRow:
    label = task.target.names[int(value)]
    predicted, confidence = next(iter(prediction.items()))
    probabilities = {f"p({other})": prediction.get(other) for other in task.target.names}
    cells = {"label": label, "prediction": predicted, "correct": label == predicted, "loss": loss, **probabilities}
    return ImageRow(name, label, predicted, loss, label != predicted, confidence, cells)


def _labels_row(task: Task[Any], name: str, value_C: Any, prediction: Any, output_C: Tensor, loss: float) -> ImageRow:
    labels = [task.target.names[i] for i in np.flatnonzero(value_C)]
    predicted = [other for other in task.target.names if other in prediction]
    probabilities_C = torch.sigmoid(output_C).tolist()
    wrong = {*labels} ^ {*predicted}
    pairs = list(zip(task.target.names, probabilities_C, strict=True))
    confidence = max((p if other in predicted else 1 - p for other, p in pairs if other in wrong), default=None)
    cells = {"labels": labels, "predictions": predicted, "correct": not wrong, "loss": loss}
    cells |= {f"p({other})": p for other, p in pairs}
    texts = [", ".join(names) or "none" for names in (labels, predicted)]
    return ImageRow(name, texts[0], texts[1], loss, bool(wrong), confidence, cells)


def _numbers_row(task: Task[Any], name: str, value_K: Any, prediction: Any, output_K: Tensor, loss: float) -> ImageRow:
    cells: Cells = {}
    for number, true in zip(task.target.names, value_K.tolist(), strict=True):
        column = f"true {number}" if number in {"image", "loss"} else number
        cells |= {
            column: true,
            f"predicted {number}": prediction[number],
            f"error of {number}": prediction[number] - true,
        }
    text = task.target.text([prediction[number] for number in task.target.names])
    return ImageRow(name, task.target.text(value_K), text, loss, True, None, {**cells, "loss": loss})


def _mask_row(task: Task[Any], name: str, mask_SS: Any, prediction: Any, output_CSS: Tensor, loss: float) -> ImageRow:
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

    return pa.Table.from_pylist([{"image": row.image, **row.cells} for row in rows])


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

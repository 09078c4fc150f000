"""Predictions as a table, as JSON lines and as CSV; the columns depend on what is predicted."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from petune.base.text import format_number, format_percent
from petune.cli.terminal import one_line
from petune.serving.predictions import prediction_text

if TYPE_CHECKING:
    from petune.serving.predictions import ClassProbability, Prediction, PredictionKind

Cell = str | float
Columns = Sequence[str]
Table = tuple[Columns, list[list[str]], Columns, Columns]
"""Headings, rows, headings of right-aligned columns, and headings that a narrow terminal may hide."""


def json_line(prediction: Prediction) -> str:
    """Return a prediction as one JSON object."""
    line: dict[str, Any] = {"image": prediction.image}
    if prediction.error:
        line["error"] = prediction.error
    elif prediction.kind == "classes":
        line["top"] = [{"class": name, "probability": round(p, 6)} for name, p in prediction.top]
    elif prediction.kind == "labels":
        line["labels"] = [{"label": name, "probability": round(p, 6)} for name, p in prediction.top]
    elif prediction.kind == "numbers":
        line["numbers"] = prediction.numbers
    elif prediction.kind == "mask":
        line["fractions"] = {name: round(share, 6) for name, share in (prediction.fractions or {}).items()}
    else:
        line["prediction"] = prediction.output
    return json.dumps(line)


def csv_text(predictions: Sequence[Prediction]) -> str:
    """Return predictions as CSV with a heading; labels and their probabilities are each joined by `;`."""
    readable = [prediction for prediction in predictions if not prediction.error]
    columns, cells = _CSV[_kind_of(readable)](readable) if readable else ([], [])
    remaining = iter(cells)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["image", *columns, "error"])
    for prediction in predictions:
        row = [""] * len(columns) if prediction.error else next(remaining)
        writer.writerow([prediction.image, *row, prediction.error])
    return buffer.getvalue().removesuffix("\n")


def _kind_of(readable: Sequence[Prediction]) -> PredictionKind:
    """Return the kind of all predictions; `other` if the task of a plugin returns several kinds."""
    kinds = {prediction.kind for prediction in readable}
    return readable[0].kind if len(kinds) == 1 else "other"


def _csv_classes(readable: Sequence[Prediction]) -> tuple[list[str], list[list[Cell]]]:
    count = max(len(prediction.top) for prediction in readable)
    suffixes = ["", *(f"_{number}" for number in range(2, count + 1))]
    columns = [f"{name}{suffix}" for suffix in suffixes for name in ("class", "probability")]
    return columns, [[cell for name, p in each.top for cell in (name, round(p, 6))] for each in readable]


def _csv_labels(readable: Sequence[Prediction]) -> tuple[list[str], list[list[Cell]]]:
    rows: list[list[Cell]] = []
    for prediction in readable:
        names, probabilities = [], []
        for name, probability in prediction.top:
            names.append(name)
            probabilities.append(f"{probability:.6g}")
        rows.append([";".join(names), ";".join(probabilities)])
    return ["labels", "probabilities"], rows


def _csv_numbers(readable: Sequence[Prediction]) -> tuple[list[str], list[list[Cell]]]:
    columns = list(dict.fromkeys(name for prediction in readable for name in prediction.numbers or {}))
    return columns, [[(prediction.numbers or {}).get(name, "") for name in columns] for prediction in readable]


def _csv_masks(readable: Sequence[Prediction]) -> tuple[list[str], list[list[Cell]]]:
    columns = sorted({name for each in readable for name in each.fractions or {}})
    return columns, [[round((each.fractions or {}).get(name, 0.0), 6) for name in columns] for each in readable]


def _csv_outputs(readable: Sequence[Prediction]) -> tuple[list[str], list[list[Cell]]]:
    return ["prediction"], [[prediction_text(prediction)] for prediction in readable]


_CSV: dict[PredictionKind, Callable[[Sequence[Prediction]], tuple[list[str], list[list[Cell]]]]] = {
    "classes": _csv_classes,
    "labels": _csv_labels,
    "numbers": _csv_numbers,
    "mask": _csv_masks,
    "other": _csv_outputs,
}


def table_of(readable: Sequence[Prediction], noun: str = "image") -> Table:
    """Return the table of predictions for the terminal.

    Args:
        readable: At least one prediction, none of an unreadable image.
        noun: Heading of the first column.
    """
    kind = _kind_of(readable)
    names = [one_line(prediction.image) for prediction in readable]
    if kind == "classes":
        return _class_table(names, readable, noun)
    if kind == "numbers":
        columns, numbers = _csv_numbers(readable)
        columns = [one_line(column) for column in columns]
        rows = [
            [name, *(format_number(float(n), 5) if n != "" else "" for n in row)]
            for name, row in zip(names, numbers, strict=True)
        ]
        return (noun, *columns), rows, columns, ()
    if kind == "mask":
        texts = [_shares(prediction) for prediction in readable]
    elif kind == "labels":
        texts = [_pairs(prediction.top) or "none" for prediction in readable]
    else:
        texts = [one_line(prediction_text(prediction)) for prediction in readable]
    heading = {"labels": "labels", "mask": "share of the pixels"}.get(kind, "prediction")
    return (noun, heading), [list(row) for row in zip(names, texts, strict=True)], (), ()


def _class_table(names: Sequence[str], readable: Sequence[Prediction], noun: str) -> Table:
    rows = []
    for name, prediction in zip(names, readable, strict=True):
        first, *others = prediction.top
        rows.append([name, one_line(first.name), format_percent(100 * first.probability, 1), _pairs(others)])
    columns: Columns = (noun, "class", "probability", "next")
    if not any(row[-1] for row in rows):  # --top-k 1, or a single class
        columns = columns[:-1]
        rows = [row[:-1] for row in rows]
    return columns, rows, ("probability",), columns[3:]


def _pairs(top: Sequence[ClassProbability]) -> str:
    return ", ".join(f"{one_line(name)} {format_percent(100 * probability, 1)}" for name, probability in top)


def _shares(prediction: Prediction) -> str:
    shares = [(name, share) for name, share in (prediction.fractions or {}).items() if share > 0]
    return ", ".join(f"{one_line(name)} {format_percent(100 * share, 1)}" for name, share in shares)

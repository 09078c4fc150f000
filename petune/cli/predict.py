"""`petune predict`: predict the classes of images with a trained model."""

from __future__ import annotations

import json as json_format
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from petune.base.errors import MAX_LISTED, DataError
from petune.base.text import format_percent, plural
from petune.cli.options import BatchSize, Device, Precision, Source, TrustRemoteCode, Weights, user_path
from petune.cli.terminal import one_line, print_data, print_status, print_table

if TYPE_CHECKING:
    from petune.serving.predict import Prediction

Images = Annotated[
    list[Path], typer.Argument(metavar="IMAGE", help="Image files, or folders that are searched for images.")
]
TopK = Annotated[int, typer.Option("--top-k", metavar="NUMBER", min=1, help="Classes to show per image.")]
JsonLines = Annotated[bool, typer.Option("--json", help="Print one JSON object per image on stdout.")]


def predict(
    source: Source,
    images: Images,
    top_k: TopK = 5,
    batch_size: BatchSize = 64,
    weights: Weights = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    trust_remote_code: TrustRemoteCode = False,
    json: JsonLines = False,
) -> None:
    """Predict the classes of images with a trained model.

    Unreadable images are reported and the others are still predicted; the exit code is then 4.
    """
    from petune.serving.predict import Predictor

    predictor = Predictor(
        user_path(source), weights=weights, device=device, precision=precision, trust_remote_code=trust_remote_code
    )
    predictions = predictor.stream(images, top_k=top_k, batch_size=batch_size)
    classified, unreadable = _print_lines(predictions) if json else _print_table(predictions)
    reasons = [one_line(prediction.error) for prediction in unreadable]
    if not classified:
        raise DataError(_nothing_readable(reasons))
    for reason in reasons:
        print_status(f"error: {reason}")
    if reasons:
        raise typer.Exit(4)


def _nothing_readable(reasons: list[str]) -> str:
    if len(reasons) == 1:
        return reasons[0]
    others = f"\n  … and {len(reasons) - MAX_LISTED} more" if len(reasons) > MAX_LISTED else ""
    listed = "".join(f"\n  - {reason}" for reason in reasons[:MAX_LISTED])
    return f"none of these {len(reasons)} can be read:{listed}{others}"


def _print_lines(predictions: Iterable[Prediction]) -> tuple[int, list[Prediction]]:
    """Print each prediction as a line of JSON; return how many there are, and those of unreadable images."""
    classified = 0
    unreadable = []
    for prediction in predictions:
        line: dict[str, Any] = {"image": prediction.image}
        if prediction.error:
            line["error"] = prediction.error
            unreadable.append(prediction)
        else:
            line["top"] = [
                {"class": guess.name, "probability": round(guess.probability, 6)} for guess in prediction.top
            ]
            classified += 1
        print_data(json_format.dumps(line))
    return classified, unreadable


def _print_table(predictions: Iterable[Prediction]) -> tuple[int, list[Prediction]]:
    """Print the predictions as a table; return how many there are, and those of unreadable images."""
    rows, unreadable = [], []
    for prediction in predictions:
        if prediction.error:
            unreadable.append(prediction)
        else:
            rows.append(_row(prediction))
    columns: tuple[str, ...] = ("image", "class", "probability", "next")
    if not any(row[-1] for row in rows):  # --top-k 1, or a single class
        columns = columns[:-1]
        rows = [row[:-1] for row in rows]
    if rows:
        print_table(columns, rows, right=("probability",), optional=columns[3:])
        note = f", {len(unreadable)} unreadable" if unreadable else ""
        print_status(f"{plural(len(rows), 'image')} classified{note}")
    return len(rows), unreadable


def _row(prediction: Prediction) -> list[str]:
    first, *others = [(one_line(guess.name), format_percent(100 * guess.probability, 1)) for guess in prediction.top]
    return [one_line(prediction.image), *first, ", ".join(" ".join(pair) for pair in others)]

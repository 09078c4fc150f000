"""`petune predict`: predict images with a trained model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from petune.base.errors import MAX_LISTED, DataError, UsageError
from petune.base.text import plural
from petune.cli.options import BatchSize, Device, Precision, Source, TrustRemoteCode, Weights, source_path, user_path
from petune.cli.terminal import one_line, print_data, print_status, print_table

if TYPE_CHECKING:
    from petune.serving.predict import Predictor
    from petune.serving.predictions import Prediction

Images = Annotated[
    list[Path],
    typer.Argument(metavar="IMAGE", help="Images, or videos for a model of clips; folders are searched for them."),
]
TopK = Annotated[
    int | None, typer.Option("--top-k", metavar="NUMBER", min=1, help="Classes to show per image.  [default: 5]")
]
JsonLines = Annotated[bool, typer.Option("--json", help="Print one JSON object per image on stdout.")]
Output = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        metavar="DIR",
        help="Of segmentation: directory for a mask and an overlay of each image, in its size.",
    ),
]
Csv = Annotated[bool, typer.Option("--csv", help="Print CSV on stdout, a row per image.")]


def predict(
    source: Source,
    images: Images,
    top_k: TopK = None,
    batch_size: BatchSize = 64,
    weights: Weights = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    trust_remote_code: TrustRemoteCode = False,
    json: JsonLines = False,
    csv: Csv = False,
    output: Output = None,
) -> None:
    """Predict images with a trained model.

    Its task says what is predicted: classes, labels, numbers or masks. Unreadable images are reported and the
    others are still predicted; the exit code is then 4.
    """
    source = source_path(source)
    from petune.serving.predict import Predictor

    if json and csv:
        raise UsageError("--json and --csv exclude each other. Use one of them")
    predictor = Predictor(
        source, weights=weights, device=device, precision=precision, trust_remote_code=trust_remote_code
    )
    if output is not None:
        _check_outside(user_path(output), images)
    predictions = predictor.stream(images, top_k=top_k, batch_size=batch_size)
    if output is not None:
        predictions = _written(predictor, predictions, user_path(output))
    print_as_table = partial(_print_table, noun=predictor.file_kind.noun, precision=predictor.precision)
    show = _print_lines if json else _print_csv if csv else print_as_table
    predicted, unreadable = show(predictions)
    reasons = [one_line(prediction.error) for prediction in unreadable]
    if not predicted:
        raise DataError(_nothing_readable(reasons))
    if skipped := predictor.skipped_in(images):
        print_status(skipped)
    for reason in reasons:
        print_status(f"error: {reason}")
    if reasons:
        raise typer.Exit(4)


def _check_outside(output: Path, images: list[Path]) -> None:
    """Check that masks do not go into a folder of images, where the next call would read them as such.

    Raises:
        UsageError: They do.
    """
    for folder in map(user_path, images):
        if folder.is_dir() and output.resolve().is_relative_to(folder.resolve()):
            raise UsageError(
                f"{output} is in {folder}, whose images are predicted, so another call would take masks for images. "
                "Name a directory elsewhere",
                cli_hint="Name it with --output",
            )


def _written(predictor: Predictor, predictions: Iterator[Prediction], directory: Path) -> Iterator[Prediction]:
    from petune.serving.mask_files import MaskFiles

    files = MaskFiles.of(predictor, directory)
    num_written = 0
    try:
        for prediction in predictions:
            if not prediction.error:
                files.write(prediction)
                num_written += 1
            yield prediction
    finally:
        if num_written:
            files.write_summary()
    if num_written:
        print_status(one_line(f"wrote {plural(num_written, 'mask')}, overlays and summary.json to {directory}"))


def _nothing_readable(reasons: list[str]) -> str:
    if len(reasons) == 1:
        return reasons[0]
    others = f"\n  … and {len(reasons) - MAX_LISTED} more" if len(reasons) > MAX_LISTED else ""
    listed = "".join(f"\n  - {reason}" for reason in reasons[:MAX_LISTED])
    return f"none of these {len(reasons)} can be read:{listed}{others}"


def _without_mask(prediction: Prediction) -> Prediction:
    """Return what is printed of a prediction: the masks of thousands of images do not fit into the memory."""
    return replace(prediction, mask=None)


def _print_lines(predictions: Iterable[Prediction]) -> tuple[int, list[Prediction]]:
    """Print each prediction as a line of JSON; return how many there are, and those of unreadable images."""
    from petune.cli.prediction_rows import json_line

    predicted = 0
    unreadable = []
    for prediction in predictions:
        print_data(json_line(prediction))
        if prediction.error:
            unreadable.append(prediction)
        else:
            predicted += 1
    return predicted, unreadable


def _print_csv(predictions: Iterable[Prediction]) -> tuple[int, list[Prediction]]:
    """Print all predictions as CSV; return how many there are, and those of unreadable images."""
    from petune.cli.prediction_rows import csv_text

    every = [_without_mask(prediction) for prediction in predictions]
    unreadable = [prediction for prediction in every if prediction.error]
    print_data(csv_text(every))
    return len(every) - len(unreadable), unreadable


def _print_table(predictions: Iterable[Prediction], noun: str, precision: str) -> tuple[int, list[Prediction]]:
    """Print the predictions as a table; return how many there are, and those of unreadable images."""
    from petune.cli.prediction_rows import table_of

    every = [_without_mask(prediction) for prediction in predictions]
    readable = [prediction for prediction in every if not prediction.error]
    unreadable = [prediction for prediction in every if prediction.error]
    if readable:
        columns, rows, right, optional = table_of(readable, noun)
        print_table(columns, rows, right=right, optional=optional)
        note = f", {len(unreadable)} unreadable" if unreadable else ""
        verb = "classified" if readable[0].kind in {"classes", "labels"} else "predicted"
        print_status(f"{plural(len(rows), noun)} {verb} in {precision}{note}")
    return len(readable), unreadable

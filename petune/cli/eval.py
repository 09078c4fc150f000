"""`petune eval`: evaluate a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from petune.cli.options import (
    BatchSize,
    Device,
    Json,
    RunPrecision,
    Source,
    TrustRemoteCode,
    Weights,
    source_path,
    user_path,
)
from petune.cli.terminal import one_line, print_facts, print_json, print_status, print_table

if TYPE_CHECKING:
    from petune.serving.evaluation import Evaluation

MAX_CLASSES = 30
"""Number of classes that are printed; eval.json has all."""

Split = Annotated[
    Literal["test", "val"],
    typer.Option("--split", metavar="test|val", help="Split; val chose the epoch."),
]
Dataset = Annotated[
    str | None,
    typer.Option(
        "--dataset", metavar="NAME", help="Other images of the same classes: folder:PATH.  [default: the run's]"
    ),
]
DataDir = Annotated[Path | None, typer.Option("--data-dir", metavar="DIR", help="Directory of downloaded datasets.")]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output", metavar="DIR", help="Directory for eval.json and the figures.  [default: eval-SPLIT in the run]"
    ),
]
Format = Annotated[Literal["svg", "png"], typer.Option("--format", metavar="svg|png", help="Format of the figures.")]


def evaluate(
    source: Source,
    split: Split = "test",
    dataset: Dataset = None,
    data_dir: DataDir = None,
    weights: Weights = None,
    device: Device = "auto",
    precision: RunPrecision = None,
    batch_size: BatchSize = 128,
    trust_remote_code: TrustRemoteCode = False,
    output: Output = None,
    format: Format = "svg",
    json: Json = False,
) -> None:
    """Evaluate a trained model: the task's metrics, the worst mistakes, a table with one row for each image.

    Writes eval.json, predictions.parquet and .csv, mistakes.html; of a classifier also a confusion matrix and a
    reliability diagram.
    """
    source = source_path(source)
    from petune.serving.evaluation import EvalRequest, evaluate_images, select_images, write_evaluation
    from petune.serving.predict import Predictor

    predictor = Predictor(
        source, weights=weights, device=device, precision=precision, trust_remote_code=trust_remote_code
    )
    directory_of_data = user_path(data_dir) if data_dir else None
    images = select_images(predictor, EvalRequest(source, split, dataset, directory_of_data, batch_size))
    evaluated = evaluate_images(predictor, images, batch_size)
    evaluation = evaluated.evaluation
    if json:
        print_json(evaluation.model_dump(mode="json"))
    else:
        _print_evaluation(evaluation)
    directory = user_path(output) if output else _default_output(source, evaluation.split, dataset)
    if directory is None:
        print_status("nothing was written into the adapter directory; use --output DIR for eval.json and the figures")
        return
    for file in write_evaluation(evaluated, directory, format):  # after printing, so that a full disk loses no numbers
        print_status(one_line(f"wrote {file}"))


def _default_output(source: Path, split: str, dataset: str | None) -> Path | None:
    """Return the directory for the files: inside a run directory, nowhere for a bare adapter."""
    from petune.runner.file_names import RESULT_FILE

    if not (source / RESULT_FILE).is_file():
        return None
    name = "".join(c if c.isalnum() or c in "._-" else "_" for c in dataset or "")
    return source / "-".join(filter(None, ("eval", split, name)))


def _print_evaluation(evaluation: Evaluation) -> None:
    from petune.serving.evaluation import COLUMNS

    rows = evaluation.classes
    if len(rows) > MAX_CLASSES:
        rows = tuple(sorted(rows, key=lambda row: 101 if row.accuracy is None else row.accuracy))[:MAX_CLASSES]
        print_status(f"the {MAX_CLASSES} worst of {len(evaluation.classes)} classes; eval.json and --json have all")
    if rows:
        print_table(COLUMNS, [[one_line(text) for text in row.cells()] for row in rows], right=COLUMNS[1:4])
    _print_class_table(evaluation)
    print_facts([(name, one_line(value)) for name, value in evaluation.facts()])


def _print_class_table(evaluation: Evaluation) -> None:
    columns, rows = evaluation.class_table()
    if len(rows) > MAX_CLASSES:
        print_status(f"the {MAX_CLASSES} worst of {len(rows)}; eval.json and --json have all")
    if rows:
        print_table(columns, [[one_line(text) for text in row] for row in rows[:MAX_CLASSES]], right=columns[1:])

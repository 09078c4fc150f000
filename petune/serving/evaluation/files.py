"""Write the files of an evaluation: metrics, a table of all images, the mistakes, figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from petune.base.files import replace_file
from petune.runner.report.evaluations import EVALUATION_FILE, MISTAKES_FILE
from petune.runner.report.plots import FileType
from petune.runner.report.render import render
from petune.runner.report.tiles import Gallery, galleries_file, mask_key
from petune.serving.evaluation.evaluated import Evaluated
from petune.serving.evaluation.mistakes import galleries_of
from petune.serving.evaluation.plots import confusion_plot, reliability_plot
from petune.serving.evaluation.rows import table_of, to_csv, to_parquet


def write_evaluation(evaluated: Evaluated, directory: Path, format: FileType = "svg") -> list[Path]:
    """Write the files of an evaluation into a directory; return them.

    `eval.json`; `predictions.parquet` and `.csv`, a row for each image; `mistakes.html`, the worst mistakes, and
    `mistakes.json`, from which `petune report` shows them; for classification also `confusion.svg` and
    `reliability.svg` (or `.png`).

    Raises:
        CheckpointError: They cannot be written.
    """
    evaluation = evaluated.evaluation
    table = table_of(evaluated.rows)
    galleries = galleries_of(evaluated.predictor, evaluated.rows, evaluated.images.load)
    files = {
        EVALUATION_FILE: (evaluation.model_dump_json(indent=1) + "\n").encode(),
        "predictions.parquet": to_parquet(table),
        "predictions.csv": to_csv(table),
        MISTAKES_FILE: galleries_file(galleries),
        "mistakes.html": _mistakes_page(evaluated, galleries),
    }
    if evaluation.confusion:
        files[f"confusion.{format}"] = confusion_plot(evaluation, format)
    if evaluation.bins:
        files[f"reliability.{format}"] = reliability_plot(evaluation, format)
    for name, content in files.items():
        replace_file(directory / name, content)
    return [directory / name for name in files]


def _mistakes_page(evaluated: Evaluated, galleries: Sequence[Gallery]) -> bytes:
    """Return the page of the worst mistakes."""
    evaluation, task = evaluated.evaluation, evaluated.predictor.task
    facts = ", ".join(f"{name} {value}" for name, value in evaluation.facts() if name != "method")
    return render(
        "gallery.html.jinja",
        "petune eval",
        title=f"Mistakes of {evaluation.method} on {evaluation.dataset}, {evaluation.split}",
        about=[facts] if galleries else [facts, "There are no mistakes."],
        key=mask_key(task.target.names) if task.target_kind == "mask" else [],
        galleries=galleries,
    )

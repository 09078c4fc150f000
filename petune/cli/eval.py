"""`petune eval`: what a trained model is good at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from petune.cli.options import Json, TrustCode, user_path
from petune.cli.predict import BatchSize, Device, Precision, Source, Weights
from petune.cli.terminal import one_line, print_facts, print_json, print_status, print_table

if TYPE_CHECKING:
    from petune.serving.evaluation import Evaluation

MOST = 30
"""Classes that are shown; all of them are in eval.json."""

Split = Annotated[
    Literal["test", "val"], typer.Option("--split", metavar="test|val", help="val chose the run's epoch.")
]
Dataset = Annotated[
    str | None,
    typer.Option(
        "--dataset",
        metavar="NAME",
        help="Other images of the same classes: folder:PATH.  [default: the run's]",
    ),
]
DataDir = Annotated[Path | None, typer.Option("--data-dir", metavar="DIR", help="Where CIFAR lies now.")]
Output = Annotated[
    Path | None,
    typer.Option("--output", metavar="DIR", help="Where eval.json and images go.  [default: eval-SPLIT in the run]"),
]
Format = Annotated[Literal["svg", "png"], typer.Option("--format", metavar="svg|png", help="Of the images.")]


def evaluate(
    source: Source,
    split: Split = "test",
    dataset: Dataset = None,
    data_dir: DataDir = None,
    weights: Weights = None,
    device: Device = "auto",
    precision: Precision = "auto",
    batch_size: BatchSize = 128,
    trust_remote_code: TrustCode = False,
    output: Output = None,
    format: Format = "svg",
    json: Json = False,
) -> None:
    """Accuracy by class, what is mistaken for what, and calibration.

    Writes eval.json, a confusion image and a reliability diagram.
    """
    from petune.serving.evaluation import evaluate as evaluate_run, write

    source = user_path(source)
    found = evaluate_run(
        source,
        split=split,
        dataset=dataset,
        data_dir=user_path(data_dir) if data_dir else None,
        weights=weights,
        device=device,
        precision=precision,
        batch_size=batch_size,
        trust_remote_code=trust_remote_code,
    )
    place = user_path(output) if output else _place(source, found.split, dataset)
    if json:
        print_json(found.model_dump(mode="json"))
    else:
        _show(found)
    if place is None:
        print_status("an adapter directory is left as it is: with --output DIR, eval.json and images are written there")
    for file in write(found, place, format) if place is not None else []:  # after the numbers, which are not lost so
        print_status(one_line(f"wrote {file}"))


def _place(source: Path, split: str, dataset: str | None) -> Path | None:
    from petune.runner.run_dir import RESULT_FILE

    if not (source / RESULT_FILE).is_file():
        return None
    word = "".join(c if c.isalnum() or c in "._-" else "_" for c in dataset or "")
    return source / "-".join(filter(None, ("eval", split, word)))


def _show(found: Evaluation) -> None:
    from petune.serving.evaluation import COLUMNS

    shown = found.classes
    if len(shown) > MOST:
        shown = tuple(sorted(shown, key=lambda one: 101 if one.accuracy is None else one.accuracy))[:MOST]
        print_status(f"the {MOST} worst of {len(found.classes)} classes; eval.json and --json have all")
    print_table(COLUMNS, [[one_line(text) for text in one.cells()] for one in shown], right=COLUMNS[1:3])
    print_facts([(name, one_line(value)) for name, value in found.facts()])

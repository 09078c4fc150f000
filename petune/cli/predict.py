"""`petune predict`: what a trained model says of images."""

from __future__ import annotations

import json as json_format
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from petune.base.text import format_percent
from petune.cli.options import TrustCode, user_path
from petune.cli.terminal import clean, one_line, print_data, print_status, print_table

if TYPE_CHECKING:
    from petune.serving.predict import Prediction

Source = Annotated[Path, typer.Argument(metavar="DIR", help="A run directory, or an adapter directory.")]
Images = Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Image files, or folders: all images below them.")]
TopK = Annotated[int, typer.Option("--top-k", metavar="INT", min=1, help="So many classes an image.")]
BatchSize = Annotated[int, typer.Option("--batch-size", metavar="INT", min=1, help="Images a forward.")]
Weights = Annotated[
    str | None,
    typer.Option("--weights", metavar="NAME|PATH", help="Where the backbone's weights are now.  [default: the run's]"),
]
Device = Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.")]
Precision = Annotated[
    Literal["auto", "fp32", "bf16"],
    typer.Option("--precision", metavar="auto|fp32|bf16", help="auto: the one measured to be faster here."),
]
JsonLines = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, a line an image, and only that.")]


def predict(
    source: Source,
    images: Images,
    top_k: TopK = 5,
    batch_size: BatchSize = 64,
    weights: Weights = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    trust_remote_code: TrustCode = False,
    json: JsonLines = False,
) -> None:
    """Name images with a trained model.

    An image that cannot be read is named, the others are not harmed; the exit code is then 4.
    """
    from petune.serving.predict import Predictor

    predictor = Predictor(
        user_path(source), weights=weights, device=device, precision=precision, trust_remote_code=trust_remote_code
    )
    found = predictor.stream(images, top_k=top_k, batch_size=batch_size)
    broken = _lines(found) if json else _table(found)
    for one in broken:
        print_status(clean(f"error: {one.problem}"))
    if broken:
        raise typer.Exit(4)


def _lines(found: Iterable[Prediction]) -> list[Prediction]:
    broken = []
    for one in found:
        line: dict[str, Any] = {"image": one.image}
        if one.problem:
            line["error"] = one.problem
            broken.append(one)
        else:
            line["top"] = [{"class": guess.name, "probability": round(guess.probability, 6)} for guess in one.top]
        print_data(json_format.dumps(line))
    return broken


def _table(found: Iterable[Prediction]) -> list[Prediction]:
    rows, broken = [], []
    for one in found:
        if one.problem:
            broken.append(one)
        else:
            first, *others = [(one_line(guess.name), format_percent(100 * guess.probability, 1)) for guess in one.top]
            rows.append([one_line(one.image), *first, ", ".join(" ".join(pair) for pair in others)])
    if rows:
        columns = ("image", "class", "probability", "next")
        narrow = not any(row[-1] for row in rows)
        print_table(columns[:-1] if narrow else columns, [r[:-1] if narrow else r for r in rows], right=columns[2:3],
                   optional=() if narrow else columns[3:])  # fmt: skip
    print_status(f"{len(rows)} images named" + (f", {len(broken)} could not be read" if broken else ""))
    return broken

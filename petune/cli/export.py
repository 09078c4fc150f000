"""`petune export`: write a trained model for use without petune."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from petune.cli.options import Json, Source, TrustRemoteCode, Weights, source_path, user_path
from petune.cli.terminal import one_line, print_facts, print_json

File = Annotated[
    Path, typer.Argument(metavar="FILE", help="File to create: .pt2, .onnx or .safetensors.", show_default=False)
]
Format = Annotated[
    Literal["torch", "onnx", "safetensors"] | None,
    typer.Option(
        "--format", metavar="torch|onnx|safetensors", help="File format.  [default: by the extension of FILE]"
    ),
]
WithPreprocessing = Annotated[
    bool,
    typer.Option(
        "--with-preprocessing", help="Put the preprocessing into the ONNX program: it takes images of any size."
    ),
]


def export(
    source: Source,
    file: File,
    format: Format = None,
    with_preprocessing: WithPreprocessing = False,
    weights: Weights = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Export a trained model to torch.export, ONNX or plain weights.

    Adapters are merged into the weights where possible and exported as part of the model otherwise; plain weights
    (.safetensors) need a method that merges. The exported file is run and compared with the model.
    """
    source = source_path(source)
    from petune.base.text import format_size
    from petune.serving.export import export as export_model

    exported = export_model(
        source,
        user_path(file),
        format=format,
        with_preprocessing=with_preprocessing,
        weights=weights,
        trust_remote_code=trust_remote_code,
    )
    if json:
        print_json(asdict(exported))
        return
    adapters = "merged into the weights" if exported.merged else f"not merged ({exported.reason})"
    facts = [
        ("output", f"{one_line(exported.output)}  {format_size(exported.bytes)}"),
        ("method", one_line(exported.method)),
        ("adapters", adapters),
    ]
    images = "in batches of 1, 2 and 5"
    if exported.pixel_difference is not None:
        images = "over images of four sizes"
        facts.append(("preprocessing", f"in the file; pixels differ by {exported.pixel_difference:.1e} of 255 levels"))
    print_facts([*facts, ("difference", f"{exported.difference:.1e} of the largest logit, {images}")])

"""`petune export`: a trained model for use without petune."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from petune.cli.options import Json, TrustCode, user_path
from petune.cli.predict import Source, Weights
from petune.cli.terminal import one_line, print_facts, print_json

File = Annotated[
    Path, typer.Argument(metavar="FILE", help="A new .pt2, .onnx or .safetensors file.", show_default=False)
]
To = Annotated[
    Literal["torch", "onnx", "safetensors"] | None,
    typer.Option("--to", metavar="torch|onnx|safetensors", help="[default: what FILE ends in]"),
]


def export(
    source: Source,
    file: File,
    to: To = None,
    weights: Weights = None,
    trust_remote_code: TrustCode = False,
    json: Json = False,
) -> None:
    """Write a trained model as torch.export, ONNX or plain weights.

    Adapters are folded into the weights where that is possible, and stay parts of the program where not; plain weights
    (.safetensors) need the former. What was written is run, and compared with the model.
    """
    from petune.base.text import format_size
    from petune.serving.export import export as export_model

    done = export_model(user_path(source), user_path(file), to=to, weights=weights, trust_remote_code=trust_remote_code)
    if json:
        print_json(asdict(done))
        return
    print_facts(
        (
            ("output", f"{one_line(done.output)}  {format_size(done.bytes)}"),
            ("method", one_line(done.method)),
            ("adapters", "folded into the weights" if done.merged else f"parts of the program ({done.reason})"),
            ("off by", f"{done.difference:.1e} of the largest logit, in batches of 1, 2 and 5"),
        )
    )

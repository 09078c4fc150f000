"""`petune export`: a trained model as plain weights, without petune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from petune.cli.options import Json
from petune.cli.terminal import clean, show, show_json

Source = Annotated[Path, typer.Argument(metavar="DIR", help="A run directory, or the adapter directory in it.")]
Merged = Annotated[Path, typer.Option("--merged", metavar="FILE", help="The .safetensors file to write.")]
Weights = Annotated[
    str | None,
    typer.Option("--weights", metavar="NAME|PATH", help="Where the backbone's weights are now.  [default: the run's]"),
]


def export(source: Source, merged: Merged, weights: Weights = None, json: Json = False) -> None:
    """Fold a run's adapter into its backbone and write the plain weights."""
    from petune.export import export_merged
    from petune.report import size

    written = export_merged(source, merged, weights)
    if json:
        show_json({"output": str(merged), "bytes": written})
    else:
        show(clean(f"{merged}  {size(written)}"))

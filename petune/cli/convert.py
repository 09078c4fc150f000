"""`petune convert`: turn an adapter into LoRA that PEFT loads."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from petune.cli.options import Json, Source, TrustRemoteCode, Weights, source_path, user_path
from petune.cli.terminal import one_line, print_facts, print_json, print_status, print_table

To = Annotated[Literal["peft-lora"], typer.Option("--to", metavar="peft-lora", help="Format to convert to.")]
Output = Annotated[
    Path, typer.Option("--output", metavar="DIR", help="Adapter directory to create.", show_default=False)
]
Rank = Annotated[
    int | None,
    typer.Option("--rank", metavar="NUMBER", min=1, help="Rank of the LoRA.  [default: the exact one]"),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Compute and print the errors; write nothing.")]


def convert(
    source: Source,
    output: Output,
    to: To = "peft-lora",
    rank: Rank = None,
    weights: Weights = None,
    trust_remote_code: TrustRemoteCode = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Convert an adapter to PEFT's LoRA, by an SVD of the change of each linear layer's weight.

    For methods that are a change of weights of linear layers, such as FacT, RepAdapter and DoRA; others are refused.
    """
    source = source_path(source)
    from petune.base.text import format_size
    from petune.serving.convert import convert as convert_adapter, preview_convert

    call = preview_convert if dry_run else convert_adapter
    converted = call(source, user_path(output), to=to, rank=rank, weights=weights, trust_remote_code=trust_remote_code)
    if json:
        print_json({**asdict(converted), "largest_error": converted.largest_error})
        return
    rows = [[layer, f"{error:.2g}"] for layer, error in converted.errors.items()]
    print_table(("layer", "left out"), rows, right=("left out",))
    size = "not written" if dry_run else format_size(converted.bytes)
    print_facts(
        [
            ("method", one_line(converted.method)),
            ("rank", f"{converted.rank}  (at most {converted.largest_error:.2g} of a layer's change is left out)"),
            ("max_abs_diff", f"{converted.max_abs_diff:.2g} of logits up to {converted.largest_logit:.2g}"),
            ("output", f"{one_line(converted.output)}  {size}"),
        ]
    )
    if dry_run:
        print_status("dry run: nothing was written")

"""`petune average`: average adapters, or do arithmetic with what they have learned."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from petune.base.errors import UsageError
from petune.cli.options import BatchSize, DataDir, Device, Json, TrustRemoteCode, Weights, user_path
from petune.cli.terminal import one_line, print_facts, print_json, print_status, print_table

if TYPE_CHECKING:
    from petune.serving.average import Averaged, AverageRequest

Sources = Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run directories or adapter directories.")]
Output = Annotated[
    Path, typer.Option("--output", metavar="DIR", help="Adapter directory to create.", show_default=False)
]
Algorithm = Annotated[
    Literal["uniform", "greedy", "task_arithmetic", "ties", "dare", "wise_ft"],
    typer.Option(
        "--algorithm",
        metavar="NAME",
        help="uniform averages all, greedy those that help on val; task_arithmetic, ties and dare add task vectors to "
        "the start; wise_ft goes from the start towards the mean.",
    ),
]
Coefficients = Annotated[
    str | None,
    typer.Option(
        "--coefficients",
        metavar="NUMBER,NUMBER,…",
        help="One for each DIR, or one for all; of wise_ft the share of the trained values.  [default: the papers']",
    ),
]
Density = Annotated[
    float | None,
    typer.Option(
        "--density", metavar="NUMBER", help="Share of each task vector that is kept.  [default: ties 0.2, dare 0.1]"
    ),
]
Seed = Annotated[int, typer.Option("--seed", metavar="NUMBER", help="Random seed of dare.")]
Head = Annotated[
    str,
    typer.Option(
        "--head",
        metavar="average|none|DIR",
        help="Average the classifiers, leave them out, or keep that of one DIR.",
    ),
]
Rank = Annotated[
    int | None,
    typer.Option("--rank", metavar="NUMBER", min=1, help="Rank of an averaged LoRA.  [default: the exact one]"),
]
ByFactors = Annotated[
    bool, typer.Option("--by-factors", help="Average A and B of LoRA one by one, not the changes of weights.")
]
Start = Annotated[
    Path | None,
    typer.Option("--start", metavar="DIR", help="The adapter that the runs have continued.  [default: as recorded]"),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check the adapters and print what would be averaged; write nothing.")
]


def average(
    sources: Sources,
    output: Output,
    algorithm: Algorithm = "uniform",
    coefficients: Coefficients = None,
    density: Density = None,
    seed: Seed = 0,
    head: Head = "average",
    rank: Rank = None,
    by_factors: ByFactors = False,
    start: Start = None,
    weights: Weights = None,
    data_dir: DataDir = None,
    device: Device = "auto",
    batch_size: BatchSize = 128,
    trust_remote_code: TrustRemoteCode = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Average adapters of one method and one backbone into a new adapter directory.

    greedy reads val, no other algorithm reads images. Evaluate the result with `petune eval`.
    """
    from petune.serving.average import AverageRequest, average_adapters

    paths, target = [user_path(source) for source in sources], user_path(output)
    mixture: dict[str, Any] = {
        "algorithm": algorithm,
        "coefficients": _numbers(coefficients),
        "density": density,
        "seed": seed,
        "head": head if head in ("average", "none") else user_path(Path(head)),
        "rank": rank,
        "by_factors": by_factors,
        "start": user_path(start) if start else None,
    }
    if dry_run:
        _print_request(AverageRequest.of(paths, target, **mixture), as_json=json)
        return
    averaged = average_adapters(
        paths,
        target,
        **mixture,
        weights=weights,
        data_dir=user_path(data_dir) if data_dir else None,
        device=device,
        batch_size=batch_size,
        trust_remote_code=trust_remote_code,
    )
    if json:
        print_json({**asdict(averaged), "metric": averaged.metric and averaged.metric.name})
    else:
        _print_averaged(averaged)
    for note in averaged.notes:
        print_status(one_line(f"note: {note}"))


def _numbers(text: str | None) -> list[float] | None:
    """Return the numbers of `0.5,0.5`.

    Raises:
        UsageError: It holds something else.
    """
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(
            f"--coefficients takes numbers with commas between them, such as 0.5,0.5, not {text!r}"
        ) from None


def _print_request(request: AverageRequest, *, as_json: bool) -> None:
    from petune.serving.average.record import averaged_from, shown_coefficients

    mixture, ingredients = request.mixture, request.ingredients
    coefficients = shown_coefficients(mixture, len(ingredients))
    adapters = averaged_from(ingredients, coefficients)
    method = str(request.base.metadata.get("method", request.base.saved.config["tuner"]))
    if as_json:
        rows = [asdict(adapter) for adapter in adapters]
        print_json({"algorithm": mixture.algorithm, "method": method, "adapters": rows, "output": str(request.output)})
        return
    rows_shown = [[one_line(a.path), a.sha256[:12], f"{a.coefficient:.4g}"] for a in adapters]
    print_table(("adapter", "SHA-256", "coefficient"), rows_shown, right=("coefficient",))
    print_facts([("method", one_line(method)), ("algorithm", mixture.algorithm), ("output", str(request.output))])
    print_status("dry run: the backbone was not built, and nothing was written")


def _print_averaged(averaged: Averaged) -> None:
    from petune.base.text import format_size

    metric = averaged.metric
    columns = ["adapter", "SHA-256", "coefficient", *([f"{metric.label} on val"] if metric else ())]
    rows = [
        [one_line(a.path), a.sha256[:12], f"{a.coefficient:.4g}", *([metric.text(a.val)] if metric else ())]
        for a in averaged.adapters
    ]
    print_table(columns, rows, right=columns[2:])
    facts = [("method", one_line(averaged.method)), ("algorithm", averaged.algorithm)]
    if metric is not None:
        facts.append((f"{metric.label} on val", metric.text(averaged.val)))
    if averaged.rank is not None:
        error = f"{averaged.largest_error or 0.0:.2g} of a layer's change (Frobenius norm) is left out"
        facts.append(("rank", f"{averaged.rank}  (at most {error})"))
    print_facts([*facts, ("output", f"{one_line(averaged.output)}  {format_size(averaged.bytes)}")])

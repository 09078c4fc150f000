"""Options and arguments that several commands share, each defined once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from petune.base.errors import UsageError

ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="YAML file to start from; flags override it.")
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set any other key, e.g. train.grad_clip=5; repeatable."),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Directory of downloaded datasets.  [default: $PETUNE_DATA, then the cache]",
        show_default=False,
    ),
]
Seeds = Annotated[
    str | None,
    typer.Option("--seeds", metavar="NUMBER,NUMBER,…", help="Comma-separated seeds: one run each, results averaged."),
]
Folds = Annotated[
    int | None,
    typer.Option("--folds", metavar="NUMBER", min=2, help="Cross-validation: one run for each fold, results averaged."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the full config and what would be trained; write nothing.")
]
Tracker = Annotated[
    str | None,
    typer.Option(
        "--tracker",
        metavar="NAME",
        help="Log training curves: tensorboard, wandb (offline) or mlflow, in --output/NAME; trackio, in its database.",
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Allow the adapter to build its backbone with a Python function it names."
    ),
]
Executor = Annotated[
    str | None,
    typer.Option(
        "--executor",
        metavar="NAME",
        help="Where to run: serial, local:jobs=2, ray, ray:cpus=2,gpus=0.5, ray://HOST:PORT or slurm.  "
        "[default: serial]",
        show_default=False,
    ),
]
Jobs = Annotated[
    int | None,
    typer.Option(
        "--jobs", metavar="NUMBER", min=1, help="Runs at the same time on this machine, which divide its cores."
    ),
]
Source = Annotated[Path, typer.Argument(metavar="DIR", help="Run directory or adapter directory.")]
Weights = Annotated[
    str | None,
    typer.Option("--weights", metavar="NAME|PATH", help="The backbone's weights.  [default: the run's]"),
]
Device = Annotated[str, typer.Option("--device", metavar="NAME", help="Device: auto, cpu, cuda, cuda:N or mps.")]
Precision = Annotated[
    Literal["auto", "fp32", "bf16"],
    typer.Option("--precision", metavar="auto|fp32|bf16", help="Number format; auto is bf16 if the device has it."),
]
RunPrecision = Annotated[
    Literal["auto", "fp32", "bf16"] | None,
    typer.Option("--precision", metavar="auto|fp32|bf16", help="Number format.  [default: the run's]"),
]
BatchSize = Annotated[int, typer.Option("--batch-size", metavar="NUMBER", min=1, help="Batch size.")]


def user_path(path: Path) -> Path:
    """Expand `~` to the home directory.

    Raises:
        UsageError: The path is not valid UTF-8.
    """
    from petune.base.config import user_path as expanded

    try:
        return expanded(path)
    except ValueError as error:
        raise UsageError(f"{error}; got {str(path)!r}") from None


def source_path(path: Path) -> Path:
    """Return the path of a run or adapter directory, with `~` expanded.

    Raises:
        UsageError: The path is not valid UTF-8.
        CheckpointError: There is nothing; said here, because the library takes seconds to import.
    """
    from petune.base.errors import CheckpointError
    from petune.base.files import no_directory_at

    expanded = user_path(path)
    if not expanded.exists():
        raise CheckpointError(no_directory_at(expanded))
    return expanded


def executor_of(executor: str | None, jobs: int | None) -> str:
    """Return the executor that --executor and --jobs name.

    Raises:
        UsageError: Both are given.
    """
    if jobs is None:
        return executor or "serial"
    if executor is not None:
        raise UsageError(
            f"--jobs {jobs} is short for --executor local:jobs={jobs}, and --executor {executor} is given too. "
            "Leave one out"
        )
    return f"local:jobs={jobs}"

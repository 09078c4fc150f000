"""Read the progress in checkpoints that older versions of petune wrote.

Format 1: `best_top1` and `best_top5`.
Format 2: `best_values`, by the metric's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from petune.base.errors import CheckpointError
from petune.data.batches import TrainBatches
from petune.training.progress import Progress


def migrate_progress(progress: Mapping[str, Any], version: int) -> dict[str, Any]:
    """Return the fields of `Progress` in the current format.

    Args:
        progress: As stored.
        version: The checkpoint's format.
    """
    return _from_1_to_2(progress) if version < 2 else dict(progress)


def check_same_batches(progress: Progress, batches: TrainBatches, run_dir: Path) -> None:
    """Check that a checkpoint's epochs have the same batches as now, and record their number.

    Args:
        progress: Of the checkpoint.
        batches: The batches of today.
        run_dir: For the message.

    Raises:
        CheckpointError: An older version left out the images that fill no batch.
    """
    full, num_images = batches.full_size, len(batches.split)
    if (progress.steps_per_epoch or num_images // full) != len(batches):
        raise CheckpointError(
            f"{run_dir} was started by an older version of petune, which left out {num_images % full} of {num_images} "
            "images in every epoch. Start again in another output, to train on all of them",
            cli_hint="Name a new directory with --output",
        )
    progress.steps_per_epoch = len(batches)


def _from_1_to_2(progress: Mapping[str, Any]) -> dict[str, Any]:
    names = ("top1", "top5")
    has_best = progress["best_epoch"] > 0
    best = {name: progress[f"best_{name}"] for name in names} if has_best else {}
    others = {key: value for key, value in progress.items() if key not in {f"best_{name}" for name in names}}
    return {**others, "best_values": best}

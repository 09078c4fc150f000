"""Read the progress in checkpoints that older versions of petune wrote.

Format 1: `best_top1` and `best_top5`.
Format 2: `best_values`, by the metric's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def migrate_progress(progress: Mapping[str, Any], version: int) -> dict[str, Any]:
    """Return the fields of `Progress` in the current format.

    Args:
        progress: As stored.
        version: The checkpoint's format.
    """
    return _from_1_to_2(progress) if version < 2 else dict(progress)


def _from_1_to_2(progress: Mapping[str, Any]) -> dict[str, Any]:
    names = ("top1", "top5")
    has_best = progress["best_epoch"] > 0
    best = {name: progress[f"best_{name}"] for name in names} if has_best else {}
    others = {key: value for key, value in progress.items() if key not in {f"best_{name}" for name in names}}
    return {**others, "best_values": best}

"""What a run began with that its configuration does not say: it goes on with the same, or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from petune.data.held import hold_pictures
from petune.errors import CheckpointError, WeightsUnavailable
from petune.files import replace_file
from petune.rundir import BEGAN_FILE
from petune.weights import find_weights


def hold_beginning(place: Path, dataset: str, weights: str, recipe: Mapping[str, Any] | None = None) -> None:
    """Note in a directory what it begins with, or hold that it is still the same.

    That is the pictures of a folder, the bytes of a weights file, and what a method's recipe fills in.

    Args:
        place: Of a run, or of many runs that are to be compared.
        dataset, weights: As in a configuration.
        recipe: Learning rate and so on, by name; a run's.

    Raises:
        DataError: The pictures changed.
        CheckpointError: The weights or the recipe did.
    """
    hold_pictures(place, dataset)
    before, now = _noted(place), {"weights": _digest(weights), **(recipe or {})}
    changed = [key for key in now if key in before and now[key] not in ("", before[key])]
    if "weights" in changed:
        raise CheckpointError(
            f"{weights} must be the weights that {place} began with, but the file holds others now. Put them back, or "
            "name another --output"
        )
    if changed:
        said = ", ".join(f"{key} was {before[key]!r} and is {now[key]!r}" for key in changed)
        raise CheckpointError(
            f"{place} must go on with the recipe that it began with, but {said}: the method's package has changed. "
            f"Ask for {' and '.join(f'train.{key}' for key in changed)} by --set in another --output, or install what "
            "there was"
        )
    noted = {key: value for key, value in {**now, **before}.items() if value not in ("", None)}
    if noted != before:
        replace_file(place / BEGAN_FILE, (json.dumps(noted, indent=1) + "\n").encode())


def _noted(place: Path) -> dict[str, Any]:
    try:
        noted: dict[str, Any] = json.loads((place / BEGAN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # new, or begun by a petune that noted nothing
        return {}
    return noted


def _digest(weights: str) -> str:
    """SHA-256 of the file that the weights are; empty where they are none."""
    if not Path(os.path.expanduser(weights)).exists():
        return ""
    try:
        with find_weights(Path(weights)).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (WeightsUnavailable, OSError):  # which is said where they are read
        return ""

"""Read the JSON files in which a run, a comparison, a grid, a sweep and a cross-validation keep their results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from petune.base.config import Config
from petune.base.errors import CheckpointError, ConfigError

Saved = TypeVar("Saved", bound=Config)


def read_saved(
    cls: type[Saved], file: Path, problem: str, updated: Callable[[Any], Any] = lambda values: values
) -> Saved:
    """Read a file that `model_dump` wrote.

    Args:
        cls: What it holds.
        file: The JSON file.
        problem: Says what is wrong with it, for the message: `is not the table of a grid`.
        updated: Turns values of older versions into those of today.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    try:
        return cls.build(updated(json.loads(file.read_text(encoding="utf-8"))), file.name)
    except (OSError, ValueError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{file} {problem}: {error}") from None

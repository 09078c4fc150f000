"""What training tells: events for whoever watches, lines of metrics.jsonl for whoever comes later."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petune.base.files import append, truncate

METRICS_FILE = "metrics.jsonl"
"""Name of the log in a run directory."""


@dataclass(frozen=True)
class StepDone:
    """A training step is over; `loss` is the mean of this epoch so far, `images_per_s` that of the run."""

    step: int
    total_steps: int
    epoch: int
    loss: float
    lr: float
    images_per_s: float


@dataclass(frozen=True)
class EpochEnded:
    """An epoch is over; `metrics` is its line of metrics.jsonl."""

    epoch: int
    epochs: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Note:
    """A sentence for the person who runs this."""

    text: str


Event = StepDone | EpochEnded | Note


class Log:
    """`metrics.jsonl`: one object a logged step and an epoch, each once, however often a run is resumed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, **values: Any) -> int:
        """Append a line and return the size of the file in bytes.

        Raises:
            CheckpointError: The disk is full or read-only; a resume drops what is there of the line.
        """
        return append(self.path, (json.dumps(values) + "\n").encode())

    def cut(self, size: int) -> None:
        """Drop what was written after a checkpoint that the run now goes on from."""
        truncate(self.path, size)

    def note(self, text: str) -> None:
        """Keep a sentence beside the metrics, in `notes.txt`."""
        append(self.path.with_name("notes.txt"), (text + "\n").encode())

"""What training tells: events for whoever watches, lines of metrics.jsonl for whoever comes later."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
        """Append a line and return the size of the file in bytes."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
            return file.tell()

    def cut(self, size: int) -> None:
        """Drop what was written after a checkpoint that the run now goes on from."""
        if self.path.exists():
            os.truncate(self.path, min(size, self.path.stat().st_size))

    def note(self, text: str) -> None:
        """Keep a sentence beside the metrics, in `notes.txt`."""
        with self.path.with_name("notes.txt").open("a", encoding="utf-8") as file:
            file.write(text + "\n")

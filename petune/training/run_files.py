"""The files of a training in its run directory: `metrics.jsonl`, `notes.txt` and `checkpoints/`.

The main process writes them; an error there is raised on all processes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from petune.base.distributed import Group
from petune.base.files import append, truncate
from petune.training.checkpoint import Checkpoint, newest_checkpoint, save_checkpoint

METRICS_FILE, NOTES_FILE, CHECKPOINTS = "metrics.jsonl", "notes.txt", "checkpoints"


class RunFiles:
    """Writes metrics and checkpoints, and reads the newest checkpoint.

    Args:
        directory: The run directory.
        group: The processes that train together.

    Attributes:
        metrics_bytes: Size of metrics.jsonl, on the main process. A checkpoint records it, so that a resume can cut
            lines that were written after the checkpoint.
    """

    def __init__(self, directory: Path, group: Group) -> None:
        self.directory = directory
        self.group = group
        self.metrics_bytes = 0

    def write_metrics(self, **values: Any) -> None:
        """Append a line to metrics.jsonl.

        Raises:
            CheckpointError: The disk is full or read-only.
        """
        with self.group.raise_together():
            if self.group.is_main:
                line = (json.dumps(values) + "\n").encode()
                self.metrics_bytes = append(self.directory / METRICS_FILE, line)

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint.

        Raises:
            CheckpointError: See `save_checkpoint`.
        """
        with self.group.raise_together():
            if self.group.is_main:
                save_checkpoint(self.directory / CHECKPOINTS, checkpoint)

    def load(self) -> tuple[Checkpoint | None, list[str]]:
        """Return the newest valid checkpoint, or None, and what is wrong with newer ones; cut metrics.jsonl to it.

        Raises:
            CheckpointError: The newest checkpoint was written by a newer petune.
        """
        return self.group.broadcast(self._load)

    def last_step(self) -> int | None:
        """Return the step of the newest valid checkpoint, or None."""
        checkpoint, _ = newest_checkpoint(self.directory / CHECKPOINTS)
        return checkpoint.progress["step"] if checkpoint else None

    def _load(self) -> tuple[Checkpoint | None, list[str]]:
        checkpoint, problems = newest_checkpoint(self.directory / CHECKPOINTS)
        self.metrics_bytes = checkpoint.progress["log_bytes"] if checkpoint else 0
        truncate(self.directory / METRICS_FILE, self.metrics_bytes)
        for problem in problems:
            append(self.directory / NOTES_FILE, f"{problem}\n".encode())
        return checkpoint, problems

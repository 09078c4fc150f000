"""When to write a checkpoint: often, but so that writing takes a small part of the time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

SAVE_EVERY_S = 600.0
"""Longest time without a checkpoint, also within an epoch."""
QUICK_SAVE_S = 1.0
"""Checkpoints that are written in this time are written after every epoch."""
MAX_SHARE = 0.05
"""Largest share of the time that other checkpoints take: all of ViT-B is 1 GB, and on a GPU an epoch can take 8 s."""


class SaveSchedule:
    """Decides when a checkpoint is due, from how long the last one took to write.

    Attributes:
        saved_at: When the last checkpoint was complete, or the training started.
        save_s: How long it took.
    """

    def __init__(self) -> None:
        self.restart()
        self.save_s = 0.0

    def restart(self) -> None:
        """Count from now, because steps start now."""
        self.saved_at = time.perf_counter()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Measure how long a checkpoint takes."""
        start = time.perf_counter()
        yield
        self.saved_at = time.perf_counter()
        self.save_s = self.saved_at - start

    def is_overdue(self) -> bool:
        """Return whether to save after a step."""
        return time.perf_counter() - self.saved_at > SAVE_EVERY_S

    def is_due(self) -> bool:
        """Return whether to save after an epoch."""
        return self.save_s < QUICK_SAVE_S or time.perf_counter() - self.saved_at > self.save_s / MAX_SHARE

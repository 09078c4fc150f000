"""A run after training and before its test."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from petune.base.metric import Metric
from petune.runner.prepare import Prepared
from petune.training.loop import Trainer
from petune.training.progress import FitResult


@dataclass(frozen=True)
class Trained:
    """A run whose test split has not been read; the model holds the chosen epoch.

    Attributes:
        ready: What was trained: configuration, dataset, backbone, attachment.
        trainer: Evaluates further splits.
        fit: What training measured.
        run_dir: The run directory.
        final_fit: `train+val` if the model trained again on both, `only` if it trained once, on both; else None.
    """

    ready: Prepared
    trainer: Trainer
    fit: FitResult
    run_dir: Path
    final_fit: Literal["train+val", "only"] | None = None

    @property
    def metric_info(self) -> tuple[Metric, ...]:
        """Names and display of the metrics; the first one chose the epoch."""
        return self.trainer.metrics

"""How far a run is, and what it yields in the end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from petune.training.evaluate import Accuracy


@dataclass
class Progress:
    """Where the run is; saved with every checkpoint."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    time_s: float = 0.0
    train_time_s: float = 0.0
    best_epoch: int = -1
    best_top1: float = -1.0
    best_top5: float = -1.0
    log_bytes: int = 0
    loss_sum: float = 0.0
    micro_batch: int = 0
    peak_bytes: int = 0  # of the process that trained before a resume
    precision: Literal["", "fp32", "tf32", "bf16"] = ""  # empty in checkpoints of older versions
    epochs: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class FitResult:
    """What training yields; the model holds the chosen epoch's tensors."""

    epoch: int
    val: Accuracy | None
    images_per_s: float
    step_time_s: float
    time_s: float
    epochs: list[dict[str, float]]
    precision: str
    micro_batch_size: int
    lr: float
    num_processes: int

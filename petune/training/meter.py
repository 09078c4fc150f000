"""Metrics of torchmetrics by name, updated together."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol, Self

import torch
from torch import Tensor


class Meter(Protocol):
    """Adds up what metrics need, batch by batch; `torch_meter` makes one of torchmetrics.

    With several processes each updates its own images, and `compute` returns the values over all of them.
    """

    def to(self, device: torch.device) -> Self:
        """Move to a device before the first update, and return itself."""

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take a batch: the model's outputs in float32 (B, …), and the targets (B, …)."""

    def compute(self) -> Mapping[str, float]:
        """Return the values by the metrics' names. One that is undefined on these images is NaN."""


class TorchMeter:
    """A meter of torchmetrics.

    Args:
        metrics: Metrics by name, each of which takes outputs and targets.
        percent: Names of metrics whose values are multiplied by 100.
    """

    def __init__(self, metrics: Mapping[str, Any], percent: Collection[str] = ()) -> None:
        self.metrics = dict(metrics)
        self.percent = percent

    def to(self, device: torch.device) -> Self:
        """Move to a device, and return itself."""
        self.metrics = {name: metric.to(device) for name, metric in self.metrics.items()}
        return self

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Update every metric."""
        for metric in self.metrics.values():
            metric.update(outputs, targets)

    def compute(self) -> dict[str, float]:
        """Return the values by name; torchmetrics adds up over processes."""
        values = {name: float(metric.compute()) for name, metric in self.metrics.items()}
        return {name: 100 * value if name in self.percent else value for name, value in values.items()}

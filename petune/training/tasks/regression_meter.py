"""Metrics of regression, in the units of the targets.

Legend: N images, K numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor
from torchmetrics.functional.regression import mean_absolute_error, mean_squared_error

from petune.training.stored_outputs import StoredOutputs
from petune.training.tasks.same_shape import check_same_shape


class RegressionMeter:
    """MAE, RMSE and R² of each number, and their means over the numbers.

    Args:
        names: The numbers.
        numbers: Turns outputs (N, K) into the units of the targets.
    """

    def __init__(self, names: Sequence[str], numbers: Callable[[Tensor], Tensor]) -> None:
        self.names = names
        self.numbers = numbers
        self.stored = StoredOutputs()

    def to(self, device: torch.device) -> Self:
        """Move to a device, and return itself."""
        self.stored = self.stored.to(device)
        return self

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take outputs (B, K) and targets (B, K)."""
        check_same_shape(outputs, targets)
        self.stored.update(outputs, targets)

    def compute(self) -> dict[str, float]:
        """Return the metrics; R² is NaN where all targets are equal, and such numbers do not count in its mean."""
        # of one image and one number, torchmetrics makes a scalar
        outputs_NK, targets_NK = (x.reshape(-1, len(self.names)) for x in self.stored.compute())
        numbers_NK = self.numbers(outputs_NK)
        rows = [_metrics(numbers_NK[:, k].contiguous(), targets_NK[:, k].contiguous()) for k in range(len(self.names))]
        values = {name: _mean([row[name] for row in rows]) for name in rows[0]}
        if len(self.names) > 1:
            for name, row in zip(self.names, rows, strict=True):
                values |= {f"{metric}/{name}": value for metric, value in row.items()}
        return values


def r2_score(predicted_N: Tensor, targets_N: Tensor) -> float:
    """Return the coefficient of determination; NaN if all targets are equal.

    Not torchmetrics' R2Score: it returns 1 for small residuals, and is wrong for targets far from 0, such as years.

    Args:
        predicted_N, targets_N: float64.
    """
    if targets_N.min() == targets_N.max():
        return math.nan
    residuals = (targets_N - predicted_N).square().sum()
    deviations = (targets_N - targets_N.mean()).square().sum()
    return float(1 - residuals / deviations)


def _metrics(predicted_N: Tensor, targets_N: Tensor) -> dict[str, float]:
    return {
        "mae": float(mean_absolute_error(predicted_N, targets_N)),
        "rmse": float(mean_squared_error(predicted_N, targets_N, squared=False)),
        "r2": r2_score(predicted_N, targets_N),
    }


def _mean(values: Sequence[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan

"""Metrics of multi-label classification: average precision and F1 over the classes that a split has images of.

Legend: N images, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_average_precision, binary_f1_score

from petune.training.stored_outputs import StoredOutputs
from petune.training.tasks.same_shape import check_same_shape


class MultiLabelMeter:
    """Metrics of probabilities; the sigmoid is applied once to all logits.

    torchmetrics counts a class without positives as 0 in a mean; here each class is computed alone, and the mean is
    over those with positives.

    Args:
        names: The classes.
        thresholds: Of each class; None chooses the best ones on the metered images.
        choose: Chooses thresholds from probabilities and targets.
    """

    def __init__(
        self,
        names: Sequence[str],
        thresholds: Sequence[float] | None,
        choose: Callable[[Tensor, Tensor], Sequence[float]],
    ) -> None:
        self.names = names
        self.thresholds = thresholds
        self.choose = choose
        self.stored = StoredOutputs()

    def to(self, device: torch.device) -> Self:
        """Move to a device, and return itself."""
        self.stored = self.stored.to(device)
        return self

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take logits (B, C) and targets (B, C)."""
        check_same_shape(outputs, targets)
        self.stored.update(outputs, targets)

    def labeled_probabilities(self) -> tuple[Tensor, Tensor]:
        """Return probabilities and targets of all images, float64 (N, C)."""
        # of one image and one label, torchmetrics makes a scalar
        logits_NC, targets_NC = (x.reshape(-1, len(self.names)) for x in self.stored.compute())
        return logits_NC.sigmoid(), targets_NC

    def compute(self) -> dict[str, float]:
        """Return the metrics in percent, and the number of classes with positives; NaN for a class without."""
        probabilities_NC, targets_NC = self.labeled_probabilities()
        thresholds_C = self.choose(probabilities_NC, targets_NC) if self.thresholds is None else self.thresholds
        predicted_NC = (probabilities_NC >= torch.tensor(thresholds_C, dtype=torch.float64)).long()
        targets_NC = targets_NC.long()
        precisions = dict.fromkeys(self.names, math.nan)
        f1_scores = []
        for c, name in enumerate(self.names):
            if targets_NC[:, c].any():
                precision = binary_average_precision(probabilities_NC[:, c].contiguous(), targets_NC[:, c])
                precisions[name] = 100 * float(precision)
                f1_scores.append(100 * float(binary_f1_score(predicted_NC[:, c], targets_NC[:, c])))
        counted = [value for value in precisions.values() if not math.isnan(value)]
        return {
            "map": _mean(counted),
            "macro_f1": _mean(f1_scores),
            "micro_f1": 100 * float(binary_f1_score(predicted_NC.flatten(), targets_NC.flatten())),
            "classes_counted": float(len(counted)),
            **{f"ap/{name}": value for name, value in precisions.items()},
        }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan

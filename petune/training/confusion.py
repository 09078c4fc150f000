"""The meter of classification: counts by class from torchmetrics, from which all its metrics follow.

Legend: B batch, C classes.
"""

from __future__ import annotations

import math

from torch import Tensor

from petune.training.meter import TorchMeter


class ConfusionMeter(TorchMeter):
    """Computes `top1`, `top5`, `macro_accuracy` and `macro_f1`, in percent.

    The macro metrics are means over the classes that have images: torchmetrics' own averages count a class that is
    predicted, but has no images, as 0.

    Args:
        num_classes: Number of classes.
    """

    def __init__(self, num_classes: int) -> None:
        from torchmetrics.classification import MulticlassAccuracy, MulticlassStatScores

        metrics = {
            "top1": MulticlassAccuracy(num_classes, average="micro"),
            "top5": MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro"),
            "counts": MulticlassStatScores(num_classes, average=None),
        }
        super().__init__(metrics)

    def compute(self) -> dict[str, float]:
        """Return the metrics by name; torchmetrics adds up over processes."""
        counts_C5 = self.metrics["counts"].compute().double()
        tp_C, fp_C, _, fn_C, support_C = counts_C5.unbind(1)
        recall_C = tp_C / support_C
        f1_C = 2 * tp_C / (2 * tp_C + fp_C + fn_C)
        return {
            "top1": 100 * float(self.metrics["top1"].compute()),
            "top5": 100 * float(self.metrics["top5"].compute()),
            "macro_accuracy": _mean_in_percent(recall_C, support_C),
            "macro_f1": _mean_in_percent(f1_C, support_C),
        }


def _mean_in_percent(value_C: Tensor, support_C: Tensor) -> float:
    """Return the mean over the classes that have images; NaN without any image."""
    has_images = support_C > 0
    return 100 * float(value_C[has_images].mean()) if bool(has_images.any()) else math.nan

"""Metrics of segmentation: pixels of all images, counted by true and predicted class by torchmetrics.

Legend: B batch, C classes, S side of the image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from petune.training.meter import TorchMeter


class SegmentationMeter(TorchMeter):
    """Computes `miou`, `pixel_accuracy` and `iou/NAME` of each class, in percent.

    mIoU is that of torchmetrics' MulticlassJaccardIndex on the pixels of all images together: the mean over the
    classes that masks or predictions have.

    Args:
        names: Names of the classes.
        ignore_index: Value of the pixels that do not count.
    """

    def __init__(self, names: Sequence[str], ignore_index: int) -> None:
        from torchmetrics.classification import MulticlassConfusionMatrix

        self.names = names
        # checking the values of every pixel takes longer than counting them; datasets are checked when they are loaded
        pixels = MulticlassConfusionMatrix(len(names), ignore_index=ignore_index, validate_args=False)
        super().__init__({"pixels": pixels})

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Count the pixels of a batch: logits (B, C, S, S) and classes (B, S, S)."""
        super().update(outputs.argmax(1), targets.long())

    def compute(self) -> dict[str, float]:
        """Return the metrics by name; NaN for one that is undefined on these images."""
        confusion_CC = self.metrics["pixels"].compute().double()
        right_C, total = confusion_CC.diagonal(), float(confusion_CC.sum())
        union_C = confusion_CC.sum(0) + confusion_CC.sum(1) - right_C
        iou_C = (100 * right_C / union_C).tolist()
        defined = [iou for iou in iou_C if not math.isnan(iou)]
        return {
            "miou": sum(defined) / len(defined) if defined else math.nan,
            "pixel_accuracy": 100 * float(right_C.sum()) / total if total else math.nan,
            **{f"iou/{name}": iou for name, iou in zip(self.names, iou_C, strict=True)},
        }

"""Classification: each image has one class.

Legend: B batch, C classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from petune.base.metric import Metric
from petune.base.text import has_top5
from petune.data.target import Target
from petune.training.meter import TorchMeter
from petune.training.task import Task, TaskConfig

if TYPE_CHECKING:
    from petune.training.task import Mix

TOP1 = Metric(name="top1", label="top-1", percent=True)
TOP5 = Metric(name="top5", label="top-5", percent=True)


class ClassificationConfig(TaskConfig):
    """Options of classification."""


class Classification(Task[ClassificationConfig]):
    """Cross-entropy; top-1 and top-5 accuracy. With fewer than five classes, top5 is the top-C accuracy."""

    target_kind = "class"
    metrics: tuple[Metric, ...] = (TOP1, TOP5)
    smooths_labels = True

    def bind(self, target: Target, state: dict[str, Any]) -> None:
        """Set the targets and the state; top-5 is not shown where it is always 100 %."""
        super().bind(target, state)
        self.metrics = (TOP1, TOP5) if has_top5(len(target.names)) else (TOP1,)

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the cross-entropy of each image, (B,).

        Args:
            outputs: Logits (B, C).
            targets: Classes (B,), or probabilities (B, C) if they are mixed.
            label_smoothing: Probability that is spread over all classes.
        """
        return F.cross_entropy(outputs, targets, reduction="none", label_smoothing=label_smoothing)

    def new_meter(self) -> TorchMeter:
        """Return a meter of top-1 and top-5."""
        from torchmetrics.classification import MulticlassAccuracy

        num_classes = len(self.target.names)
        accuracies = {
            TOP1.name: MulticlassAccuracy(num_classes, average="micro"),
            TOP5.name: MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro"),
        }
        return TorchMeter(accuracies, percent=accuracies)

    def mix(self, mixup: float, cutmix: float, label_smoothing: float) -> Mix:
        """Return timm's Mixup, which turns classes into probabilities (B, C)."""
        from timm.data import Mixup

        mix: Mix = Mixup(
            mixup_alpha=mixup,
            cutmix_alpha=cutmix,
            label_smoothing=label_smoothing,
            num_classes=len(self.target.names),
        )
        return mix

    def predict(self, outputs: Tensor) -> list[dict[str, float]]:
        """Return the probability of each class by name, the most probable first."""
        probabilities_BC, order_BC = torch.softmax(outputs, 1).sort(dim=1, descending=True)
        names = self.target.names
        pairs = zip(probabilities_BC.tolist(), order_BC.tolist(), strict=True)
        return [{names[c]: p for p, c in zip(row, order, strict=True)} for row, order in pairs]

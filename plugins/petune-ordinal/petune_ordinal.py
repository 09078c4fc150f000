"""Ordinal regression: classes with an order, by CORN.

Legend: B batch, C classes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

import petune


class OrdinalMeter(petune.TorchMeter):
    """Metrics of ranks, which are computed from the outputs."""

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Update every metric with the rank of each image."""
        super().update(ranks(outputs), targets)


class Ordinal(petune.Task[petune.TaskConfig]):
    """Predict a class whose neighbors are more alike than distant classes.

    CORN (Shi, Cao and Raschka, 2021, arXiv 2111.08851, eq. 6), with outputs f_1 … f_(C-1):

        loss = - Σ_k [y ≥ k-1] · ( [y ≥ k] · log σ(f_k) + [y < k] · log(1 - σ(f_k)) )
        P(y ≥ k) = Π_(j ≤ k) σ(f_j)            rank = number of k with P(y ≥ k) > 1/2

    Differs from the paper: the loss is divided by the number of images, not by the number of terms, so that the loss
    of an image does not depend on the others.
    """

    target_kind = "class"
    metrics = (
        petune.Metric(name="mae", label="MAE in classes", higher_is_better=False),
        petune.Metric(name="kappa", label="quadratic kappa"),
        petune.Metric(name="top1", label="top-1", percent=True),
    )

    def num_outputs(self) -> int:
        """Return C - 1: one output for each border between two classes."""
        return len(self.target.names) - 1

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return CORN's loss of each image, (B,), from outputs (B, C - 1) and classes (B,)."""
        borders = torch.arange(outputs.shape[1], device=outputs.device)
        is_above = (targets[:, None] > borders).float()
        is_asked = (targets[:, None] >= borders).float()
        losses = F.binary_cross_entropy_with_logits(outputs, is_above, reduction="none")
        return (losses * is_asked).sum(1)

    def new_meter(self) -> OrdinalMeter:
        """Return a meter of the metrics, by their names."""
        from torchmetrics import MeanAbsoluteError
        from torchmetrics.classification import MulticlassAccuracy, MulticlassCohenKappa

        num_classes = len(self.target.names)
        metrics = {
            "mae": MeanAbsoluteError(),
            "kappa": MulticlassCohenKappa(num_classes, weights="quadratic"),
            "top1": MulticlassAccuracy(num_classes, average="micro"),
        }
        return OrdinalMeter(metrics, percent=["top1"])

    def predict(self, outputs: Tensor) -> list[str]:
        """Return the name of the predicted class of each image."""
        return [self.target.names[rank] for rank in ranks(outputs).tolist()]


def ranks(outputs: Tensor) -> Tensor:
    """Return the predicted class, int64 (B,), from outputs (B, C - 1)."""
    return (outputs.sigmoid().cumprod(1) > 0.5).sum(1)

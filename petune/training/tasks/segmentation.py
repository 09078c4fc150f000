"""Segmentation: each pixel has a class.

Legend: B batch, C classes, S side of the image, P pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from petune.base.block_choice import BlockChoice
from petune.base.errors import ConfigError, DataError
from petune.base.metric import Metric
from petune.data.dataset import Split
from petune.data.target import Target
from petune.training.dense_head import add_dense_head
from petune.training.task import Task, TaskConfig

if TYPE_CHECKING:
    from petune.training.tasks.segmentation_meter import SegmentationMeter

MIOU = Metric(name="miou", label="mIoU", percent=True)
PIXEL_ACCURACY = Metric(name="pixel_accuracy", label="pixel accuracy", percent=True)
CHUNK = 64
"""Masks that are looked at at a time; bounds the memory."""


class SegmentationConfig(TaskConfig):
    """Options of segmentation.

    Attributes:
        loss: `ce`, cross-entropy; `dice`, one minus the Dice coefficient of the classes in the image (Milletari et
            al., 2016, arXiv 1606.04797); or `ce_dice`, their sum.
        blocks: Blocks whose tokens the head reads: `last:K`, `first:K`, `every:K`, `all`, or a list of numbers.
    """

    loss: Literal["ce", "dice", "ce_dice"] = "ce"
    blocks: BlockChoice = "last:1"


class Segmentation(Task[SegmentationConfig]):
    """A linear head on the tokens of patches; mIoU over all pixels of a split chooses the epoch.

    The loss of an image is a mean over its pixels that count, so every image has the same weight however many pixels
    are ignored; an image without any has a loss of 0. A class that a split has neither in masks nor in predictions
    does not count for mIoU.
    """

    target_kind = "mask"
    metrics: tuple[Metric, ...] = (MIOU, PIXEL_ACCURACY)

    def __init__(self, config: SegmentationConfig | None = None, **options: Any) -> None:
        """Configure the task; see `petune.Task`."""
        super().__init__(config, **options)
        self.smooths_labels = self.config.loss != "dice"

    def bind(self, target: Target, state: dict[str, Any]) -> None:
        """Set the targets and the state; there is an IoU of each class."""
        super().bind(target, state)
        each = (Metric(name=f"iou/{n}", label=f"IoU of {n}", percent=True, per_class=True) for n in target.names)
        self.metrics = (*type(self).metrics, *each)

    def fit(self, train: Split, target: Target) -> dict[str, Any]:
        """Check that the masks of the training images count pixels.

        Raises:
            DataError: All pixels of all of them are ignored.
        """
        for start in range(0, len(train), CHUNK):
            masks = train.targets_at(np.arange(start, min(start + CHUNK, len(train))))
            if (masks != target.ignore_index).any():
                return {}
        raise DataError(
            f"all pixels of all training masks have the value {target.ignore_index}, which is ignored, so there is "
            "nothing to learn. Check the masks, or which value is ignored"
        )

    def add_head(self, model: nn.Module, seed: int) -> nn.Module:
        """Replace the classifier by a head on the tokens of patches; see `petune.add_dense_head`."""
        return add_dense_head(model, self.num_outputs(), blocks=self.config.blocks, seed=seed)

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the loss of each image, (B,), over its pixels that count.

        Args:
            outputs: Logits (B, C, S, S).
            targets: Classes (B, S, S), or the ignored value.
            label_smoothing: Of the cross-entropy: probability that is spread over all classes.
        """
        self._check_shapes(outputs, targets)
        classes_BP, logits_BCP = targets.flatten(1).long(), outputs.flatten(2)
        counts_BP = classes_BP != self.target.ignore_index
        losses = []
        if self.config.loss != "dice":
            pixels_BP = F.cross_entropy(
                logits_BCP,
                classes_BP,
                reduction="none",
                ignore_index=self.target.ignore_index,
                label_smoothing=label_smoothing,
            )
            losses.append(pixels_BP.sum(1) / counts_BP.sum(1).clamp(min=1))
        if self.config.loss != "ce":
            losses.append(_dice_losses(logits_BCP, classes_BP, counts_BP))
        return torch.stack(losses).sum(0)

    def new_meter(self) -> SegmentationMeter:
        """Return a meter of mIoU, pixel accuracy and the IoU of each class, over all pixels that count."""
        from petune.training.tasks.segmentation_meter import SegmentationMeter

        return SegmentationMeter(self.target.names, self.target.ignore_index)

    def predict(self, outputs: Tensor) -> list[dict[str, float]]:
        """Return the share of the pixels that each class has, by name, the largest first."""
        names, predictions = self.target.names, []
        for classes_SS in outputs.argmax(1).cpu():
            counts_C = torch.bincount(classes_SS.flatten(), minlength=len(names))
            shares = zip(names, (counts_C.double() / classes_SS.numel()).tolist(), strict=True)
            predictions.append(dict(sorted(shares, key=lambda share: -share[1])))
        return predictions

    def _check_shapes(self, outputs: Tensor, targets: Tensor) -> None:
        wanted = (len(targets), self.num_outputs(), *targets.shape[1:])
        if tuple(outputs.shape) != wanted:
            raise ConfigError(
                f"the model returned outputs of shape {tuple(outputs.shape)} for masks of shape "
                f"{tuple(targets.shape)}. It must return {wanted}, as after petune.add_dense_head"
            )


def _dice_losses(logits_BCP: Tensor, classes_BP: Tensor, counts_BP: Tensor) -> Tensor:
    """Return 1 - 2 Σ p·t / Σ (p + t) over the pixels that count, the mean over the classes that an image has, (B,)."""
    p_BCP = logits_BCP.softmax(1) * counts_BP[:, None]
    t_BCP = F.one_hot(classes_BP * counts_BP, logits_BCP.shape[1]).transpose(1, 2) * counts_BP[:, None]
    overlap_BC, total_BC, size_BC = (p_BCP * t_BCP).sum(2), (p_BCP + t_BCP).sum(2), t_BCP.sum(2)
    losses_BC = (1 - 2 * overlap_BC / total_BC.clamp(min=1e-6)) * (size_BC > 0)
    return losses_BC.sum(1) / (size_BC > 0).sum(1).clamp(min=1)

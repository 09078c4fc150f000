"""Top-1 and top-5 of a model on a split; each picture counted once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from petune.data.batches import Preprocess, eval_batches
from petune.data.dataset import Split
from petune.train.stop import StopFlag


@dataclass(frozen=True)
class Accuracy:
    """Percentages over `num_pictures` pictures. With fewer than five classes top5 is the top-C accuracy."""

    top1: float
    top5: float
    loss: float
    num_pictures: int


def evaluate(
    model: nn.Module,
    split: Split,
    preprocess: Preprocess,
    *,
    num_classes: int,
    batch_size: int,
    device: torch.device,
    autocast: Callable[[], torch.autocast],
    stop: StopFlag | None = None,
    by_position: Callable[[Tensor], Tensor] | None = None,
) -> Accuracy:
    """Evaluate in eval mode without gradients; every module's training flag is put back afterwards.

    Args:
        by_position: Gives the scores of pictures by their places in the split, in place of the model's own forward.

    Raises:
        Stopped: A signal came in between.
    """
    from torchmetrics.classification import MulticlassAccuracy

    top1 = MulticlassAccuracy(num_classes, average="micro").to(device)
    top5 = MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro").to(device)
    training = [module for module in model.modules() if module.training]
    model.eval()
    loss = torch.zeros((), device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)
    try:
        with torch.inference_mode():
            cached = by_position is not None
            for batch in eval_batches(split, preprocess, batch_size, device, positions_only=cached):
                if stop is not None:
                    stop.check()
                with autocast():
                    logits_BC = (by_position or model)(batch.x_BCHW)
                top1.update(logits_BC, batch.y_B)
                top5.update(logits_BC, batch.y_B)
                loss += nn.functional.cross_entropy(logits_BC.float(), batch.y_B, reduction="sum")
    finally:
        for module in training:
            module.training = True
    accuracies = (100 * float(top1.compute()), 100 * float(top5.compute()))
    return Accuracy(*accuracies, float(loss) / len(split), len(split))

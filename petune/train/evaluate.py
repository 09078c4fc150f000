"""Top-1 and top-5 of a model on a split; each picture counted once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

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


def load_accuracy() -> Any:
    """torchmetrics' accuracy. A second of imports the first time: a run has them before it has anything to lose."""
    from torchmetrics.classification import MulticlassAccuracy

    return MulticlassAccuracy


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
) -> Accuracy:
    """Evaluate in eval mode without gradients; every module's training flag is put back afterwards.

    Raises:
        Stopped: A signal came in between.
    """
    accuracy = load_accuracy()
    top1 = accuracy(num_classes, average="micro").to(device)
    top5 = accuracy(num_classes, top_k=min(5, num_classes), average="micro").to(device)
    training = [module for module in model.modules() if module.training]
    model.eval()
    loss = torch.zeros((), device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)
    try:
        with torch.inference_mode():
            for batch in eval_batches(split, preprocess, batch_size, device):
                if stop is not None:
                    stop.check()
                with autocast():
                    logits_BC = model(batch.x_BCHW)
                top1.update(logits_BC, batch.y_B)
                top5.update(logits_BC, batch.y_B)
                loss += nn.functional.cross_entropy(logits_BC.float(), batch.y_B, reduction="sum")
    finally:
        for module in training:
            module.training = True
    accuracies = (100 * float(top1.compute()), 100 * float(top5.compute()))
    return Accuracy(*accuracies, float(loss) / len(split), len(split))

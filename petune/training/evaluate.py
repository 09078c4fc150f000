"""Top-1 and top-5 of a model on a split; each image counted once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from petune.base.distributed import SINGLE_PROCESS, Group
from petune.data.batches import Batch, Preprocess, eval_batches
from petune.data.dataset import Split
from petune.training.stop import StopFlag


@dataclass(frozen=True)
class Accuracy:
    """Percentages over `num_images` images. With fewer than five classes top5 is the top-C accuracy."""

    top1: float
    top5: float
    loss: float
    num_images: int


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
    by_position: Callable[[Tensor], Tensor] | None = None,
    group: Group = SINGLE_PROCESS,
    sharded: bool = False,
) -> Accuracy:
    """Evaluate in eval mode without gradients; every module's training flag is put back afterwards.

    Several processes take a part of the split each, and each gets the accuracy over all of it. Where they hold parts of
    the model (`sharded`), each does as many forwards as the others.

    Args:
        by_position: Gives the logits of images by their places in the split, in place of the model's own forward.

    Raises:
        Stopped: A signal came in between.
    """
    accuracy = load_accuracy()
    top1 = accuracy(num_classes, average="micro").to(device)
    top5 = accuracy(num_classes, top_k=min(5, num_classes), average="micro").to(device)
    training = [module for module in model.modules() if module.training]
    model.eval()
    sums = torch.zeros(2, device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)
    cached = by_position is not None  # never where several processes train
    batches = _as_many_as_the_others(split, preprocess, batch_size, device, group, positions_only=cached)
    failed: list[Exception] = []
    try:
        # a block that is first gathered in inference mode cannot be trained through afterwards
        with torch.no_grad() if sharded else torch.inference_mode():
            for batch in batches:
                if stop is not None:
                    stop.check(group, failed)
                if batch is None:
                    if sharded:
                        model(preprocess.blank(device))
                    continue
                with nullcontext() if sharded else group.collect_errors(failed):
                    with autocast():
                        logits_BC = (by_position or model)(batch.x_BCHW)
                    top1.update(logits_BC, batch.y_B)
                    top5.update(logits_BC, batch.y_B)
                    sums[0] += nn.functional.cross_entropy(logits_BC.float(), batch.y_B, reduction="sum")
                    sums[1] += len(batch.y_B)
    finally:
        for module in training:
            module.training = True
    group.any_rank(errors=failed)
    loss, count = group.all_reduce_sum(sums).tolist()
    # the metrics add up their own counts over the processes
    return Accuracy(100 * float(top1.compute()), 100 * float(top5.compute()), loss / count, len(split))


def _as_many_as_the_others(
    split: Split,
    preprocess: Preprocess,
    batch_size: int,
    device: torch.device,
    group: Group,
    *,
    positions_only: bool,
) -> Iterator[Batch | None]:
    """This process's batches, and None for as long as another one still has some."""
    if group.size > 1 and len(split) >= group.size:  # else all of them evaluate the few there are
        mine = split.take(np.arange(len(split))[group.shard(len(split))])
        largest = -(-len(split) // group.size)
    else:
        mine, largest = split, len(split)
    batches = eval_batches(mine, preprocess, batch_size, device, positions_only=positions_only)
    for _ in range(0, largest, batch_size):
        yield next(batches, None)

"""What the processes of a group tell each other at every step, in one message."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from petune.base.distributed import Group


@dataclass(frozen=True)
class Asked:
    """What is to be done once a step is over."""

    stop: bool
    save: bool


def share_step(
    group: Group,
    parameters: Sequence[nn.Parameter],
    model: nn.Module,
    loss: Tensor,
    share: float,
    asked: Asked,
    failed: Sequence[Exception],
) -> Asked:
    """Gradients and `loss` become their sums over the group; what any process asks for is done by all.

    Args:
        group: More than one process.
        parameters: What trains, in the same order everywhere.
        model: Its running statistics (BatchNorm) become their mean, since each process saw other images.
        loss: Of this process's images, over the number of all.
        share: This process's part of the batch's images, in 0..1.
        asked: What this process asks for.
        failed: What went wrong on this process.

    Raises:
        Exception: What went wrong on any process.
    """
    said = torch.tensor([float(f) for f in (bool(failed), asked.stop, asked.save)], device=loss.device)
    moving = _running_statistics(model)
    for tensor in moving:
        tensor.mul_(share)
    group.all_reduce_gradients(parameters, [said, loss, *moving])
    any_failed, stop, save = (bool(flag) for flag in said.tolist())
    if any_failed:
        group.any_rank(errors=failed)
    return Asked(stop, save)


def _running_statistics(model: nn.Module) -> list[Tensor]:
    norms = (m for m in model.modules() if m.training and isinstance(m, nn.modules.batchnorm._BatchNorm))
    return [t for norm in norms for t in (norm.running_mean, norm.running_var) if t is not None]

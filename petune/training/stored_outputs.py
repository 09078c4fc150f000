"""Outputs and targets of a whole split, for metrics that are not sums over images.

Legend: N images, C outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class StoredOutputs(Metric):  # type: ignore[misc]
    """Keep outputs and targets, (N, C) each; `compute` returns those of all processes.

    A decision such as "these are logits" is then made once for all images, not for each batch.
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("outputs", default=[], dist_reduce_fx="cat")
        self.add_state("targets", default=[], dist_reduce_fx="cat")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Keep a batch, copied: what a caller does to its tensors later does not matter."""
        self.outputs.append(outputs.detach().clone())
        self.targets.append(targets.detach().clone())

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return outputs and targets, float64 on the CPU, in the order of the updates and of the processes."""
        from torchmetrics.utilities import dim_zero_cat

        outputs_NC, targets_NC = dim_zero_cat(self.outputs), dim_zero_cat(self.targets)
        return outputs_NC.cpu().to(torch.float64), targets_NC.cpu().to(torch.float64)

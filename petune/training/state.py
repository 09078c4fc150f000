"""The state that training changes, as one object for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor, nn

from petune.base.errors import CheckpointError
from petune.base.metric import Metric, SplitMetrics
from petune.training.average import Average
from petune.training.checkpoint import BUFFER, Checkpoint
from petune.training.progress import Progress


class ResumableState:
    """Parameters, buffers, optimizer and progress of a training, and the tensors of the best epoch.

    Args:
        model: Its buffers are part of the state.
        params: Everything that trains, by state_dict key.
        optimizer: Of these parameters.
        keep: Whether the best epoch or the last one is kept.
        metric: Chooses the best epoch.
        ema: Decay of the average that is evaluated and kept; None keeps the parameters themselves.

    Attributes:
        progress: How far the training is.
        average: The average of the parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        keep: Literal["best", "last"],
        metric: Metric,
        ema: float | None = None,
    ) -> None:
        self.model = model
        self.params = params
        self.optimizer = optimizer
        self.keep = keep
        self.metric = metric
        self.progress = Progress()
        self.average = Average(params, ema)
        self.best: Mapping[str, Tensor] = {}

    def tensors(self) -> dict[str, Tensor]:
        """Return the parameters that train and all buffers, by key."""
        return {**self.params, **{f"{BUFFER}{name}": buffer for name, buffer in self.model.named_buffers()}}

    def record(self, val: SplitMetrics) -> None:
        """Note the metrics at the end of an epoch; if they are the best, or the last one is kept, keep this epoch.

        Of epochs with the same value, which are common with few val images, the one with the lowest loss is the best;
        if that is the same too, the later one.
        """
        p = self.progress
        if self.keep == "best" and p.best_epoch > 0 and self._rank(val) < self._rank(p.best(val.num_images)):
            return
        p.best_epoch = p.epoch + 1
        p.best_values = dict(val.values)
        if self.keep == "best":
            with self.average.applied():
                self.best = {key: tensor.detach().clone() for key, tensor in self.tensors().items()}

    def _rank(self, val: SplitMetrics) -> tuple[float, float]:
        return self.metric.score(val.value(self.metric)), -val.loss

    def restore_best(self) -> None:
        """Give the model the tensors of the kept epoch, which are averages if there are any."""
        if self.best:
            copy_tensors(self.best, self.tensors())
        else:
            self.average.apply()

    def checkpoint(self) -> Checkpoint:
        """Return everything that a resume needs."""
        optimizer, progress = self.optimizer.state_dict(), asdict(self.progress)
        return Checkpoint(self.tensors(), self.best, optimizer, progress, self.average.values)

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint.

        Raises:
            CheckpointError: It is of another model, method or dataset, or of another grouping of parameters.
        """
        tensors = self.tensors()
        if {k: t.shape for k, t in tensors.items()} != {k: t.shape for k, t in checkpoint.tensors.items()}:
            raise CheckpointError(
                "the checkpoint is of another model, method or dataset, or the library of the model has renamed its "
                "modules since. Install the version that the run was started with, or use another run directory"
            )
        if _group_sizes(self.optimizer.state_dict()) != _group_sizes(checkpoint.optimizer):
            raise CheckpointError(
                "the run was started with a petune that applied weight decay to other parameters. Install that one, "
                "or use another run directory"
            )
        copy_tensors(checkpoint.tensors, tensors)
        self.best = {key: tensor.to(tensors[key].device) for key, tensor in checkpoint.best.items()}
        self.average.load(checkpoint.average)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        self.progress = Progress(**checkpoint.progress)


def _group_sizes(optimizer: Mapping[str, Any]) -> list[int]:
    return [len(group["params"]) for group in optimizer["param_groups"]]


def copy_tensors(sources: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    """Copy the values of tensors with the same key."""
    with torch.no_grad():
        for key, target in targets.items():
            target.copy_(sources[key])

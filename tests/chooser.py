"""A tuner that uses everything a training run must handle: it calibrates, and its adapters have losses of their own."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

import petune


class MeanGate(nn.Module):
    """Scales tokens by a rate that each decides for itself; its loss is the mean rate."""

    aux_loss: Tensor | None = None

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.rate = nn.Linear(dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        rate = self.rate(x).sigmoid()
        self.aux_loss = rate.mean()
        return x * rate


class Chooser(petune.Tuner[petune.TunerConfig]):
    """Train gates, and the entry with the largest gradient of each row of each MLP's first layer."""

    identity_at_init = False

    def attach(self, edit: petune.Edit) -> None:
        blocks = edit.sites.require_blocks()
        weights = [block.mlp.enter.fc1.weight for block in blocks]
        self.entries = edit.train(weights, mask=[_one_of_each_row(w, torch.zeros(len(w)).long()) for w in weights])
        for block in blocks:
            edit.after(block.mlp, MeanGate(block.dim))

    def calibrate(self, batches: Iterable[petune.CalibrationBatch]) -> None:
        for batch in batches:
            batch.loss().backward()
        gradients = [w.grad for w in self.entries.targets]
        self.entries.choose([_one_of_each_row(g, g.abs().argmax(1)) for g in gradients if g is not None])


def _one_of_each_row(weight: Tensor, columns: Tensor) -> Tensor:
    return nn.functional.one_hot(columns.to(weight.device), weight.shape[1]).bool()

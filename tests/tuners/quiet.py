"""Tuners whose faults show in no loss: tensors that are kept, and results that depend on the mode or on the batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import petune
from tests.tuners.disturbing import Low, Sound, broken


class KeepsList(Low):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach())
        return super().forward(x)


class KeepsDict(Low):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.cache["x"] = x.detach()
        return super().forward(x)


class KeepsByShape(Low):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.cache: dict[Any, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.cache.setdefault(x.shape, x.detach())
        return super().forward(x)


class KeepsInObject(Low):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.last = SimpleNamespace(x=None)

    def forward(self, x: Tensor) -> Tensor:
        self.last.x = x.detach()
        return super().forward(x)


class CountsForwards(Low):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return super().forward(x)


class LearnsOtherScale(Low):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 if torch.is_grad_enabled() else 0.5)


class WritesToInput(Low):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        x.data.add_(y.data)
        return y


class MixesInTraining(Low):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y - y.mean(0, keepdim=True) if self.training else y


class SmallBatchesOnly(Low):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 if len(x) < 8 else 0.0)


class Unfreezes(Sound):
    def attach(self, edit: petune.Edit) -> None:
        super().attach(edit)
        for block in edit.sites.require_blocks():
            block.parts["norm1"].enter.bias.requires_grad_(True)


class ConstantLoss(Sound):
    def loss(self, step: int) -> Tensor:
        return torch.ones(())


class Normalizes(Low):
    """Sound: BatchNorm mixes images in training, and dropout draws."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.norm, self.drop = nn.BatchNorm1d(dim), nn.Dropout(0.1)
        self.grids: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        grid = self.grids.setdefault(x.shape[1], torch.ones(x.shape[1], 1))
        return super().forward(self.drop(self.norm(x.flatten(0, -2)).view_as(x))) * grid.to(x.dtype)


SOUND = [broken(Normalizes)]
CASES: list[tuple[Any, str, str]] = [
    (broken(KeepsList), "no state between forwards", "seen keeps a tensor"),
    (broken(KeepsDict), "no state between forwards", "cache keeps a tensor"),
    (broken(KeepsByShape), "no state between forwards", "cache keeps a tensor"),
    (broken(KeepsInObject), "no state between forwards", "last keeps a tensor"),
    (broken(CountsForwards), "no state between forwards", "count changes in a forward in eval mode"),
    (broken(LearnsOtherScale), "repeatable evaluation", "torch.no_grad()"),
    (broken(WritesToInput), "unchanged inputs", "changes its input in place"),
    (broken(MixesInTraining), "independent images", "in train mode"),
    (broken(SmallBatchesOnly), "independent images", "in a batch of 16"),
    (Unfreezes(), "flags", "attach sets requires_grad of blocks.0.norm1.bias"),
    (ConstantLoss(), "auxiliary loss", "loss(step) never has a gradient"),
]
"""Each with the property that it breaks, and a part of the message."""

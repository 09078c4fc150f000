"""Prompts on top of another attachment, whose trained adapter acts on what enters the same blocks."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import petune
from tests.tiny import X, randomised, tiny


class Scale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class ScaleInputs(petune.Tuner[petune.TunerConfig]):
    """Scale what enters each block."""

    def attach(self, edit: petune.Edit) -> None:
        for block in edit.sites.require_blocks():
            edit.before(block, Scale(block.dim))


def test_prompts_load_on_top_of_an_adapter_before_the_blocks(tmp_path: Path) -> None:
    model = tiny()
    first, second = petune.attach(model, ScaleInputs(), name="first"), petune.attach(model, "vpt", name="second")
    randomised(first)
    randomised(second)
    for name, att in (("first", first), ("second", second)):
        att.save(tmp_path / name)
    expected = model(X)
    again = tiny()
    petune.load(again, tmp_path / "first", name="first", tuner=ScaleInputs())
    petune.load(again, tmp_path / "second", name="second")
    assert torch.equal(again(X), expected)

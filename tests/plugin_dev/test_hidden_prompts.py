"""The check warns of an adapter that does not see the prompts that pass through its block."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import petune
from petune.plugin_dev.contract import examine
from petune.plugin_dev.tiny_models import tiny_timm


class Tokens(nn.Module):
    num_prompts = 2

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(1, 2, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.tokens


class Scaled(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, inner: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return inner(x) * self.scale


class AroundOne(petune.Tuner[petune.TunerConfig]):
    identity_at_init = False

    def attach(self, edit: petune.Edit) -> None:
        blocks = edit.sites.require_blocks()
        edit.prompt(blocks, Tokens(blocks[0].dim))
        edit.around(self.surrounded(blocks), Scaled(blocks[0].dim))

    def surrounded(self, blocks: tuple[petune.Block, ...]) -> petune.Site | tuple[petune.Site, ...]:
        return blocks[0]


class AroundAll(AroundOne):
    def surrounded(self, blocks: tuple[petune.Block, ...]) -> petune.Site | tuple[petune.Site, ...]:
        return blocks


class AroundAttention(AroundOne):
    def surrounded(self, blocks: tuple[petune.Block, ...]) -> petune.Site | tuple[petune.Site, ...]:
        return blocks[0].attn


def test_around_one_of_several_blocks() -> None:
    with pytest.warns(UserWarning, match=r"Scaled is around blocks\.0, .* edit\.after at the block"):
        next(examine(AroundOne()))


@pytest.mark.parametrize("tuner", [AroundAll(), AroundAttention()], ids=["all", "attention"])
def test_prompts_that_are_seen_or_stay_inside(tuner: AroundOne) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        next(examine(tuner, tiny_timm()))

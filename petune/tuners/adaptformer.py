"""AdaptFormer (Chen et al., NeurIPS 2022, arXiv 2205.13535): a bottleneck MLP in parallel to every block's MLP.

    a = s · (dropout(ReLU(x W_down + b_down)) W_up + b_up)
    x = x + drop_path(mlp(norm2(x))) + a

Legend: B batch, N tokens, D width, M bottleneck.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

import petune


class AdaptFormerConfig(petune.TunerConfig):
    """Options of AdaptFormer.

    Attributes:
        bottleneck: M; the paper's 64.
        scale: s; 0.1 as published, or `learnable` from 1.0.
        dropout: On the hidden units; 0.1 on images.
        input: `residual` reads the residual stream as the authors' code does, `norm` what enters the MLP.
        variant: `seed` is the study petune starts from: input `norm`, learnable scale, added to the MLP's output and
            so inside drop path (and LayerScale, where there is one).
        train_backbone: Train the backbone too, beside the adapters: the study's second row, and its pretraining, in
            which the adapters are there from the start.
    """

    bottleneck: int = Field(64, ge=1)
    scale: Annotated[float, Field(gt=0)] | Literal["learnable"] | None = None
    dropout: float = Field(0.1, ge=0, lt=1)
    input: Literal["residual", "norm"] | None = None
    variant: Literal["official", "paddle_study"] = "official"
    train_backbone: bool = False


class BottleneckAdapter(nn.Module):
    """s · (dropout(ReLU(x W_down + b_down)) W_up + b_up), zero at the start."""

    why_not_mergeable = "its ReLU is not linear, so it is no change of weights"

    def __init__(self, dim: int, bottleneck: int, dropout: float, scale: float | Literal["learnable"]) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(dim, bottleneck), nn.Linear(bottleneck, dim)
        self.dropout = nn.Dropout(dropout)
        self.scale: nn.Parameter | float = nn.Parameter(torch.ones(1)) if scale == "learnable" else float(scale)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x_BND: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        hidden_BNM = self.dropout(torch.relu(self.down(x_BND)))
        change_BND: Tensor = self.up(hidden_BNM) * self.scale
        return change_BND


class AdaptFormer(petune.Tuner[AdaptFormerConfig]):
    """AdaptFormer. Identity at the start: the up-projection is zero.

    Parameters: 2·D·M + M + D a block, one more with a learnable scale. ViT-B/16, M = 64: 1,189,632.

    Differs from the paper: figure and equation show norm2's output as the input; the authors' code reads the raw
    residual stream and they say that the code is right, so that is the default here.

    Recipe: the upper end of the published grid (AdamW, 5e-4 to 5e-3). With vit_nano on 10,000 images of CIFAR-10 (2
    epochs, batch 128, seed 0) top-1 on val was 70.88 at 6e-3 and 70.04 at 2e-2.
    """

    recipe = petune.Recipe(lr=5e-3)

    def attach(self, edit: petune.Edit) -> None:
        """One adapter a block, from the residual stream before the MLP to the block's output."""
        if self.config.train_backbone:
            edit.train(edit.model)
        config, seed = self.config, self.config.variant == "paddle_study"
        scale = config.scale if config.scale is not None else "learnable" if seed else 0.1
        source = config.input or ("norm" if seed else "residual")
        for block in edit.sites.require_blocks():
            enter = block.mid if source == "residual" else block.mlp
            leave = block.mlp if seed else block
            edit.parallel(enter, leave, BottleneckAdapter(block.dim, config.bottleneck, config.dropout, scale))

    def num_parameters(self, sites: petune.Sites) -> int | None:
        """2·D·M + M + D a block, and its scale where that is learnable; no formula for a backbone that trains too."""
        if self.config.train_backbone:
            return None
        m, learnable = self.config.bottleneck, self.config.scale == "learnable"
        learnable |= self.config.scale is None and self.config.variant == "paddle_study"
        return sum(2 * block.dim * m + m + block.dim + learnable for block in sites.blocks)

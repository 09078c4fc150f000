"""Houlsby's adapters: a bottleneck MLP after attention and MLP of every block.

Legend: B batch, N tokens, D width, M bottleneck.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

import petune


class HoulsbyConfig(petune.TunerConfig):
    """Options of Houlsby's adapters.

    Attributes:
        bottleneck: M; the paper tries 8 to 256. The default 64 is AdaptFormer's, to compare them at equal width.
        dropout: Dropout on the hidden units; the paper has none.
    """

    bottleneck: int = Field(64, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)


class SequentialAdapter(nn.Module):
    """y + s · up(GELU(down(y))), the identity at the start; s is 1, or learned for each channel."""

    why_not_mergeable = "its GELU is not linear"

    def __init__(self, dim: int, bottleneck: int, dropout: float, *, scales_channels: bool = False) -> None:
        super().__init__()
        self.scale: nn.Parameter | float = nn.Parameter(torch.ones(dim)) if scales_channels else 1.0
        self.down = nn.Linear(dim, bottleneck)
        self.up = nn.Linear(bottleneck, dim)
        self.dropout = nn.Dropout(dropout)
        nn.init.trunc_normal_(self.down.weight, std=0.01, a=-0.02, b=0.02)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, y_BND: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        hidden_BNM = self.dropout(nn.functional.gelu(self.down(y_BND)))
        out_BND: Tensor = y_BND + self.scale * self.up(hidden_BNM)
        return out_BND


class Houlsby(petune.Tuner[HoulsbyConfig]):
    """Insert a bottleneck MLP after the attention and after the MLP of every block.

    Houlsby's adapters (Houlsby et al., ICML 2019, arXiv 1902.00751), with y = attn(norm1(x)), and again after the MLP:

        y = y + GELU(y W_down + b_down) W_up + b_up

    Trains: two adapters per block; three in a decoder's, which has two attentions. Identity at the start: the
    up-projection is zero.
    Parameters: 2·(2·D·M + M + D) per block. ViT-B/16, M = 64: 2,379,264.

    The adapter comes before LayerScale, drop path and the residual sum: in a model with LayerScale (which starts at
    1e-5 in DINOv2 and at 1e-6 in DeiT-3) its output is scaled with the sublayer's. Adapter+ (Steitz & Roth, CVPR 2024)
    puts it after them.

    Differs from the paper: the up-projection starts at zero instead of N(0, 0.01²), so the start is exactly the
    identity; the norms do not train (attach `norm` as well for that).
    """

    recipe = petune.Recipe(lr=1e-3, weight_decay=0.0)

    def attach(self, edit: petune.Edit) -> None:
        """Put one adapter after every attention and after every MLP."""
        for block in edit.sites.require_blocks():
            for site in block.sublayers:
                edit.after(site, SequentialAdapter(site.dim, self.config.bottleneck, self.config.dropout))

    def num_parameters(self, sites: petune.Sites) -> int:
        """Return 2·D·M + M + D per attention and MLP."""
        m = self.config.bottleneck
        return sum(2 * site.dim * m + m + site.dim for block in sites.blocks for site in block.branches)

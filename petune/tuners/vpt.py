"""Visual prompt tuning (Jia et al., ECCV 2022, arXiv 2203.12119): trained tokens beside the patches.

    deep:     [cls, _, patches] = block_i([cls, P_i, patches])    every block its own P_i, what became of them is cut
    shallow:  [cls, Z, patches] = blocks([cls, P, patches])       one P before block 0, cut before the final norm

Legend: P prompts, D width.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn

import petune


class VPTConfig(petune.TunerConfig):
    """Options of VPT.

    Attributes:
        deep: Prompts in every block; else only at the input.
        num_prompts: P; None is 10 for deep, 50 for shallow. Worth tuning on validation data.
        dropout: On the prompts.
    """

    deep: bool = True
    num_prompts: int | None = Field(None, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)


class Prompt(nn.Module):
    """P tokens, the same for every image."""

    why_not_mergeable = "prompts are tokens, not a change of weights"

    def __init__(self, num_prompts: int, dim: int, bound: float, dropout: float) -> None:
        super().__init__()
        self.num_prompts = num_prompts
        self.tokens = nn.Parameter(torch.empty(1, num_prompts, dim).uniform_(-bound, bound))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BND: Tensor) -> Tensor:
        """The tokens of the block (B, N, D), which are not looked at, to prompts (1, P, D); with dropout (B, P, D)."""
        drops = self.training and self.dropout.p > 0
        prompts: Tensor = self.dropout(self.tokens.expand(len(x_BND), -1, -1)) if drops else self.tokens
        return prompts


class VPT(petune.Tuner[VPTConfig]):
    """VPT-deep and VPT-shallow. Not the identity at the start.

    Prompts get no position embedding and stand behind the prefix tokens (class token, registers). Start:
    uniform(-v, v) with v = sqrt(6 / (3·patch_h·patch_w + D)); 0.0625 for ViT-B/16.

    Where attention sees windows (Swin), every window gets the prompts. Shallow ones go as far as the tokens are the
    same (`Edit.prompt_span`): through all blocks of a plain ViT, through the first stage of one that merges tokens.
    Between the blocks they are tokens like others: a model's intermediate features hold them.

    Parameters: deep L·P·D for L blocks, shallow P·D.

    Differs from the paper: AdamW instead of SGD, since its rate transfers between backbones. With vit_nano on 10,000
    images of CIFAR-10 (2 epochs, batch 128, seed 0) top-1 on val was 69.28 at 1e-2 and 68.84 at 3e-2.
    """

    recipe = petune.Recipe(lr=1e-2)
    identity_at_init = False

    def attach(self, edit: petune.Edit) -> None:
        """Prompts for every block, or for all blocks together."""
        blocks, config = edit.sites.require_blocks(), self.config
        count = config.num_prompts or (10 if config.deep else 50)
        height, width = edit.sites.patch_size or (16, 16)

        def prompt(dim: int) -> Prompt:
            return Prompt(count, dim, math.sqrt(6 / (3 * height * width + dim)), config.dropout)

        if config.deep:
            for block in blocks:
                edit.prompt(block, prompt(block.dim))
        else:
            edit.prompt(edit.prompt_span(), prompt(blocks[0].dim))

    def num_parameters(self, sites: petune.Sites) -> int:
        """L·P·D for deep, P·D for shallow."""
        blocks = sites.blocks if self.config.deep else sites.blocks[:1]
        return sum((self.config.num_prompts or (10 if self.config.deep else 50)) * block.dim for block in blocks)

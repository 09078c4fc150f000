"""Visual prompt tuning: trained tokens between the prefix tokens and the patches.

Legend: B batch, N tokens, P prompts, D width.
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
        deep: Give every block its own prompts; if false, prompts enter at the first block only.
        num_prompts: P; by default 10 for deep and 50 for shallow. The paper chooses it per dataset, on validation data.
        dropout: Dropout on the prompts; none by default.
    """

    deep: bool = True
    num_prompts: int | None = Field(None, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)

    @property
    def count(self) -> int:
        """P, with the default filled in."""
        return self.num_prompts or (10 if self.deep else 50)


class Prompt(nn.Module):
    """P tokens, the same for every image."""

    why_not_mergeable = "prompts are tokens"

    def __init__(self, num_prompts: int, dim: int, bound: float, dropout: float) -> None:
        super().__init__()
        self.num_prompts = num_prompts
        self.tokens = nn.Parameter(torch.empty(1, num_prompts, dim).uniform_(-bound, bound))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Return the prompts, (1, P, D), or (B, P, D) with dropout, whatever the block's tokens (B, N, D) are."""
        drops = self.training and self.dropout.p > 0
        prompts: Tensor = self.dropout(self.tokens.expand(len(x_BND), -1, -1)) if drops else self.tokens
        return prompts


class VPT(petune.Tuner[VPTConfig]):
    """Insert trained tokens in every block (deep) or at the input (shallow).

    Visual prompt tuning (Jia et al., ECCV 2022, arXiv 2203.12119):

        deep:     [cls, _, patches] = block_i([cls, P_i, patches])    each block has its own P_i; their outputs are cut
        shallow:  [cls, Z, patches] = blocks([cls, P, patches])       one P before block 0; cut before the final norm

    Trains: the prompts. Not the identity at the start: uniform(-v, v) with v = sqrt(6 / (3·patch_h·patch_w + D)), which
    is 0.0625 for ViT-B/16.
    Parameters: deep L·P·D for L blocks, shallow P·D. ViT-B/16, deep, P = 10: 92,160.

    Prompts have no position embedding and come after the prefix tokens (class token, registers). If attention sees
    windows (Swin), every window gets the prompts of its block. Shallow prompts pass through as many blocks as have the
    same tokens (`Edit.prompt_span`): all blocks of a plain ViT, the first stage of a model that merges tokens. Outside
    the blocks nothing sees prompts: hidden states and intermediate features have the backbone's own tokens. Attention
    maps do have rows and columns for prompts (P = 10 and 17 tokens: 27×27), because cut rows would not sum to 1. A
    token that a mask hides from all others is hidden from prompts, too.

    Differs from the paper: AdamW instead of SGD, because its learning rate transfers between backbones. Shallow prompts
    are refused on windowed models, where a token without a position cannot pass from window to window. On Swin, whose
    head averages tokens, the authors' code averages the prompts of the last block, too (10 prompts and 7×7 patches at
    224: 17 % of the mean); here the head sees no prompts, on any model.

    Recipe: with vit_nano on 10,000 images of CIFAR-10 (2 epochs, batch 128, seed 0) top-1 on val was 69.28 at 1e-2 and
    68.84 at 3e-2.
    """

    recipe = petune.Recipe(lr=1e-2)
    identity_at_init = False

    def attach(self, edit: petune.Edit) -> None:
        """Put prompts into every block, or through as many blocks as they can pass."""
        blocks = edit.sites.require_blocks()
        patch_size = edit.sites.patch_size or (16, 16)
        if self.config.deep:
            for block in blocks:
                edit.prompt(block, self._prompt(block.dim, patch_size))
        else:
            for first in _first_blocks(edit.sites):
                edit.prompt(edit.prompt_span(first), self._prompt(first.dim, patch_size))

    def num_parameters(self, sites: petune.Sites) -> int:
        """Return L·P·D for deep, P·D for shallow."""
        blocks = sites.blocks if self.config.deep else _first_blocks(sites)
        return sum(self.config.count * block.dim for block in blocks)

    def _prompt(self, dim: int, patch_size: tuple[int, int]) -> Prompt:
        bound = math.sqrt(6 / (3 * patch_size[0] * patch_size[1] + dim))
        return Prompt(self.config.count, dim, bound, self.config.dropout)


def _first_blocks(sites: petune.Sites) -> tuple[petune.Block, ...]:
    """Return the first block of each tower, in most models of the only one."""
    return tuple(dict.fromkeys(tower.blocks[0] for tower in sites.towers if tower.blocks))

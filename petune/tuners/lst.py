"""Ladder side-tuning: a small network that reads the backbone's blocks.

Legend: B batch, N tokens, D width, S width of the ladder.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

import petune


class LSTConfig(petune.TunerConfig):
    """Options of LST.

    Attributes:
        reduction: D / S; the paper's 8.
        expansion: Hidden width of a rung's MLP divided by S; the 4 of a ViT's own MLP.
    """

    reduction: int = Field(8, ge=1)
    expansion: int = Field(4, ge=1)


class Rung(nn.Module):
    """Mix what comes up the ladder with what comes from a block, and apply a pre-norm MLP."""

    def __init__(self, dim: int, side_dim: int, expansion: int) -> None:
        super().__init__()
        self.down = nn.Linear(dim, side_dim)
        self.gate = nn.Parameter(torch.zeros(1))  # sigmoid: half and half at the start
        self.norm = nn.LayerNorm(side_dim)
        self.expand = nn.Linear(side_dim, expansion * side_dim)
        self.reduce = nn.Linear(expansion * side_dim, side_dim)

    def forward(self, h_BNS: Tensor, x_BND: Tensor) -> Tensor:
        """Map (B, N, S) and (B, N, D) to (B, N, S)."""
        gate = torch.sigmoid(self.gate)
        mixed_BNS = gate * h_BNS + (1 - gate) * self.down(x_BND)
        change_BNS: Tensor = self.reduce(nn.functional.gelu(self.expand(self.norm(mixed_BNS))))
        out_BNS: Tensor = mixed_BNS + change_BNS
        return out_BNS


class Ladder(nn.Module):
    """The side network; its output is zero at the start, because `up` is."""

    why_not_mergeable = "the ladder is a network of its own"

    def __init__(self, dims: tuple[int, ...], out_dim: int, config: LSTConfig) -> None:
        super().__init__()
        side_dim = max(1, out_dim // config.reduction)
        self.first = nn.Linear(dims[0], side_dim)
        self.rungs = nn.ModuleList(Rung(dim, side_dim, config.expansion) for dim in dims[1:])
        self.up = nn.Linear(side_dim, out_dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, xs: list[Tensor]) -> Tensor:
        """Map what entered each block, (B, N, D), to what is added after the last one, (B, N, D)."""
        _refuse_other_tokens(xs)
        h_BNS = self.first(xs[0].detach())
        for rung, x_BND in zip(self.rungs, xs[1:], strict=True):
            h_BNS = rung(h_BNS, x_BND.detach())
        out_BND: Tensor = self.up(h_BNS)
        return out_BND


def _refuse_other_tokens(xs: Sequence[Tensor]) -> None:
    """Check that all blocks see as many tokens as the first one.

    Raises:
        AttachError: A block sees others.
    """
    for index, x in enumerate(xs):
        if not x.is_nested and x.shape[:-1] != xs[0].shape[:-1]:
            raise petune.AttachError(
                f"a ladder needs blocks that all see the same tokens, but {tuple(xs[0].shape)} enters its first block "
                f"and {tuple(x.shape)} its block {index}: tokens are pooled, dropped or merged between. Choose the "
                "blocks of one stage with blocks=, or use adaptformer or lora"
            )


class LST(petune.Tuner[LSTConfig]):
    """Train a small side network that reads what enters every block.

    Ladder side-tuning (Sung et al., NeurIPS 2022, arXiv 2206.06522), with x_i what enters block i of 0…L-1 and x_L what
    leaves the last one:

        h_0 = x_0 W_0
        h_i = f_i(g_i · h_{i-1} + (1 - g_i) · x_i W_i)        for i = 1…L-1
        x_L = x_L + h_{L-1} W_up

    Trains: the side network; no gradient goes through the backbone. Identity at the start: W_up is zero. Needs blocks
    that all see the same tokens (no stages that change the grid); each tower of a model of several has its own ladder.
    Parameters: (L - 1)·(D·S + 1 + 2·e·S² + (e + 4)·S) + 2·D·S + S + D for L blocks, S = D/8 and e = 4. ViT-B/16:
    1,778,795.

    Differs from the paper: rungs are MLPs on the tokens instead of small transformer blocks, because the backbone has
    already mixed its tokens; they start from random instead of pruned weights. L - 1 rungs read what enters the blocks
    1…L-1, where the authors' code has L that read what leaves each. The ladder is added to the backbone's output
    instead of replacing it, so that the start is the identity. The gates have no temperature, and there is no norm
    before W_up.
    """

    recipe = petune.Recipe(lr=2e-3, weight_decay=0.0)

    def attach(self, edit: petune.Edit) -> None:
        """Put one ladder from what enters the blocks to what leaves the last one."""
        edit.sites.require_blocks()
        for tower in edit.sites.towers:
            dims = tuple(block.dim for block in tower.blocks)
            if len(set(dims)) > 1:
                raise petune.AttachError(
                    f"a ladder needs blocks of one width, but those of {edit.sites.model} have {sorted(set(dims))}. "
                    "Use adaptformer or lora"
                )
            edit.parallel(tower.blocks, tower.blocks[-1], Ladder(dims, dims[-1], self.config))

    def num_parameters(self, sites: petune.Sites) -> int:
        """Return the formula of the class's docstring."""
        return sum(self._num_parameters(tower.blocks) for tower in sites.towers)

    def _num_parameters(self, blocks: Sequence[petune.Block]) -> int:
        dim, e = blocks[-1].dim, self.config.expansion
        s = max(1, dim // self.config.reduction)
        rung = dim * s + 1 + 2 * e * s * s + (e + 4) * s
        return (len(blocks) - 1) * rung + 2 * dim * s + s + dim

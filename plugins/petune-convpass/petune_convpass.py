"""Convpass (Jie & Deng, 2022, arXiv 2207.07039): a convolution over the token grid beside attention and MLP.

    y = attn(norm1(x)) + s · up(GELU(conv3x3(GELU(down(norm1(x))))))        and the same beside the MLP

The patches are laid out as the grid they came from; every prefix token is an image of one pixel.

Legend: B batch, N tokens, D width, H hidden channels.
"""

import torch
from pydantic import Field
from torch import Tensor, nn

import petune


class ConvpassConfig(petune.TunerConfig):
    """Options of Convpass.

    Attributes:
        hidden_dim: H; the paper's 8.
        scale: s; the paper searches 0.01 to 100 on each data set.
        dropout: Behind the convolution.
    """

    hidden_dim: int = Field(8, ge=1)
    scale: float = Field(1.0, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1)


class Bypass(nn.Module):
    """down, 3×3 convolution on the grid, up; zero at the start."""

    why_not_mergeable = "it mixes neighbouring tokens and is not linear"

    def __init__(self, dim: int, grid: tuple[int, int], num_prefix_tokens: int, config: ConvpassConfig) -> None:
        super().__init__()
        hidden_dim = config.hidden_dim
        self.grid, self.num_prefix_tokens, self.scale = grid, num_prefix_tokens, config.scale
        self.down, self.up = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, dim)
        self.conv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1)
        self.dropout = nn.Dropout(config.dropout)
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.dirac_(self.conv.weight)  # a pixel's own value at the start
        for zero in (self.down.bias, self.conv.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x_BND: Tensor) -> Tensor:
        """(B, N, D) with prefix and grid, or (B, rows, columns, D), to the same shape."""
        hidden = nn.functional.gelu(self.down(x_BND))
        hidden = self.conv_grid(hidden) if x_BND.ndim == 4 else self.conv_tokens(hidden)
        return self.scale * self.up(self.dropout(nn.functional.gelu(hidden)))

    def conv_tokens(self, hidden_BNH: Tensor) -> Tensor:
        """The patches on their grid, each prefix token by itself."""
        prefix, patches = hidden_BNH[:, : self.num_prefix_tokens], hidden_BNH[:, self.num_prefix_tokens :]
        patches = self.conv_grid(patches.unflatten(1, self.grid)).flatten(1, 2)
        alone = self.conv_grid(prefix.reshape(-1, 1, 1, prefix.shape[-1])).reshape(prefix.shape)
        return torch.cat([alone, patches], dim=1)

    def conv_grid(self, hidden_BRCH: Tensor) -> Tensor:
        """Channels last on both sides."""
        return self.conv(hidden_BRCH.movedim(-1, 1)).movedim(1, -1)


class Convpass(petune.Tuner[ConvpassConfig]):
    """Convpass. Identity at the start. Needs blocks that see prefix tokens and the whole grid.

    Parameters: 2·(2·D·H + H + D + 9·H² + H) a block. ViT-B/16, H = 8: 327,552.

    Differs from the paper: GELU instead of QuickGELU; in a model with LayerScale (DINOv2) the adapters' outputs are
    scaled by it, too, where the authors add them behind the sublayer.
    """

    recipe = petune.Recipe(lr=1e-3, weight_decay=1e-4)

    def attach(self, edit: petune.Edit) -> None:
        """Two bypasses a block."""
        grid = edit.sites.grid_size
        blocks = edit.sites.require_blocks()
        if grid is None or len({block.dim for block in blocks}) > 1:
            raise petune.AttachError(
                f"Convpass needs blocks that all see one grid of patches, which {edit.sites.model} does not have; "
                "use adaptformer"
            )
        for block in blocks:
            for site in (block.attn, block.mlp):
                edit.parallel(site, site, Bypass(block.dim, grid, edit.sites.num_prefix_tokens, self.config))

    def num_parameters(self, sites: petune.Sites) -> int:
        """2·(2·D·H + H + D + 9·H² + H) a block."""
        h = self.config.hidden_dim
        return sum(2 * (2 * block.dim * h + block.dim + 2 * h + 9 * h * h) for block in sites.blocks)

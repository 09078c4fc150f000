"""Convpass: a convolution over the token grid in parallel to attention and MLP.

Legend: B batch, N tokens, D width, H hidden channels, R rows, C columns.
"""

import torch
from pydantic import Field
from torch import Tensor, nn

import petune


class ConvpassConfig(petune.TunerConfig):
    """Options of Convpass.

    Attributes:
        hidden_dim: H; the paper's 8.
        scale: s; the paper searches 0.01 to 100 on each dataset, and 1 is the middle of that.
        dropout: Dropout after the convolution; the authors' 0.1.
    """

    hidden_dim: int = Field(8, ge=1)
    scale: float = Field(1.0, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1)


class Bypass(nn.Module):
    """down, 3×3 convolution on the grid, up; zero at the start."""

    why_not_mergeable = "it mixes neighboring tokens and is not linear"

    def __init__(self, dim: int, grid: petune.TokenGrid, config: ConvpassConfig) -> None:
        super().__init__()
        hidden_dim = config.hidden_dim
        self.grid = grid
        self.scale = config.scale
        self.down = nn.Linear(dim, hidden_dim)
        self.up = nn.Linear(hidden_dim, dim)
        self.conv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1)
        self.dropout = nn.Dropout(config.dropout)
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.dirac_(self.conv.weight)  # the identity at the start
        for zero in (self.down.bias, self.conv.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Map (B, N, D) with prefix and grid, or (B, R, C, D), to the same shape."""
        hidden = nn.functional.gelu(self.down(x_BND))
        hidden = self.conv_grid(hidden) if x_BND.ndim == 4 else self.conv_tokens(hidden)
        return self.scale * self.up(self.dropout(nn.functional.gelu(hidden)))

    def conv_tokens(self, hidden_BNH: Tensor) -> Tensor:
        """Convolve the patches on their grid, and each prefix token as an image of one pixel."""
        num_prefix_tokens = self.grid.num_prefix_tokens
        prefix, patches = hidden_BNH[:, :num_prefix_tokens], hidden_BNH[:, num_prefix_tokens:]
        rows_and_columns = self.grid.of(hidden_BNH.shape[1])  # of this call's images
        patches = self.conv_grid(patches.unflatten(1, rows_and_columns)).flatten(1, 2)
        alone = self.conv_grid(prefix.reshape(-1, 1, 1, prefix.shape[-1])).reshape(prefix.shape)
        return torch.cat([alone, patches], dim=1)

    def conv_grid(self, hidden_BRCH: Tensor) -> Tensor:
        """Convolve a grid with channels last."""
        return self.conv(hidden_BRCH.movedim(-1, 1)).movedim(1, -1)


class Convpass(petune.Tuner[ConvpassConfig]):
    """Add a convolution over the token grid in parallel to attention and MLP of every block.

    Convpass (Jie & Deng, 2022, arXiv 2207.07039), and the same with the MLP:

        y = attn(norm1(x)) + s · up(GELU(conv3x3(GELU(down(norm1(x))))))

    The patches are laid out as the grid that they came from; every prefix token is an image of one pixel.

    Trains: two convolutional adapters per block. Identity at the start: the up-projection is zero. Needs blocks that
    see prefix tokens and the whole grid.
    Parameters: 2·(2·D·H + H + D + 9·H² + H) per block. ViT-B/16, H = 8: 327,552.

    Differs from the paper: GELU instead of QuickGELU; in a model with LayerScale (DINOv2) the adapters' outputs are
    scaled by it too, where the authors add them after the sublayer.
    """

    recipe = petune.Recipe(lr=1e-3, weight_decay=1e-4)

    def attach(self, edit: petune.Edit) -> None:
        """Put one adapter beside the attention and one beside the MLP."""
        blocks = edit.sites.require_blocks()
        if edit.sites.grid_size is None or len({block.dim for block in blocks}) > 1:
            raise petune.AttachError(
                f"Convpass needs blocks that all see one grid of patches, which {edit.sites.model} does not have. "
                "Use adaptformer"
            )
        grid = edit.token_grid()
        for block in blocks:
            for site in (block.attn, block.mlp):
                edit.parallel(site, site, Bypass(block.dim, grid, self.config))

    def num_parameters(self, sites: petune.Sites) -> int:
        """Return 2·(2·D·H + H + D + 9·H² + H) per block."""
        h = self.config.hidden_dim
        return sum(2 * (2 * block.dim * h + block.dim + 2 * h + 9 * h * h) for block in sites.blocks)

"""Mona: convolutions of three sizes on the token grid, in the residual stream.

Legend: B batch, N tokens, D width, M bottleneck, R rows, C columns.
"""

import torch
from pydantic import Field
from torch import Tensor, nn

import petune


class MonaConfig(petune.TunerConfig):
    """Options of Mona.

    Attributes:
        bottleneck: M; the authors' 64.
        dropout: Dropout on the hidden units; the authors' 0.1.
    """

    bottleneck: int = Field(64, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)


class Filters(nn.Module):
    """The mean of three depthwise convolutions, then a 1×1 convolution, each with a skip connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.sizes = nn.ModuleList(nn.Conv2d(channels, channels, k, padding=k // 2, groups=channels) for k in (3, 5, 7))
        self.pointwise = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BMRC: Tensor) -> Tensor:
        """Map (B, M, R, C) to the same shape."""
        x_BMRC = x_BMRC + sum(conv(x_BMRC) for conv in self.sizes) / 3
        return x_BMRC + self.pointwise(x_BMRC)


class MonaAdapter(nn.Module):
    """x + up(GELU(filters(down(γ · LN(x) + γ' · x))))."""

    why_not_mergeable = "it mixes neighboring tokens and is not linear"

    def __init__(self, dim: int, grid: petune.TokenGrid, config: MonaConfig) -> None:
        super().__init__()
        self.grid = grid
        self.norm = nn.LayerNorm(dim)
        self.norm_scale = nn.Parameter(torch.full((dim,), 1e-6))
        self.input_scale = nn.Parameter(torch.ones(dim))
        self.down = nn.Linear(dim, config.bottleneck)
        self.filters = Filters(config.bottleneck)
        self.dropout = nn.Dropout(config.dropout)
        self.up = nn.Linear(config.bottleneck, dim)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Map (B, N, D) with prefix and grid, or (B, R, C, D), to the same shape."""
        hidden = self.down(self.norm(x_BND) * self.norm_scale + x_BND * self.input_scale)
        hidden = self.filter_grid(hidden) if x_BND.ndim == 4 else self.filter_tokens(hidden)
        return x_BND + self.up(self.dropout(nn.functional.gelu(hidden)))

    def filter_tokens(self, hidden_BNM: Tensor) -> Tensor:
        """Filter the patches on their grid, and each prefix token as an image of one pixel."""
        prefix, patches = hidden_BNM.tensor_split([self.grid.num_prefix_tokens], dim=1)
        patches = self.filter_grid(patches.unflatten(1, self.grid.of(hidden_BNM.shape[1]))).flatten(1, 2)
        alone = self.filter_grid(prefix.reshape(-1, 1, 1, prefix.shape[-1])).reshape(prefix.shape)
        return torch.cat([alone, patches], dim=1)

    def filter_grid(self, hidden_BRCM: Tensor) -> Tensor:
        """Filter a grid with channels last."""
        return self.filters(hidden_BRCM.movedim(-1, 1)).movedim(1, -1)


class Mona(petune.Tuner[MonaConfig]):
    """Filter the residual stream by convolutions of three sizes, after attention and MLP.

    Mona (Yin et al., CVPR 2025, arXiv 2408.08345), after each of the two residual sums:

        h = down(γ · LN(x) + γ' · x)            γ = 10⁻⁶, γ' = 1 at the start
        h = h + (dw3x3(h) + dw5x5(h) + dw7x7(h)) / 3
        x = x + up(GELU(h + conv1x1(h)))

    The patches are laid out as the grid that they came from; every prefix token is an image of one pixel.

    Trains: two adapters per block. Not the identity at the start, as in the authors' code.
    Parameters: 2·(2·D·M + 5·D + M² + 88·M) per block. ViT-B/16, M = 64: 2,684,928.

    Differs from the paper: its backbone is Swin, without prefix tokens. The norms of the backbone stay frozen.
    """

    recipe = petune.Recipe(lr=1e-3, weight_decay=0.05)
    identity_at_init = False

    def attach(self, edit: petune.Edit) -> None:
        """Put one adapter into the stream between attention and MLP, and one behind every block."""
        blocks = edit.sites.require_blocks()
        if edit.sites.grid_size is None:
            raise petune.AttachError(
                f"Mona needs blocks that see a grid of patches, which {edit.sites.model} does not have. Use adaptformer"
            )
        grid = edit.token_grid()
        for block in blocks:
            edit.stream(block.mid, MonaAdapter(block.mid.dim, grid, self.config))
            edit.after(block, MonaAdapter(block.dim, grid, self.config))

    def num_parameters(self, sites: petune.Sites) -> int:
        """Return 2·(2·D·M + 5·D + M² + 88·M) per block."""
        m = self.config.bottleneck
        return sum(2 * (2 * block.dim * m + 5 * block.dim + m * m + 88 * m) for block in sites.blocks)

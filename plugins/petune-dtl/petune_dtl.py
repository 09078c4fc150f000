"""DTL: a low-rank side network, added to the last blocks only.

Legend: B batch, N tokens, D width, R rank.
"""

import math

import torch
from pydantic import Field
from torch import Tensor, nn

import petune


class DTLConfig(petune.TunerConfig):
    """Options of DTL.

    Attributes:
        rank: R; the authors' 2.
        last: Number of blocks, from the end, that the side network is added to; the authors' 6 of 12. No gradient goes
            through the blocks before them.
        beta: β of the activation; the authors' 100.
        kernel: Size of the depthwise convolution of DTL+, the authors' 3; 0 for DTL without it.
    """

    rank: int = Field(2, ge=1)
    last: int = Field(6, ge=1)
    beta: float = Field(100.0, gt=0)
    kernel: int = Field(3, ge=0)


class SideNetwork(nn.Module):
    """h + x A B at every block; at the last ones its activation is added, filtered on the grid."""

    why_not_mergeable = "the side network is a network of its own"

    def __init__(self, num_blocks: int, dim: int, grid: petune.TokenGrid | None, config: DTLConfig) -> None:
        super().__init__()
        self.first_added = num_blocks - config.last
        self.beta = config.beta
        self.grid = grid
        self.down = nn.ParameterList(torch.empty(config.rank, dim) for _ in range(num_blocks))
        self.up = nn.ParameterList(torch.zeros(dim, config.rank) for _ in range(num_blocks))
        for down in self.down:
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        size = config.kernel
        self.conv = nn.Conv2d(dim, dim, size, padding="same", groups=dim, bias=False) if size else None

    def forward(self, h: Tensor | None, x: Tensor, index: int) -> tuple[Tensor, Tensor | None]:
        """Map the state and what enters a block, (..., D), to the next state and what is added after the block."""
        change = x @ self.down[index].T @ self.up[index].T
        h = change if h is None else h + change
        if index < self.first_added:
            return h, None
        added = h * torch.sigmoid(self.beta * h)
        return h, added if self.conv is None else self.filter(added)

    def filter(self, added: Tensor) -> Tensor:
        """Convolve the patches on their grid; prefix tokens stay as they are."""
        if added.ndim == 4:
            return self.conv(added.movedim(-1, 1)).movedim(1, -1)
        prefix, patches = added.tensor_split([self.grid.num_prefix_tokens], dim=1)
        patches = patches.unflatten(1, self.grid.of(added.shape[1])).movedim(-1, 1)
        return torch.cat([prefix, self.conv(patches).flatten(2).mT], dim=1)


class DTL(petune.Tuner[DTLConfig]):
    """Train a low-rank side network beside all blocks, and add it to the last ones.

    Disentangled transfer learning (Fu et al., AAAI 2024, arXiv 2312.07856), with x_i what enters block i:

        h_i = h_{i-1} + x_i A_i B_i
        x_{i+1} = block_i(x_i) + conv(h_i · sigmoid(β h_i))        in the last blocks
        x_{i+1} = block_i(x_i)                                     before them

    conv is depthwise, on the grid of the patches, and shared by all blocks (DTL+); prefix tokens are added unfiltered.

    Trains: two matrices per block and the convolution. No gradient goes through the blocks before the last ones.
    Identity at the start: B is zero. Needs blocks that all see the same tokens; each tower of a model of several has
    its own network.
    Parameters: 2·D·R per block, K²·D for a K×K convolution. ViT-B/16, R = 2, K = 3: 43,776.

    Differs from the paper: its Swin adds to the last blocks of a network with stages, which is refused here.
    """

    recipe = petune.Recipe(lr=1e-3, weight_decay=0.0)

    def attach(self, edit: petune.Edit) -> None:
        """Put one side network beside the blocks of each tower."""
        sites = edit.sites
        sites.require_blocks()
        if self.config.kernel and sites.grid_size is None:
            raise petune.AttachError(f"{sites.model} has no grid of patches for DTL's convolution. Use kernel=0")
        grid = edit.token_grid() if self.config.kernel else None
        for tower in sites.towers:
            dims = {block.dim for block in tower.blocks}
            if len(dims) > 1:
                raise petune.AttachError(
                    f"DTL needs blocks of one width, but those of {sites.model} have {sorted(dims)}. Use adaptformer"
                )
            edit.side(tower.blocks, SideNetwork(len(tower.blocks), *dims, grid, self.config))

    def num_parameters(self, sites: petune.Sites) -> int:
        """Return 2·D·R per block and K²·D per tower."""
        towers = [tower.blocks for tower in sites.towers]
        filters = sum(self.config.kernel**2 * blocks[0].dim for blocks in towers)
        return filters + sum(2 * block.dim * self.config.rank for blocks in towers for block in blocks)

"""Rows and columns of the patches in each call of a model, for adapters that work on the grid of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from petune.base.errors import AttachError
from petune.sites.recorder import record_calls
from petune.sites.site import Sites


class TokenGrid:
    """The grid of patches in the current forward, as the convolution that makes the patches has left it.

    Attributes:
        model: The model's class name, for messages.
        num_prefix_tokens: Number of tokens before the patches.
    """

    def __init__(self, sites: Sites) -> None:
        self.model = sites.model
        self.num_prefix_tokens = sites.num_prefix_tokens
        # by number of patches, since a block may be repeated in a backward pass after a forward of another size
        self._grids: dict[int, tuple[int, int]] = {}
        self._ambiguous: set[int] = set()
        if sites.grid_size is not None:
            self._add(sites.grid_size)

    def of(self, num_tokens: int) -> tuple[int, int]:
        """Return rows and columns of the patches among a block's tokens, prefix tokens included.

        Raises:
            AttachError: The tokens are not a prefix and one grid of patches.
        """
        num_patches = num_tokens - self.num_prefix_tokens
        grid = self._grids.get(num_patches)
        if grid is None:
            raise AttachError(
                f"a block of {self.model} has {num_tokens} tokens, not {self.num_prefix_tokens} prefix tokens "
                "and the grid of patches of this image. Use images of the size that petune.attach has seen, without "
                "padding, packing or prompts; or a method that needs no grid, such as adaptformer"
            )
        in_backward = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        if num_patches in self._ambiguous and in_backward:
            raise AttachError(
                f"a block is repeated in a backward pass, and {num_patches} patches were both wide and high. Train "
                "without gradient checkpointing, or with images of one shape"
            )
        return grid

    def leave(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """Note the grid; hook of the convolution that makes the patches."""
        self._add((output.shape[-2], output.shape[-1]))

    def _add(self, grid: tuple[int, int]) -> None:
        num_patches = grid[0] * grid[1]
        if self._grids.get(num_patches, grid) != grid:
            self._ambiguous.add(num_patches)
        self._grids[num_patches] = grid


def patch_convolution(model: nn.Module, sites: Sites) -> nn.Module | None:
    """Return the last convolution before the blocks that returns the grid of patches; None if there is none."""
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    calls = record_calls(model, sites.input_size, [*convolutions, sites.blocks[0].enter])
    start = calls[sites.blocks[0].enter].start
    makers = [
        m
        for m in convolutions
        if m in calls
        and calls[m].start < start
        and (y := calls[m].output) is not None
        and tuple(y.shape[-2:]) == sites.grid_size
    ]
    return max(makers, key=lambda m: calls[m].start, default=None)

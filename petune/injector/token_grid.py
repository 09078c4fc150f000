"""Rows and columns of the patches in each call of a model, for adapters that work on the grid of tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from petune.base.errors import AttachError
from petune.injector.hooks.base import in_backward
from petune.sites.forward import tensors_in
from petune.sites.patch_order import are_out_of_order
from petune.sites.recorder import record_calls
from petune.sites.sites import Sites


class TokenGrid:
    """The grid of patches in the current forward: what the convolution that makes the patches returns.

    Where a linear layer makes them (NaFlexViT, gemma4), its output has no rows and columns. There the grid follows from
    the size of the image that the model is called with.

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
        if sites.image_grid is not None:
            self._add(sites.image_grid)
        self._seen = sites.input_spec, sites.image_grid
        self._reads_images = False
        self._of_image: tuple[int, int] | None = None

    def of(self, num_tokens: int) -> tuple[int, int]:
        """Return rows and columns of the patches among a block's tokens, prefix tokens included.

        Raises:
            AttachError: The tokens are not a prefix and one grid of patches, or the grid is not known.
        """
        num_patches = num_tokens - self.num_prefix_tokens
        is_repeated = in_backward()
        grid = self._grids.get(num_patches)
        if self._reads_images and not is_repeated:
            grid = self._of_image
            if grid is not None and grid[0] * grid[1] != num_patches:
                grid = None
        grid = grid or self._of_stage(num_patches)
        if grid is None:
            raise AttachError(
                f"a block of {self.model} has {num_tokens} tokens, not {self.num_prefix_tokens} prefix tokens "
                "and the grid of patches of this image. Use images of the size that petune.attach has seen, without "
                f"padding, packing or prompts{self._advice()}; or a method that needs no grid, such as adaptformer"
            )
        if num_patches in self._ambiguous and is_repeated:
            raise AttachError(
                f"a block is repeated in a backward pass, and {num_patches} patches were both wide and high. Train "
                "without gradient checkpointing, or with images of one shape"
            )
        return grid

    def _of_stage(self, num_patches: int) -> tuple[int, int] | None:
        """Return the grid after merging 2×2 patches, once or several times, between the stages of a model (Swin)."""
        if self.num_prefix_tokens or self._reads_images:
            return None
        stages = {
            (rows >> k, columns >> k)
            for rows, columns in self._grids.values()
            for k in range(1, 6)
            if rows * columns == num_patches << 2 * k and not (rows % 2**k or columns % 2**k)
        }
        return stages.pop() if len(stages) == 1 else None

    def leave(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """Note the grid; hook of the convolution that makes the patches."""
        self._add((output.shape[-2], output.shape[-1]))

    def watch(self, model: nn.Module) -> list[Any]:
        """Note the grid from the images that the model is called with; return handles of the hooks."""
        self._reads_images = True
        return [
            model.register_forward_pre_hook(self._enter_model, with_kwargs=True),
            model.register_forward_hook(self._leave_model, always_call=True),
        ]

    def _enter_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._of_image = self._image_grid(next(tensors_in((args, kwargs)), None))
        if self._of_image is not None:
            self._add(self._of_image)

    def _leave_model(self, module: nn.Module, args: Any, output: Any) -> None:
        self._of_image = None

    def _image_grid(self, x: Tensor | None) -> tuple[int, int] | None:
        """Return rows and columns of the patches of images (B, C, H, W); None if they are unknown."""
        spec, grid = self._seen
        if grid is None or x is None or x.ndim != 4 or not spec.is_image or x.shape[1] != spec.size[0]:
            return None
        _, height, width = spec.size
        rows, rest_of_height = divmod(x.shape[2] * grid[0], height)
        columns, rest_of_width = divmod(x.shape[3] * grid[1], width)
        return None if rest_of_height or rest_of_width else (rows, columns)

    def _advice(self) -> str:
        if not self._reads_images or self._of_image is not None:
            return ""
        return ", and call the model itself, with images (B, C, H, W)"

    def _add(self, grid: tuple[int, int]) -> None:
        num_patches = grid[0] * grid[1]
        if self._grids.get(num_patches, grid) != grid:
            self._ambiguous.add(num_patches)
        self._grids[num_patches] = grid


def patch_convolution(model: nn.Module, sites: Sites) -> nn.Module | None:
    """Return the last convolution before the blocks that returns the grid of patches; None if there is none.

    Raises:
        AttachError: The model puts all images of a batch into one row of tokens, or the tokens of an image are not
            prefix tokens and its patches, row by row.
    """
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    first = sites.all_blocks[0].enter
    calls = record_calls(model, sites.input_spec, [*convolutions, first], num_images=2)
    x = calls[first].input
    if x is not None and (x.ndim == 2 or (x.ndim == 3 and len(x) == 1)):
        raise AttachError(
            f"{sites.model} puts all images of a batch into one row of tokens, which is no grid of patches. Use a "
            "method that needs no grid, such as adaptformer"
        )
    if are_out_of_order(model, sites):
        raise AttachError(
            f"the tokens of {sites.model} are not the prefix tokens and then the patches in the order of the image, "
            "row by row. Use a method that needs no grid, such as adaptformer"
        )
    makers = [
        m
        for m in convolutions
        if m in calls
        and calls[m].start < calls[first].start
        and (y := calls[m].output) is not None
        and tuple(y.shape[-2:]) == sites.grid_size
    ]
    return max(makers, key=lambda m: calls[m].start, default=None)

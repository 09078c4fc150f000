"""Read the tokens of a model's blocks as maps during its forward, and let a head make the model's output from them.

Legend: B batch, N tokens, D width, H and W rows and columns of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from petune.base.errors import ConfigError
from petune.sites.forward import tensors_in
from petune.sites.recorder import record_calls
from petune.sites.site import Block, Layout
from petune.sites.sites import Sites
from petune.training.token_geometry import check_geometry

Grid = tuple[int, int]


@dataclass(frozen=True)
class TokenSource:
    """A module that returns tokens which are patches of the image, after prefix tokens.

    Attributes:
        module: A block, or the final norm.
        layout: Layout of its tokens.
        grid: Their rows and columns.
        num_prefix_tokens: Tokens before them.
        dim: Their width.
    """

    module: nn.Module
    layout: Layout
    grid: Grid
    num_prefix_tokens: int
    dim: int

    def map_of(self, tokens: Tensor) -> Tensor:
        """Return tokens as a map, (B, D, H, W)."""
        if self.layout == "BCHW":
            return tokens
        if self.layout == "BHWC":
            return tokens.permute(0, 3, 1, 2)
        patches_BND = tokens[:, self.num_prefix_tokens :]
        if patches_BND.shape[1] != math.prod(self.grid):
            raise ConfigError(
                f"the images make {patches_BND.shape[1]} patches, and the head for pixels was made for a grid of "
                f"{self.grid[0]}×{self.grid[1]}. Use images of the size that it was made for"
            )
        return patches_BND.transpose(1, 2).reshape(tokens.shape[0], self.dim, *self.grid)


class TokenMaps:
    """Hooks that collect the maps of some sources in each forward, and return what the head makes of them.

    The hooks on the sources are put in place by each forward, after those of adapters, whenever these were attached.
    Bound methods follow a deep copy of the model.

    Attributes:
        model: The model.
        sources: Where its tokens are read.
        head: The name of the model's child that is called with the maps, resized to the finest and concatenated.
    """

    def __init__(self, model: nn.Module, sources: Sequence[TokenSource], head: str) -> None:
        self.model = model
        self.sources = tuple(sources)
        self.head = head
        self._maps: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def hook(self) -> None:
        """Put the hooks on the model, and let it name the head as its classifier, as models of timm do."""
        self.model.register_forward_pre_hook(self.enter)
        self.model.register_forward_hook(self.leave, always_call=True)
        self.model.get_classifier = self.get_classifier  # type: ignore[assignment]

    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.model.get_submodule(self.head)

    def enter(self, model: nn.Module, args: Any) -> None:
        """Watch the sources; pre-hook of the model."""
        self._clear()
        for number, source in enumerate(self.sources):
            self._handles.append(source.module.register_forward_hook(partial(self._keep, number)))

    def leave(self, model: nn.Module, args: Any, output: Any) -> Tensor | None:
        """Return the head's output; hook of the model, also called after an exception, with no output."""
        maps = [self._maps[number] for number in range(len(self.sources)) if number in self._maps]
        self._clear()
        if output is None or len(maps) < len(self.sources):
            return None
        finest = max(((x.shape[2], x.shape[3]) for x in maps), key=math.prod)
        logits: Tensor = self.get_classifier()(torch.cat([_resized(x, finest) for x in maps], 1))
        return logits

    def _keep(self, number: int, module: nn.Module, args: Any, output: Any) -> None:
        self._maps[number] = self.sources[number].map_of(next(tensors_in(output)))

    def _clear(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._maps = [], {}


def token_sources(model: nn.Module, sites: Sites, blocks: Sequence[Block]) -> list[TokenSource]:
    """Return where the tokens of blocks are read: what they return, and of the last one the final norm's output.

    Args:
        model: With nothing attached.
        sites: Its sites.
        blocks: Some of `sites.blocks`.

    Raises:
        ConfigError: The tokens are no grid of patches.
    """
    norm = sites.parts.get("norm")
    sources = []
    for block in blocks:
        exits = [block] if norm is None or block is not sites.blocks[-1] else [norm, block]
        calls = record_calls(model, sites.input_spec, [site.exit for site in exits if site.is_module])
        candidates = [(site, calls[site.exit].output) for site in exits if site.exit in calls]
        found = (_source(sites, site.exit, site.layout, y) for site, y in candidates if y is not None)
        source = next((source for source in found if source is not None), None)
        if source is None:
            shapes = ", ".join(str(tuple(y.shape)) for _, y in candidates if y is not None)
            raise ConfigError(
                f"segmentation needs a grid of patches, and block {block.index} ({block.where}) of {sites.model} "
                f"returns none{f': {shapes}' if shapes else ', because it is no module of its own'}. "
                "Use other blocks, or another backbone"
            )
        sources.append(source)
    check_geometry(model, sites)
    return sources


def _source(sites: Sites, module: nn.Module, layout: Layout, tokens: Tensor) -> TokenSource | None:
    """Return the source of tokens, None if they are no grid."""
    if tokens.ndim == 4:
        layout = "BHWC" if layout == "BNC" else layout
        height, width = tokens.shape[2:] if layout == "BCHW" else tokens.shape[1:3]
        dim = tokens.shape[1 if layout == "BCHW" else 3]
        fits = _scaled_grid(sites, height * width) == (height, width)
        return TokenSource(module, layout, (height, width), 0, dim) if fits else None
    if tokens.ndim != 3 or layout == "BCHW":
        return None
    for num_prefix in dict.fromkeys((sites.num_prefix_tokens, 0)):
        grid = _scaled_grid(sites, tokens.shape[1] - num_prefix)
        if grid is not None:
            return TokenSource(module, "BNC", grid, num_prefix, tokens.shape[2])
    return None


def _scaled_grid(sites: Sites, num_patches: int) -> Grid | None:
    """Return the grid of `num_patches` patches with the ratio of sides of the first block's grid; None if none fits."""
    rows, columns = sites.image_grid or (0, 0)
    if num_patches <= 0 or num_patches > rows * columns:
        return None
    height = round(math.sqrt(num_patches * rows / columns))
    width, rest = divmod(num_patches, height)
    return None if rest or round(height * columns / rows) != width else (height, width)


def _resized(x_BDHW: Tensor, size: Grid) -> Tensor:
    if tuple(x_BDHW.shape[2:]) == size:
        return x_BDHW
    return F.interpolate(x_BDHW, size, mode="bilinear", align_corners=False)

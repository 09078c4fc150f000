"""Check by their values that the patches enter the first block in the order of the image, row by row.

Legend: B batch, N tokens, D width, C channels, H and W rows and columns of patches, or of pixels of an image.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from petune.sites.forward import device_of, dtype_of, inference, tensors_in
from petune.sites.hooked import removed_after
from petune.sites.sites import Sites


def are_out_of_order(model: nn.Module, sites: Sites) -> bool:
    """Return whether what enters the first block is seen to be other tokens than the prefix and the grid of `sites`.

    Such as patches column by column, a class token behind them, or another number of rows. False if nothing is seen:
    the model takes other things than images, has no values yet, or does not run on noise.
    """
    spec = sites.input_spec
    if sites.image_grid is None or len(spec.tensors) != 1 or len(spec.size) != 3 or device_of(model).type == "meta":
        return False
    generator = torch.Generator().manual_seed(0)
    image_CHW = torch.randn(spec.size, generator=generator)
    x_BCHW = torch.stack([image_CHW, *other_patches(sites, image_CHW, generator)])
    tokens: Tensor | None = None
    with contextlib.suppress(Exception):  # whatever the model's own code raises on noise
        tokens = first_tokens(model, sites, x_BCHW)
    change_BN = None if tokens is None else changes(sites, tokens)
    return change_BN is not None and len(change_BN) == len(_places(sites)) and not follow_image(sites, change_BN)


def other_patches(sites: Sites, image_CHW: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Return the image with other pixels in one patch, for each of four patches."""
    rows, columns = sites.image_grid or (1, 1)
    height, width = image_CHW.shape[1:]
    images = []
    for row, column in _places(sites):
        top, bottom = (i * height // rows for i in (row, row + 1))
        left, right = (i * width // columns for i in (column, column + 1))
        images.append(image_CHW.clone())
        images[-1][:, top:bottom, left:right] = torch.randn(
            len(image_CHW), bottom - top, right - left, generator=generator
        )
    return images


def _places(sites: Sites) -> list[tuple[int, int]]:
    rows, columns = sites.image_grid or (1, 1)
    return [(0, 0), (0, columns - 1), (rows - 1, 0), (rows // 2, columns // 3)]


def changes(sites: Sites, tokens: Tensor) -> Tensor | None:
    """Return how much each token differs from that of the first image, (B - 1, N); None if they are no such grid."""
    rows, columns = sites.image_grid or (1, 1)
    change = (tokens[1:] - tokens[:1]).float().square()
    if tokens.ndim == 4:
        change_BHW = change.sum(1 if tuple(tokens.shape[2:]) == (rows, columns) else 3)
        return change_BHW.flatten(1) if tuple(change_BHW.shape[1:]) == (rows, columns) else None
    is_grid = tokens.ndim == 3 and tokens.shape[1] == sites.num_prefix_tokens + rows * columns
    return change.sum(2) if is_grid else None


def follow_image(sites: Sites, change_BN: Tensor) -> bool:
    """Return whether what changes most with a patch is its token or a neighbor, as convolutions before may have it.

    Args:
        sites: The sites.
        change_BN: From `changes`, of `other_patches`.
    """
    rows, columns = sites.image_grid or (1, 1)
    num_prefix_tokens = change_BN.shape[1] - rows * columns
    if not float(change_BN.sum()):
        return True
    changed = [token - num_prefix_tokens for token in change_BN.argmax(1).tolist()]
    return all(
        token >= 0 and max(abs(token // columns - row), abs(token % columns - column)) <= 1
        for token, (row, column) in zip(changed, _places(sites), strict=True)
    )


class _Entered(Exception):
    """Ends a forward where the tokens are known."""


def first_tokens(model: nn.Module, sites: Sites, x_BCHW: Tensor) -> Tensor:
    """Return what enters the first block in a forward of these images."""
    entered: list[Tensor] = []

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        entered.append(next(tensors_in((args, kwargs))))
        raise _Entered

    handle = sites.all_blocks[0].enter.register_forward_pre_hook(keep, with_kwargs=True)
    images = sites.input_spec.noise(len(x_BCHW)).map(lambda x: x_BCHW.to(x.dtype))
    with removed_after([handle]), inference(model), contextlib.suppress(_Entered):
        images.to(device_of(model), dtype_of(model)).call(model)
    return entered[0]

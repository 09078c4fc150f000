"""Check that the patches of a model are where a head for pixels takes them to be: equal parts of the image, in order.

Legend: B batch, N tokens, D width, C channels, H and W rows and columns of patches, or of pixels of an image.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from petune.base.errors import ConfigError
from petune.sites.forward import dtype_of, inference, tensors_in
from petune.sites.site import Block, Sites


def check_geometry(model: nn.Module, sites: Sites) -> None:
    """Change a few pixels of an image of noise, and look which tokens change that enter the first block.

    Raises:
        ConfigError: What changes most with a patch of the image is not its token, nor a neighbor, as in Hiera; or the
            patches do not divide the image into equal parts, because its side is no multiple of theirs.
    """
    weight = next(model.parameters())
    if sites.image_grid is None or weight.device.type == "meta":
        return
    channels, height, width = sites.input_size
    generator = torch.Generator().manual_seed(0)
    image_CHW = torch.randn(channels, height, width, generator=generator)
    changed = [*_patches(sites, image_CHW, generator), *_lines(sites, image_CHW, generator)]
    x_BCHW = torch.stack([image_CHW, *changed]).to(weight.device, dtype_of(model))
    change_BHW = _changes(sites, _entered(model, sites.blocks[0], x_BCHW))
    if change_BHW is None or len(change_BHW) != len(changed) or not float(change_BHW.sum()):
        return
    _check_order(sites, change_BHW[:NUM_PATCHES])
    _check_alignment(sites, change_BHW[NUM_PATCHES:])


NUM_PATCHES = 3


def _places(sites: Sites) -> list[tuple[int, int]]:
    rows, columns = sites.image_grid or (1, 1)
    return [(0, columns - 1), (rows - 1, 0), (rows // 2, columns // 3)]


def _patches(sites: Sites, image_CHW: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Return the image with other pixels in one patch, for each of three patches."""
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


def _lines(sites: Sites, image_CHW: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Return the image with one other line: of both axes the first and last of the last patch, and the one before."""
    images = []
    for axis, count in enumerate(sites.image_grid or (1, 1), 1):
        side = image_CHW.shape[axis]
        first = (count - 1) * side // count
        for line in (first, side - 1, max(first - 1, 0)):
            images.append(image_CHW.clone())
            images[-1].select(axis, line).copy_(
                torch.randn(image_CHW.select(axis, line).shape, generator=generator) * 10
            )
    return images


def _changes(sites: Sites, tokens: Tensor) -> Tensor | None:
    """Return how much each token differs from that of the first image, (B - 1, H, W); None if they are no grid."""
    rows, columns = sites.image_grid or (1, 1)
    change = (tokens[1:] - tokens[:1]).float().square()
    if tokens.ndim == 4:
        change_BHW = change.sum(1 if tuple(tokens.shape[2:]) == (rows, columns) else 3)
        return change_BHW if tuple(change_BHW.shape[1:]) == (rows, columns) else None
    if tokens.ndim != 3:
        return None
    patches_BN = change.sum(2)[:, sites.num_prefix_tokens :]
    return patches_BN.reshape(-1, rows, columns) if patches_BN.shape[1] == rows * columns else None


def _check_order(sites: Sites, change_BHW: Tensor) -> None:
    columns = change_BHW.shape[2]
    changed = [divmod(token, columns) for token in change_BHW.flatten(1).argmax(1).tolist()]
    # convolutions before the blocks may move a change to the next patch
    near = [
        max(abs(y - row), abs(x - column)) <= 1 for (y, x), (row, column) in zip(changed, _places(sites), strict=True)
    ]
    if not all(near):
        raise ConfigError(
            f"segmentation needs patches in the order of the image, and the tokens of {sites.model} are in another "
            "one. Use another backbone"
        )


def _check_alignment(sites: Sites, change_BHW: Tensor) -> None:
    """Check that the first and the last line of the last patch change its token, and the line before the one before."""
    rows, columns = sites.image_grid or (1, 1)
    by_row, by_column = change_BHW[:3].sum(2), change_BHW[3:].sum(1)
    for change_LN, count, side in ((by_row, rows, sites.input_size[1]), (by_column, columns, sites.input_size[2])):
        expected = (count - 1, count - 1, max(count - 2, 0))
        if side % count or not all(float(change_LN[line, token]) > 0 for line, token in enumerate(expected)):
            raise ConfigError(
                f"the {count} patches along a side of {side} pixels are no equal parts of it in {sites.model}, so "
                "masks would be shifted. Use an image size that is a multiple of the patch size",
                cli_hint="Set it with --image-size, or the patch with --patch-size",
            )


class _Entered(Exception):
    """Ends a forward where the tokens are known."""


def _entered(model: nn.Module, block: Block, x_BCHW: Tensor) -> Tensor:
    """Return what enters a block."""
    entered: list[Tensor] = []

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        entered.append(next(tensors_in((args, kwargs))))
        raise _Entered

    handle = block.enter.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with inference(model):
            model(x_BCHW)
    except _Entered:
        pass
    finally:
        handle.remove()
    return entered[0]

"""Check that the patches of a model are where a head for pixels takes them to be: equal parts of the image, in order.

Legend: B batch, N tokens, D width, C channels, H and W rows and columns of patches, or of pixels of an image.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from petune.base.errors import ConfigError
from petune.sites.patch_order import changes, first_tokens, follow_image, other_patches
from petune.sites.sites import Sites


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
    patches = other_patches(sites, image_CHW, generator)
    changed = [*patches, *_lines(sites, image_CHW, generator)]
    change_BN = changes(sites, first_tokens(model, sites, torch.stack([image_CHW, *changed])))
    if change_BN is None or len(change_BN) != len(changed) or not float(change_BN.sum()):
        return
    if not follow_image(sites, change_BN[: len(patches)]):
        raise ConfigError(
            f"segmentation needs patches in the order of the image, and the tokens of {sites.model} are in another "
            "one. Use another backbone"
        )
    change_BN = change_BN[len(patches) :, -math.prod(sites.image_grid) :]
    _check_alignment(sites, change_BN.reshape(-1, *sites.image_grid))


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

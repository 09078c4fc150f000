"""Turn stored images and masks into the input of a backbone.

Legend: B batch, C channels, H height, W width, S side of the input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from petune.data.dataset import Split

GRAY_WEIGHTS = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in gray (ITU-R BT.601)."""
WHITE_16_BIT = 257.0
"""65535 / 255: a 16-bit value divided by it is in 0..255."""


@dataclass(frozen=True)
class Preprocess:
    """Size and statistics of the images that the backbone expects.

    Attributes:
        image_size: Side of the square image, in pixels.
        mean, std: Mean and standard deviation per channel, for pixels in [0, 1]. A single channel is gray.
    """

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def pixels(self, split: Split, positions: NDArray[np.int64], device: torch.device) -> Tensor:
        """Return images in 0..255 at `image_size`, float32 (B, C, S, S), without the margin they were stored with."""
        return self.fit(split, read_images(split, positions, device)).float()

    def fit(self, split: Split, x_BCHW: Tensor) -> Tensor:
        """Resize images of a split in 0..255 to `image_size`: float32, but as they come if they have that size."""
        if x_BCHW.shape[-1] == self.image_size:
            return x_BCHW
        size = (self.image_size, self.image_size)
        x_BCHW = F.interpolate(x_BCHW.float(), size, mode="bicubic", antialias=True)
        return x_BCHW.clamp(0, 255) if np.issubdtype(split.images.dtype, np.integer) else x_BCHW

    def masks(self, split: Split, positions: NDArray[np.int64], device: torch.device) -> Tensor:
        """Return masks at `image_size`, uint8 (B, S, S), without the margin: each pixel has the class nearest to it."""
        masks_BHW = to_device(torch.from_numpy(np.ascontiguousarray(split.targets_at(positions))), device)
        return resize_masks(center_crop(masks_BHW, split.crop), self.image_size, self.image_size)

    def blank(self, device: torch.device) -> Tensor:
        """Return one black image, float32 (1, C, S, S)."""
        return torch.zeros(1, len(self.mean), self.image_size, self.image_size, device=device)

    def normalize(self, x_BCHW: Tensor, out: Tensor | None = None) -> Tensor:
        """Normalize images in 0..255 by mean and standard deviation, RGB as gray if there is a single mean."""
        if len(self.mean) == 1 and x_BCHW.shape[1] == 3:
            x_BCHW = to_gray(x_BCHW)
        statistics = to_device(torch.tensor([self.mean, self.std]), x_BCHW.device).view(2, -1, 1, 1) * 255
        if out is None:
            return torch.sub(x_BCHW, statistics[0]).div_(statistics[1])
        return out.copy_(x_BCHW).sub_(statistics[0]).div_(statistics[1])  # a subtraction from uint8 is slower


def read_images(split: Split, positions: NDArray[np.int64], device: torch.device) -> Tensor:
    """Return images in 0..255 without their margin, (B, C, H, W); uint8 as it is stored, else float32."""
    raw_BHWC = torch.from_numpy(np.ascontiguousarray(split.images[split.rows[positions]]))
    return center_crop(in_255(to_device(raw_BHWC, device).permute(0, 3, 1, 2)), split.crop)


def in_255(x: Tensor) -> Tensor:
    """Return pixels so that white is 255: it is 65535 in 16-bit images, and 1 in images stored as floats.

    16-bit integers become floats before anything resizes them, because they would wrap around.
    """
    if x.dtype == torch.uint8:
        return x
    return x.float() * 255 if x.is_floating_point() else x.float() / WHITE_16_BIT


def to_gray(x_BCHW: Tensor) -> Tensor:
    """Return the luma of RGB images, (B, 1, H, W), by the weights that Pillow uses too."""
    weights_C = torch.tensor(GRAY_WEIGHTS, device=x_BCHW.device).view(1, 3, 1, 1)
    return (x_BCHW * weights_C).sum(1, keepdim=True)


def center_crop(x: Tensor, share: float) -> Tensor:
    """Keep the center of square images or masks (…, H, W), `share` of the side."""
    stored = x.shape[-1]
    side = math.floor(stored * share)
    start = (stored - side) // 2
    return x[..., start : start + side, start : start + side]


def resize_bicubic(image_CHW: Tensor, size: Sequence[int]) -> Tensor:
    """Resize an image, bicubic with antialiasing; uint8 stays uint8.

    torch's kernel for uint8 wants the channels of a pixel next to each other. It would copy any other image, and the
    result once more.
    """
    if image_CHW.shape[-2:] == (*size,):
        return image_CHW
    x = image_CHW[None].contiguous(memory_format=torch.channels_last)
    return F.interpolate(x, [*size], mode="bicubic", antialias=True)[0]


def resize_masks(masks: Tensor, height: int, width: int) -> Tensor:
    """Resize masks (…, H, W); each pixel gets the class nearest to its center, as in torch's `nearest-exact`."""
    if masks.shape[-2:] == (height, width):
        return masks
    rows, columns = (
        ((torch.arange(side, device=masks.device) + 0.5) * (stored / side)).long()
        for stored, side in zip(masks.shape[-2:], (height, width), strict=True)
    )
    return masks[..., rows[:, None], columns]


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Return `x` on the device; copies to a GPU use pinned memory and do not block."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)

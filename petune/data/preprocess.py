"""Turn stored images and masks into the input of a backbone.

Legend: B batch, C channels, H height, W width, S side of the input. Clips have one dimension more, T frames, after B.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from petune.data.dataset import RandomClips, Split

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
        frames: Frames of a clip; None if the model's input is images.
    """

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    frames: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a sample: (C, S, S), or (T, C, S, S) of a clip."""
        image = (len(self.mean), self.image_size, self.image_size)
        return image if self.frames is None else (self.frames, *image)

    def pixels(self, split: Split, positions: NDArray[np.int64], device: torch.device) -> Tensor:
        """Return images in 0..255 at `image_size`, float32 (B, C, S, S), without the margin they were stored with."""
        return self.fit(split, read_images(split, positions, device)).float()

    def fit(self, split: Split, x_BCHW: Tensor) -> Tensor:
        """Resize images of a split in 0..255 to `image_size`: float32, but as they come if they have that size."""
        if x_BCHW.shape[-1] == self.image_size:
            return x_BCHW
        size = (self.image_size, self.image_size)
        x_NCHW = x_BCHW.float().reshape(-1, *x_BCHW.shape[-3:])  # the frames of clips one by one
        resized = F.interpolate(x_NCHW, size, mode="bicubic", antialias=True)
        x_BCHW = resized.view(*x_BCHW.shape[:-2], *size)
        return x_BCHW.clamp(0, 255) if np.issubdtype(split.images.dtype, np.integer) else x_BCHW

    def masks(self, split: Split, positions: NDArray[np.int64], device: torch.device) -> Tensor:
        """Return masks at `image_size`, uint8 (B, S, S), without the margin: each pixel has the class nearest to it."""
        masks_BHW = to_device(torch.from_numpy(np.ascontiguousarray(split.targets_at(positions))), device)
        return resize_masks(center_crop(masks_BHW, split.crop), self.image_size, self.image_size)

    def blank(self, device: torch.device) -> Tensor:
        """Return one black image, float32 (1, C, S, S), or one black clip."""
        return torch.zeros(1, *self.shape, device=device)

    def normalize(self, x_BCHW: Tensor) -> Tensor:
        """Normalize images in 0..255 by mean and standard deviation, RGB as gray if there is a single mean."""
        x_BCHW = self.in_channels(x_BCHW)
        mean, std = self._statistics(x_BCHW.device)
        return torch.sub(x_BCHW, mean).div_(std)

    def normalize_(self, x_BCHW: Tensor) -> Tensor:
        """Normalize floats in 0..255 in place; they have the channels of the model."""
        mean, std = self._statistics(x_BCHW.device)
        return x_BCHW.sub_(mean).div_(std)

    def in_channels(self, x_BCHW: Tensor) -> Tensor:
        """Return RGB as gray if there is a single mean, and other images as they are."""
        return to_gray(x_BCHW) if len(self.mean) == 1 and x_BCHW.shape[-3] == 3 else x_BCHW

    def _statistics(self, device: torch.device) -> Tensor:
        """Return mean and standard deviation for pixels in 0..255, (2, C, 1, 1)."""
        return to_device(torch.tensor([self.mean, self.std]), device).view(2, -1, 1, 1) * 255


def read_images(
    split: Split, positions: NDArray[np.int64], device: torch.device, frame_seeds: NDArray[np.int64] | None = None
) -> Tensor:
    """Return images in 0..255 without their margin, (B, C, H, W) or (B, T, C, H, W); uint8 as stored, else float32.

    Args:
        split: The images.
        positions: Which of them.
        device: Where they go.
        frame_seeds: Of each clip, for random frames; None, or an array of clips, gives the frames of tests.
    """
    rows, images = split.rows[positions], split.images
    if frame_seeds is not None and isinstance(images, RandomClips):
        return in_model_order(images.draw(rows, frame_seeds), split.crop, device)
    return in_model_order(images[rows], split.crop, device)


def read_image(split: Split, position: int, frame_seed: int | None = None) -> Tensor:
    """Return one image or clip as `read_images` does, (C, H, W) or (T, C, H, W), on the CPU.

    Of an array, only what the model sees is copied, by one call: several threads do this at the same time.
    """
    row = int(split.rows[position])
    if not isinstance(split.images, np.ndarray):
        seeds = None if frame_seed is None else np.array([frame_seed])
        return read_images(split, np.array([position]), torch.device("cpu"), seeds)[0]
    rows, columns = (center_slice(side, split.crop) for side in split.images.shape[-3:-1])
    pixels = np.array(np.asarray(split.images)[row, ..., rows, columns, :])  # views of a memory map take longer
    return in_255(torch.from_numpy(pixels).movedim(-1, -3))


def seen_size(split: Split) -> tuple[int, int]:
    """Return height and width of the images without their margin."""
    rows, columns = (center_slice(side, split.crop) for side in split.images.shape[-3:-1])
    return rows.stop - rows.start, columns.stop - columns.start


def in_model_order(pixels: NDArray[Any], crop: float, device: torch.device) -> Tensor:
    """Return stored images (…, H, W, C) as (…, C, H, W) in 0..255 on the device, without their margin."""
    raw = torch.from_numpy(np.ascontiguousarray(pixels))
    return center_crop(in_255(to_device(raw, device).movedim(-1, -3)), crop)


def in_255(x: Tensor) -> Tensor:
    """Return pixels so that white is 255: it is 65535 in 16-bit images, and 1 in images stored as floats.

    16-bit integers become floats before anything resizes them, because they would wrap around.
    """
    if x.dtype == torch.uint8:
        return x
    return x.float() * 255 if x.is_floating_point() else x.float() / WHITE_16_BIT


def to_gray(x_BCHW: Tensor) -> Tensor:
    """Return the luma of RGB images, (B, 1, H, W), by the weights that Pillow uses too."""
    weights_C = torch.tensor(GRAY_WEIGHTS, device=x_BCHW.device).view(3, 1, 1)
    return (x_BCHW * weights_C).sum(-3, keepdim=True)


def center_crop(x: Tensor, share: float) -> Tensor:
    """Keep the center of square images or masks (…, H, W), `share` of the side."""
    center = center_slice(x.shape[-1], share)
    return x[..., center, center]


def center_slice(stored: int, share: float) -> slice:
    """Return the center of a side of `stored` pixels, `share` of it."""
    side = math.floor(stored * share)
    start = (stored - side) // 2
    return slice(start, start + side)


def resize_bicubic(image_CHW: Tensor, size: Sequence[int]) -> Tensor:
    """Resize an image, or the frames of a clip (T, C, H, W), bicubic with antialiasing; uint8 stays uint8.

    torch's kernel for uint8 wants the channels of a pixel next to each other. It would copy any other image, and the
    result once more.
    """
    if image_CHW.shape[-2:] == (*size,):
        return image_CHW
    x = (image_CHW if image_CHW.ndim == 4 else image_CHW[None]).contiguous(memory_format=torch.channels_last)
    resized = F.interpolate(x, [*size], mode="bicubic", antialias=True)
    return resized if image_CHW.ndim == 4 else resized[0]


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

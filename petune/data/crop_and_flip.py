"""Crops and flips, the augmentations of every preset, without what torchvision's transforms cost per image in Python.

They draw the same numbers and give the same pixels as torchvision's. They take their generator as an argument, so
that no function of torch needs to be intercepted, and a mask as a plain tensor. What they draw is separate from what
they do, because several threads get in each other's way where one of them calls many short functions of torch.

Legend: C channels, H height, W width. Frames of a clip (T, C, H, W) are cropped and mirrored alike.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from petune.data.preprocess import resize_bicubic, resize_masks

Box = tuple[int, int, int, int]
"""Top, left, height and width of a crop, in pixels."""
ATTEMPTS = 10
"""Torchvision's number of tries to find a crop inside the image."""


class ResizedCrop(v2.RandomResizedCrop):  # type: ignore[misc]
    """Crop and resize. A mask gets the class nearest to each pixel, where torchvision's is off by half a pixel."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.log_ratio = torch.log(torch.tensor(self.ratio)).tolist()

    def draw(self, height: int, width: int, generator: torch.Generator) -> Box:
        """Draw the crop of an image of this size, as torchvision does: float32 numbers, in the same order."""
        for _ in range(ATTEMPTS):
            area = height * width * torch.empty(1).uniform_(*self.scale, generator=generator).item()
            ratio = torch.empty(1).uniform_(*self.log_ratio, generator=generator).exp_().item()
            crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                top = torch.randint(0, height - crop_height + 1, (1,), generator=generator).item()
                left = torch.randint(0, width - crop_width + 1, (1,), generator=generator).item()
                return int(top), int(left), crop_height, crop_width
        crop_height, crop_width = self._fallback(height, width)
        return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width

    def apply(self, image_CHW: Tensor, mask_HW: Tensor | None, box: Box) -> tuple[Tensor, Tensor | None]:
        """Crop an image and its mask."""
        top, left, height, width = box
        image = self._resize(image_CHW[..., top : top + height, left : left + width])
        if mask_HW is not None:
            mask_HW = resize_masks(mask_HW[top : top + height, left : left + width], *self.size)
        return image, mask_HW

    def _fallback(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of the largest central crop whose ratio is allowed."""
        if width / height < min(self.ratio):
            return round(width / min(self.ratio)), width
        if width / height > max(self.ratio):
            return height, round(height * max(self.ratio))
        return height, width

    def _resize(self, image_CHW: Tensor) -> Tensor:
        if self.interpolation == v2.InterpolationMode.BICUBIC:
            return resize_bicubic(image_CHW, self.size)
        resized: Tensor = v2.functional.resize(
            image_CHW, list(self.size), interpolation=self.interpolation, antialias=True
        )
        return resized


class _Flip:
    """Mirror an image with a probability.

    Attributes:
        p: The probability.
        axis: Of the image.
    """

    p: float
    axis: int

    def draw(self, height: int, width: int, generator: torch.Generator) -> bool:
        """Draw if an image is mirrored."""
        return torch.rand(1, generator=generator).item() < self.p

    def apply(self, image_CHW: Tensor, mask_HW: Tensor | None, mirrored: bool) -> tuple[Tensor, Tensor | None]:
        """Mirror an image and its mask, or return both as they are."""
        if not mirrored:
            return image_CHW, mask_HW
        return image_CHW.flip(self.axis), None if mask_HW is None else mask_HW.flip(self.axis)


class HorizontalFlip(_Flip, v2.RandomHorizontalFlip):  # type: ignore[misc]
    """Mirror left to right."""

    axis = -1


class VerticalFlip(_Flip, v2.RandomVerticalFlip):  # type: ignore[misc]
    """Mirror upside down."""

    axis = -2

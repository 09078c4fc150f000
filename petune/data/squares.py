"""Cut the center square of an image or a mask at another size, as timm's transform for evaluation does.

The shorter side is resized to S and the longer one by the same factor, rounded down; then whole pixels are cropped on
both sides. RGB images are resized by torch's kernel for 8 bits, in a third of Pillow's time. Its integers are coarser:
0.6 % of the values differ from Pillow's, by one or two levels. They are the same on every processor.

Legend: H height, W width, C channels, S side of the square.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

PIXEL_FORMAT = 2
"""Raised when the same file is decoded to other pixels; no cache and no run then has both."""
CENTER = 0.5
MAX_ASPECT = 8
"""The longer side is cropped to this multiple of the shorter one first, or thin images would become very large."""
STRIP = 1 << 18
"""Pixels that are copied from Pillow at once. It copies them twice; such a strip stays in the processor's cache."""


@dataclass(frozen=True)
class Span:
    """The part of one side of an image that the center square is made of.

    Attributes:
        start, length: Pixels of the image that are resized.
        resized: Their number afterwards.
        margin: How many of these are cropped at the start.
        side: S.
    """

    start: int
    length: int
    resized: int
    margin: int
    side: int

    @classmethod
    def of(cls, length: int, shorter: int, side: int, share: float) -> Span:
        """Return the span of a side of `length` pixels in an image whose shorter side has `shorter`."""
        kept = min(length, MAX_ASPECT * shorter)
        resized = side * kept // shorter
        return cls(int((length - kept) * share), kept, resized, round((resized - side) * share), side)

    @property
    def bounds(self) -> tuple[float, float]:
        """Start and end of the square, in pixels after `start`."""
        scale = self.length / self.resized
        return self.margin * scale, (self.margin + self.side) * scale

    @property
    def nearest(self) -> NDArray[np.int64]:
        """The pixel of the image under the center of each pixel of the square, int64 (S,)."""
        centers = 2 * (np.arange(self.side) + self.margin) + 1
        return self.start + centers * self.length // (2 * self.resized)


def spans(height: int, width: int, side: int, share: float = CENTER) -> tuple[Span, Span]:
    """Return rows and columns of the square of an image; see `center_pixels`."""
    shorter = min(height, width)
    return Span.of(height, shorter, side, share), Span.of(width, shorter, side, share)


def center_pixels(image_HWC: NDArray[np.uint8], side: int, share: float = CENTER) -> NDArray[np.uint8]:
    """Return the center square of an image of 8 bits at `side` pixels, (S, S, C), bicubic with antialiasing.

    Args:
        image_HWC: Writable, because torch warns of others.
        side: S.
        share: Where the square is cut, from left (or top) at 0 to right (or bottom) at 1.
    """
    import torch
    from torch.nn import functional as F

    rows, columns = spans(image_HWC.shape[0], image_HWC.shape[1], side, share)
    kept = image_HWC[rows.start : rows.start + rows.length, columns.start : columns.start + columns.length]
    # The kernel wants the channels of a pixel together, in every stride: it would copy other images, and its result.
    x_1CHW = torch.from_numpy(kept[None]).permute(0, 3, 1, 2)
    resized = F.interpolate(x_1CHW, (rows.resized, columns.resized), mode="bicubic", antialias=True)
    resized_HWC = resized[0].permute(1, 2, 0).numpy()
    square: NDArray[np.uint8] = resized_HWC[rows.margin : rows.margin + side, columns.margin : columns.margin + side]
    return square


def center_plane(plane: Image, side: int) -> NDArray[Any]:
    """Return the center square of an image of one channel at `side` pixels, (S, S), by Pillow."""
    from PIL import Image

    rows, columns = spans(plane.height, plane.width, side)
    kept = plane.crop((columns.start, rows.start, columns.start + columns.length, rows.start + rows.length))
    box = (columns.bounds[0], rows.bounds[0], columns.bounds[1], rows.bounds[1])
    return np.asarray(kept.resize((side, side), Image.Resampling.BICUBIC, box=box))


def center_mask(mask_HW: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Return the center square of a mask at `side` pixels, (S, S): each pixel has the class nearest to its center."""
    rows, columns = spans(mask_HW.shape[0], mask_HW.shape[1], side)
    return np.asarray(mask_HW[rows.nearest[:, None], columns.nearest], np.uint8)


def pixels_of(image: Image) -> NDArray[np.uint8]:
    """Return the pixels of an RGB image, (H, W, 3), writable."""
    rows = max(1, STRIP // image.width)
    if image.height <= rows:
        return np.array(image)
    out = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        out[top:bottom] = np.asarray(image.crop((0, top, image.width, bottom)))
    return out

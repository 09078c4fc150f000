"""Predict every pixel of an image of any size and shape, by squares as large as those the model was trained on.

Legend: B batch, C classes or channels, H and W height and width of the image, S side of the model's input.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from petune.base.errors import DataError
from petune.data.band_files import ARRAY_SUFFIXES, read_bands
from petune.data.bands import RGB, ImageForm, as_image, bands_square, channels_last
from petune.data.images import read_image, upright_rgb
from petune.data.squares import center_pixels
from petune.serving.image_transform import ImageTransform

if TYPE_CHECKING:
    from PIL.Image import Image

    from petune.serving.image_transform import LoadedImage

Square = tuple[int, int, int]
"""Top, left and side in pixels of the image."""


@dataclass(frozen=True)
class WholeImage:
    """An image, and the squares that cover it.

    Attributes:
        pixels: (H, W, C), as the model's dataset has them.
        transform: Of the model.
    """

    pixels: NDArray[Any]
    transform: ImageTransform

    @classmethod
    def read(cls, image: LoadedImage, transform: ImageTransform) -> WholeImage:
        """Read an image; EXIF orientation is applied.

        Raises:
            Exception: Pillow raises a dozen types, and each means that the image is broken.
        """
        if isinstance(image, DataError):
            raise image
        if transform.form == RGB:
            return cls(_rgb(image), transform)
        return cls(_bands(image, transform), transform)

    @property
    def size(self) -> tuple[int, int]:
        """H and W."""
        return self.pixels.shape[0], self.pixels.shape[1]

    def squares(self) -> list[Square]:
        """Return as few squares of the side that the model sees of an image's center as cover the image."""
        height, width = self.size
        side = max(1, round(min(height, width) * self._seen / self.transform.stored_size))
        return [(top, left, side) for top in _starts(height, side) for left in _starts(width, side)]

    def batches(self, batch_size: int) -> Iterator[tuple[list[Square], NDArray[Any]]]:
        """Yield squares, and their pixels as a model with this transform has them before its last resize."""
        squares = self.squares()
        for start in range(0, len(squares), batch_size):
            batch = squares[start : start + batch_size]
            yield batch, np.stack([self._resized(square) for square in batch])

    @property
    def _seen(self) -> int:
        """Side of what the model sees of a stored image; the rest is its margin."""
        return math.floor(self.transform.stored_size * self.transform.crop)

    def _resized(self, square: Square) -> NDArray[Any]:
        top, left, side = square
        part = self.pixels[top : top + side, left : left + side]
        if self.transform.form == RGB:
            return center_pixels(part, self._seen)
        return bands_square(part, self._seen, self.transform.form)


def whole_outputs(image: WholeImage, outputs_of: Callable[[NDArray[Any]], Tensor], batch_size: int) -> Tensor:
    """Return the outputs for a whole image, the mean where squares overlap.

    Args:
        image: The image.
        outputs_of: From the pixels of squares (B, side, side, C) to outputs (B, C, S, S).
        batch_size: Squares per forward.

    Returns:
        float32 (C, h, w) on the CPU, in the scale of the model's input; `classes_of` resizes them to the image.
    """
    sums = counts = torch.empty(0)
    for squares, pixels in image.batches(batch_size):
        outputs_BCSS = outputs_of(pixels).float().cpu()
        side = outputs_BCSS.shape[-1]
        scale = side / squares[0][2]
        if not sums.numel():
            height, width = (max(side, round(length * scale)) for length in image.size)
            sums, counts = torch.zeros(outputs_BCSS.shape[1], height, width), torch.zeros(height, width)
        for (top, left, _), outputs_CSS in zip(squares, outputs_BCSS, strict=True):
            row = min(round(top * scale), sums.shape[1] - side)
            column = min(round(left * scale), sums.shape[2] - side)
            sums[:, row : row + side, column : column + side] += outputs_CSS
            counts[row : row + side, column : column + side] += 1
    return sums / counts.clamp(min=1)


def classes_of(outputs_Chw: Tensor, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return the class of each pixel, uint8 (H, W), from outputs of another size.

    Outputs are resized one class after the other: those of a photo of 12 megapixels in 150 classes need 7 GB.
    """
    best_HW = torch.full(size, -torch.inf)
    classes_HW = torch.zeros(size, dtype=torch.uint8)
    for number, output_hw in enumerate(outputs_Chw):
        resized_HW = F.interpolate(output_hw[None, None], size, mode="bilinear", align_corners=False)[0, 0]
        is_best = resized_HW > best_HW
        classes_HW[is_best] = number
        best_HW = torch.where(is_best, resized_HW, best_HW)
    classes: NDArray[np.uint8] = classes_HW.numpy()
    return classes


def _starts(length: int, side: int) -> list[int]:
    """Return where squares begin along one side of the image, at equal distances."""
    count = math.ceil(length / side)
    return [round(i * (length - side) / max(1, count - 1)) for i in range(count)]


def _rgb(image: Path | bytes | Image | NDArray[Any]) -> NDArray[np.uint8]:
    from PIL import Image

    if isinstance(image, Path) and image.suffix.lower() in ARRAY_SUFFIXES:
        return np.array(upright_rgb(as_image(read_bands(image))))
    if isinstance(image, Path):
        return read_image(image, lambda opened: np.array(upright_rgb(opened)))
    if isinstance(image, bytes):
        with Image.open(io.BytesIO(image)) as opened:
            return np.array(upright_rgb(opened))
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise ValueError(f"the array is {image.dtype}; give uint8, 0 to 255")
        return np.array(upright_rgb(as_image(channels_last(image))))
    return np.array(upright_rgb(image))


def _bands(image: Path | bytes | Image | NDArray[Any], transform: ImageTransform) -> NDArray[Any]:
    if not isinstance(image, Path | np.ndarray):
        raise ValueError(f"the adapter takes {transform.form}; give an array (height, width, channels), or a file")
    bands = read_bands(image) if isinstance(image, Path) else channels_last(image)
    where, form = f"{image}: " if isinstance(image, Path) else "", ImageForm(bands.shape[-1], str(bands.dtype))
    if form != transform.form:
        raise ValueError(f"{where}{form}, not {transform.form}")
    if not np.isfinite(bands).all():
        raise ValueError(f"{where}a value is NaN or infinite. Replace it, for example by 0")
    return bands


def visible(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """Return pixels for people, uint8 (H, W, 3): other types than uint8 are stretched, other channels left out."""
    shown = pixels[..., :3] if pixels.shape[-1] >= 3 else np.repeat(pixels[..., :1], 3, -1)
    if shown.dtype == np.uint8:
        return np.ascontiguousarray(shown)
    low, high = shown.min(), shown.max()
    stretched: NDArray[np.uint8] = np.rint((shown - low) / max(high - low, 1e-12) * 255.0).astype(np.uint8)
    return stretched

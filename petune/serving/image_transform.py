"""Preprocess images for a trained model, exactly as its training images were.

Shapes: B batch, C classes, S side of a stored image in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from petune.base.errors import CheckpointError, DataError
from petune.data import Preprocess, Split
from petune.data.folder import CROP
from petune.data.images import center_square, decode_images

if TYPE_CHECKING:
    from PIL.Image import Image

    LoadedImage = Path | Image | NDArray[np.uint8] | DataError
    """A file, an open image, uint8 (height, width) or (height, width, 3), or the error of finding it."""

STORED_SIZES = {"cifar10": 32, "cifar100": 32, "digits": 8}  # for adapters saved before the size was recorded


@dataclass(frozen=True)
class ImageTransform:
    """Steps from an image to the model's input.

    Attributes:
        preprocess: Size and statistics of the model's input.
        stored_size: Side in pixels to which images are resized first. For CIFAR-10 it is 32, whatever the model's
            input, because the model was trained on enlarged small images.
        crop: Share of that side that the model sees.
    """

    preprocess: Preprocess
    stored_size: int
    crop: float

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> ImageTransform:
        """Read the steps from an adapter's metadata.

        Raises:
            CheckpointError: They are missing or damaged.
        """
        try:
            values = metadata["preprocess"]
            size = int(values["image_size"])
            preprocess = Preprocess(size, tuple(map(float, values["mean"])), tuple(map(float, values["std"])))
            if "stored_size" in values:
                return cls(preprocess, int(values["stored_size"]), float(values["crop"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the adapter does not say how its images were preprocessed: {error!r}") from None
        dataset = str(metadata.get("dataset"))
        if dataset in STORED_SIZES:
            return cls(preprocess, STORED_SIZES[dataset], 1.0)
        return cls(preprocess, math.ceil(size / CROP), CROP)

    def squares(self, images: Sequence[LoadedImage]) -> tuple[NDArray[np.uint8], dict[int, str]]:
        """Decode images and resize their center squares to `stored_size`.

        Returns:
            The squares, uint8 (B, S, S, 3), and the reason for each position that cannot be read (it is black).
        """
        out = np.zeros((len(images), self.stored_size, self.stored_size, 3), np.uint8)
        files = {i: image for i, image in enumerate(images) if isinstance(image, Path)}
        positions = list(files)
        decoded = np.empty((len(files), *out.shape[1:]), np.uint8)
        broken = decode_images(list(files.values()), decoded, skip=True)
        out[positions] = decoded
        errors = {positions[i]: reason for i, reason in broken.items()}
        for i, image in enumerate(images):
            if isinstance(image, Path):
                continue
            try:
                out[i] = center_square(_open(image), self.stored_size)
            except Exception as error:  # Pillow raises a dozen types, and each means that this image is broken
                errors[i] = " ".join(str(error).split()) or type(error).__name__
        return out, errors

    def batch(self, squares_BSS3: NDArray[np.uint8], device: torch.device) -> Tensor:
        """Turn squares, uint8 (B, S, S, 3), into the model's input, float32 (B, 3, H, W)."""
        split = Split.of(squares_BSS3, np.zeros(len(squares_BSS3), np.int64), self.crop)
        return self.preprocess.normalize(self.preprocess.pixels(split, np.arange(len(split)), device))


def _open(image: Image | NDArray[np.uint8] | DataError) -> Image:
    from PIL import Image

    if isinstance(image, DataError):
        raise image
    if not isinstance(image, np.ndarray):
        return image
    if image.dtype != np.uint8:
        raise ValueError(f"the array is {image.dtype}; give uint8, 0 to 255")
    return Image.fromarray(image)

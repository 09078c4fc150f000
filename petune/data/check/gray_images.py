"""Read every image once: a small gray version for its hash, its size, and a digest of its bytes.

Shapes: N images, S side in pixels.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from petune.base.errors import DataError
from petune.data.band_files import form_of, preview
from petune.data.bands import RGB
from petune.data.check.near_duplicates import SIDE
from petune.data.dataset import Split
from petune.data.images import read_image, upright_rgb
from petune.data.preprocess import GRAY_WEIGHTS
from petune.data.video.clips import frame_column

if TYPE_CHECKING:
    from PIL.Image import Image

CHUNK = 256


@dataclass(frozen=True)
class GrayImages:
    """The images of a split, in its order.

    Attributes:
        gray_NSS: uint8 (N, 32, 32), the whole image whatever its shape; black if it is broken.
        digests: Of the file's bytes, or of the pixels; empty if the image is broken.
        sizes_N2: Width and height in pixels; 0 if they are not known.
        broken: Why an image cannot be decoded, by position.
    """

    gray_NSS: NDArray[np.uint8]
    digests: list[bytes]
    sizes_N2: NDArray[np.int64]
    broken: dict[int, str] = field(default_factory=dict)


def read_files(paths: Sequence[Path]) -> GrayImages:
    """Decode files, one thread per core. A large JPEG is decoded at a fraction of its size, which is faster."""
    images = GrayImages(
        np.zeros((len(paths), SIDE, SIDE), np.uint8), [b""] * len(paths), np.zeros((len(paths), 2), np.int64)
    )

    def read(i: int) -> None:
        try:
            is_rgb = form_of(paths[i]) in {None, RGB}
            images.gray_NSS[i], images.sizes_N2[i] = (
                read_image(paths[i], _gray_and_size) if is_rgb else _gray_and_size(preview(paths[i]))
            )
            images.digests[i] = hashlib.sha256(paths[i].read_bytes()).digest()
        except DataError as error:
            images.broken[i] = str(error)

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with warnings.catch_warnings(), ThreadPoolExecutor(min(cores, 16)) as pool:
        warnings.simplefilter("ignore")  # Pillow warns about odd metadata; what matters about pixels is an error
        for _ in pool.map(read, range(len(paths))):
            pass
    return images


def _gray_and_size(image: Image) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    from PIL import Image

    size = image.size
    image.draft(None, (2 * SIDE, 2 * SIDE))
    upright = upright_rgb(image)
    if (upright.width < upright.height) != (size[0] < size[1]):
        size = size[1], size[0]
    return np.asarray(upright.convert("L").resize((SIDE, SIDE), Image.Resampling.BICUBIC)), size


def read_arrays(split: Split) -> GrayImages:
    """Read the images that a split holds as arrays; images of other than one or three channels by their mean.

    A clip is compared by four of its frames.
    """
    height, width, channels = split.images.shape[-3:]
    size = (width, height) if split.crop == 1 else (0, 0)  # with a margin, these are squares of images of any size
    images = GrayImages(np.zeros((len(split), SIDE, SIDE), np.uint8), [], np.tile(np.array(size), (len(split), 1)))
    weights = np.array(GRAY_WEIGHTS if channels == 3 else [1 / channels] * channels, np.float32)
    chunk = max(1, CHUNK // (split.num_frames or 1))
    for start in range(0, len(split), chunk):
        pixels_NHWC = np.ascontiguousarray(split.images_at(slice(start, start + chunk)))
        images.digests.extend(hashlib.sha256(pixels).digest() for pixels in pixels_NHWC)
        if split.num_frames is not None:
            pixels_NHWC = frame_column(pixels_NHWC)
        gray_NHW = torch.from_numpy(_to_8_bit(pixels_NHWC) @ weights)
        if gray_NHW.shape[1:] != (SIDE, SIDE):
            gray_NHW = F.interpolate(gray_NHW[:, None], (SIDE, SIDE), mode="bicubic", antialias=True)[:, 0]
        images.gray_NSS[start : start + chunk] = gray_NHW.round().clamp(0, 255).byte().numpy()
    return images


def _to_8_bit(pixels_NHWC: NDArray[np.generic]) -> NDArray[np.float32]:
    """Return pixels as float32 in 0..255; numbers of more bits are scaled to the range of each image."""
    pixels = pixels_NHWC.astype(np.float32)
    if pixels_NHWC.dtype == np.uint8:
        return pixels
    low = pixels.min((1, 2, 3), keepdims=True)
    span = pixels.max((1, 2, 3), keepdims=True) - low
    scaled: NDArray[np.float32] = (pixels - low) * (255 / np.maximum(span, 1e-12))
    return scaled

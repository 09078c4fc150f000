"""Decode a JPEG straight to an array: Pillow would decode it to its own memory, and copy that twice.

torchvision and Pillow come with the same library for JPEG, which gives the same pixels. Where a trial finds others,
or torchvision has no decoder (0.29 announces that a later version drops it), Pillow is used. Everything unusual is left
to Pillow too: other modes than RGB, turned and damaged images, and images that are already loaded.
"""

from __future__ import annotations

import io
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

TRIAL_SIZES = ((33, 18), (64, 48))
"""Width and height of the images of the trial: not only whole blocks of 8 or 16 pixels."""
TRIAL_SUBSAMPLING = (0, 1, 2)
END_OF_IMAGE = b"\xff\xd9"


def jpeg_pixels(image: Image) -> NDArray[np.uint8] | None:
    """Return the pixels of a JPEG that was opened and not yet loaded, (H, W, 3), writable.

    Returns:
        None if Pillow has to decode it.
    """
    from PIL import ExifTags

    file = getattr(image, "fp", None)
    if image.format != "JPEG" or image.mode != "RGB" or file is None or not getattr(image, "tile", None):
        return None
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1 or not _is_exact():
        return None
    file.seek(0)
    data = bytearray(file.read())
    try:
        pixels = _decoded(data) if data.endswith(END_OF_IMAGE) else None  # else it may be cut short
    except RuntimeError:  # Pillow reports the damage, or reads the image all the same
        return None
    return pixels if pixels is not None and pixels.shape == (image.height, image.width, 3) else None


def _decoded(data: bytearray) -> NDArray[np.uint8]:
    import torch
    import torchvision.io  # noqa: F401  it registers the function

    as_stored, turn = 0, False
    pixels_CHW = torch.ops.image.decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), as_stored, turn)
    pixels: NDArray[np.uint8] = pixels_CHW.permute(1, 2, 0).numpy()
    return pixels


@cache
def _is_exact() -> bool:
    """Return True if torchvision decodes trial images to the pixels of Pillow."""
    try:
        return all(_agrees(*size, subsampling) for size in TRIAL_SIZES for subsampling in TRIAL_SUBSAMPLING)
    except (ImportError, AttributeError, RuntimeError, OSError):
        return False


def _agrees(width: int, height: int, subsampling: int) -> bool:
    from PIL import Image

    rows, columns = np.arange(height)[:, None], np.arange(width)[None]
    planes = [rows * 7 + columns * 3, rows * columns, (rows ^ columns) * 11]
    buffer = io.BytesIO()
    Image.fromarray(np.stack(planes, -1).astype(np.uint8)).save(buffer, "JPEG", quality=80, subsampling=subsampling)
    expected: Any = np.asarray(Image.open(buffer))
    return bool(np.array_equal(_decoded(bytearray(buffer.getvalue())), expected))

"""Images of any number of channels, as arrays; `petune.data.band_files` reads their files.

Such an image keeps its type (uint8, uint16 or float32) and its channels. Everything that people look at, in one, three
or four channels of a usual format, is read as RGB of 8 bits by `petune.data.images`.

Legend: H height, W width, C channels, S side of a stored image in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from petune.base.errors import DataError
from petune.base.text import plural
from petune.data.squares import center_plane

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class ImageForm:
    """Channels and type of stored images.

    Attributes:
        channels: Number of channels.
        dtype: `uint8`, `uint16` (65535 is white) or `float32`.
    """

    channels: int = 3
    dtype: str = "uint8"

    def __str__(self) -> str:
        return f"{plural(self.channels, 'channel')} of {self.dtype}"


RGB = ImageForm()


def bands_square(image_HWC: NDArray[Any], side: int, form: ImageForm, where: str = "the image") -> NDArray[Any]:
    """Return the center square of an image at `side` pixels, (S, S, C), each channel bicubic with antialiasing.

    Args:
        image_HWC: See `read_bands`.
        side: S.
        form: What it must have.
        where: Which image, for messages.

    Raises:
        DataError: It has other channels or another type, or values that are not finite.
    """
    from PIL import Image

    own = ImageForm(image_HWC.shape[-1], str(image_HWC.dtype))
    if own != form:
        raise DataError(f"{where}: {own}, not {form}")
    if not np.isfinite(image_HWC).all():
        raise DataError(f"{where}: a value is NaN or infinite. Replace it, for example by 0")
    if image_HWC.shape[:2] == (side, side):
        return image_HWC
    out = np.empty((side, side, form.channels), np.float32)
    for channel in range(form.channels):
        plane = Image.fromarray(np.ascontiguousarray(image_HWC[..., channel]).astype(np.float32))
        out[..., channel] = center_plane(plane, side)
    if form.dtype == "float32":
        return out
    return np.rint(out).clip(0, np.iinfo(form.dtype).max).astype(form.dtype)


def as_image(image_HWC: NDArray[Any]) -> Image:
    """Return one or three channels of 8 or 16 bits as an image of Pillow, which is then read as any other."""
    from PIL import Image

    plane = image_HWC[..., 0] if image_HWC.shape[-1] == 1 else image_HWC
    return Image.fromarray(np.ascontiguousarray(plane))


def stored_form(shape: tuple[int, ...], dtype: np.dtype[Any], is_first: bool | None = None) -> ImageForm:
    """Return the form of an array: one or three channels of 8 bits, and gray of 16 bits, are read as RGB images.

    Args:
        shape, dtype: Of the array.
        is_first: See `channels_last`.
    """
    axis = _channel_axis(shape, is_first)
    channels = 1 if axis is None else shape[axis]
    stored = _stored_type(dtype)
    as_rgb = (stored == "uint8" and channels in {1, 3}) or (stored == "uint16" and channels == 1)
    return RGB if as_rgb else ImageForm(channels, stored)


def _stored_type(dtype: np.dtype[Any]) -> str:
    dtype = dtype.newbyteorder("=")
    if dtype == np.bool_ or not (np.issubdtype(dtype, np.number) and not np.issubdtype(dtype, np.complexfloating)):
        raise ValueError(f"an array of {dtype} is no image")
    return str(dtype) if dtype in (np.uint8, np.uint16) else "float32"


def _channel_axis(shape: tuple[int, ...], is_first: bool | None) -> int | None:
    """Return the axis of the channels of (H, W, C) or (C, H, W); None for (H, W)."""
    if len(shape) == 2 and min(shape) > 0:
        return None
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"an array of shape {shape} is no image; images are (H, W), (H, W, C) or (C, H, W)")
    return 0 if (is_channels_first(shape) if is_first is None else is_first) else 2


def is_channels_first(shape: tuple[int, ...]) -> bool:
    """Return True for (C, H, W): the other two axes are equal, or else the first one is smaller than the last."""
    if (shape[0] == shape[1]) != (shape[1] == shape[2]):
        return shape[1] == shape[2]
    return shape[0] < shape[2]


def channels_last(array: NDArray[Any], is_first: bool | None = None) -> NDArray[Any]:
    """Return (H, W), (H, W, C) or (C, H, W) as (H, W, C) of uint8, uint16 or float32.

    Args:
        array: The image.
        is_first: It is (C, H, W) if it has three axes; None takes that from its shape.

    Raises:
        ValueError: The array is no image.
    """
    axis = _channel_axis(array.shape, is_first)
    array = array[..., None] if axis is None else np.moveaxis(array, axis, -1)
    return array.astype(_stored_type(array.dtype), copy=False)

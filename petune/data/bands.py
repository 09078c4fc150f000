"""Images of any number of channels: arrays in NPY and NPZ files, TIFF files with several bands or pages.

Such an image keeps its type (uint8, uint16 or float32) and its channels. Everything that people look at, in one, three
or four channels of a usual format, is read as RGB of 8 bits by `petune.data.images`.

Legend: H height, W width, C channels, S side of a stored image in pixels.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from petune.base.errors import DataError
from petune.base.text import plural

if TYPE_CHECKING:
    from PIL.Image import Image

ARRAY_SUFFIXES = frozenset([".npy", ".npz"])
TIFF_SUFFIXES = frozenset([".tif", ".tiff"])
SAMPLES_PER_PIXEL = 277
PAGE_TYPES = {"L": "uint8", "I;16": "uint16", "I;16B": "uint16", "I;16L": "uint16", "F": "float32", "I": "float32"}
"""Pillow's modes of one channel, and the type that keeps their values."""
MAX_BYTES = 2**31
"""Largest image that is read; a damaged header may ask for more than the memory."""


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


def form_of(path: Path) -> ImageForm:
    """Return channels and type of an image as it will be stored, from the header of its file.

    A file that cannot be read counts as RGB; decoding reports it.
    """
    suffix = path.suffix.lower()
    if suffix not in ARRAY_SUFFIXES | TIFF_SUFFIXES:
        return RGB
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata; decoding warns again
            return _stored_form(*_array_header(path)) if suffix in ARRAY_SUFFIXES else _tiff_form(path)
    except Exception:  # Pillow, numpy and tifffile raise a dozen types
        return RGB


def form_of_all(paths: Sequence[Path]) -> ImageForm:
    """Return the form that all images of a dataset share.

    Raises:
        DataError: Two files differ; the message names them.
    """
    forms: dict[ImageForm, Path] = {}
    for path in paths:
        forms.setdefault(form_of(path), path)
        if len(forms) > 1:
            (first, first_path), (second, second_path) = forms.items()
            raise DataError(
                f"{first_path} has {first}, but {second_path} has {second}. Images of one dataset need the same "
                "channels and the same type"
            )
    return next(iter(forms), RGB)


def read_bands(path: Path) -> NDArray[Any]:
    """Return an image with all its channels, (H, W, C) of uint8, uint16 or float32.

    Raises:
        DataError: The file is broken, or holds no image.
    """
    try:
        array = _read_array(path) if path.suffix.lower() in ARRAY_SUFFIXES else _read_tiff(path)
        return channels_last(array)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except Exception as error:  # Pillow, numpy and tifffile raise a dozen types, and each means a broken file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: not a readable image ({reason})") from None


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
    height, width = image_HWC.shape[:2]
    edge = min(width, height)
    left, top = (width - edge) / 2, (height - edge) / 2
    box = (left, top, left + edge, top + edge)
    if (height, width) == (side, side):
        return image_HWC
    out = np.empty((side, side, form.channels), np.float32)
    for channel in range(form.channels):
        plane = Image.fromarray(np.ascontiguousarray(image_HWC[..., channel]).astype(np.float32))
        out[..., channel] = np.asarray(plane.resize((side, side), Image.Resampling.BICUBIC, box=box))
    if form.dtype == "float32":
        return out
    return np.rint(out).clip(0, np.iinfo(form.dtype).max).astype(form.dtype)


def as_image(image_HWC: NDArray[Any]) -> Image:
    """Return one or three channels of 8 or 16 bits as an image of Pillow, which is then read as any other."""
    from PIL import Image

    plane = image_HWC[..., 0] if image_HWC.shape[-1] == 1 else image_HWC
    return Image.fromarray(np.ascontiguousarray(plane))


def preview(path: Path) -> Image:
    """Return the first channels of an image for people, each stretched from its smallest to its largest value."""
    from PIL import Image

    bands = read_bands(path)
    shown = bands[..., :3] if bands.shape[-1] >= 3 else np.repeat(bands[..., :1], 3, -1)
    shown = shown.astype(np.float64)
    low, high = shown.min((0, 1)), shown.max((0, 1))
    stretched = (shown - low) / np.where(high > low, high - low, 1) * 255
    return Image.fromarray(np.rint(stretched).astype(np.uint8))


def _stored_form(shape: tuple[int, ...], dtype: np.dtype[Any]) -> ImageForm:
    """Return the form of an array: one or three channels of 8 bits, and gray of 16 bits, are read as RGB images."""
    channels = _channel_count(shape)
    stored = _stored_type(dtype)
    as_rgb = (stored == "uint8" and channels in {1, 3}) or (stored == "uint16" and channels == 1)
    return RGB if as_rgb else ImageForm(channels, stored)


def _stored_type(dtype: np.dtype[Any]) -> str:
    dtype = dtype.newbyteorder("=")
    if dtype == np.bool_ or not (np.issubdtype(dtype, np.number) and not np.issubdtype(dtype, np.complexfloating)):
        raise ValueError(f"an array of {dtype} is no image")
    return str(dtype) if dtype in (np.uint8, np.uint16) else "float32"


def _channel_count(shape: tuple[int, ...]) -> int:
    """Return C of (H, W), (H, W, C) or (C, H, W)."""
    if len(shape) == 2 and min(shape) > 0:
        return 1
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"an array of shape {shape} is no image; images are (H, W), (H, W, C) or (C, H, W)")
    return shape[0] if is_channels_first(shape) else shape[2]


def is_channels_first(shape: tuple[int, ...]) -> bool:
    """Return True for (C, H, W): the other two axes are equal, or else the first one is smaller than the last."""
    if (shape[0] == shape[1]) != (shape[1] == shape[2]):
        return shape[1] == shape[2]
    return shape[0] < shape[2]


def channels_last(array: NDArray[Any]) -> NDArray[Any]:
    """Return (H, W), (H, W, C) or (C, H, W) as (H, W, C) of uint8, uint16 or float32.

    Raises:
        ValueError: The array is no image.
    """
    _channel_count(array.shape)  # checks the shape
    if array.ndim == 2:
        array = array[..., None]
    elif is_channels_first(array.shape):
        array = array.transpose(1, 2, 0)
    return array.astype(_stored_type(array.dtype), copy=False)


def _array_header(path: Path) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and type of the array in a file without reading its values, if it is not compressed."""
    if path.suffix.lower() == ".npy":
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        return array.shape, array.dtype
    array = _read_array(path)
    return array.shape, array.dtype


def _read_array(path: Path) -> NDArray[Any]:
    loaded: Any = np.load(path, mmap_mode="r", allow_pickle=False)  # a file that is too short is refused at once
    if isinstance(loaded, np.ndarray):
        return np.array(loaded)
    with loaded:
        names = list(loaded.files)
        name = "image" if "image" in names else names[0] if len(names) == 1 else None
        if name is None:
            raise ValueError(f"it holds the arrays {', '.join(names) or 'none'}; name one of them image")
        array: NDArray[Any] = loaded[name]
        return array


def _tiff_form(path: Path) -> ImageForm:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            pages = _pages(image)
            if pages:
                return ImageForm(pages, PAGE_TYPES[image.mode])
            if image.tag_v2.get(SAMPLES_PER_PIXEL, 1) > len(image.getbands()):  # type: ignore[attr-defined]
                return _scientific_form(path)
            return ImageForm(1, "float32") if image.mode in {"F", "I"} else RGB
    except UnidentifiedImageError:
        return _scientific_form(path)


def _pages(image: Image) -> int:
    """Return the number of pages if they are the bands of one image: one channel each, same size and type; else 0."""
    count = getattr(image, "n_frames", 1)
    if count < 2 or image.mode not in PAGE_TYPES:
        return 0
    first = (image.size, image.mode)
    for number in range(1, count):
        image.seek(number)
        if (image.size, image.mode) != first:
            image.seek(0)
            return 0
    image.seek(0)
    return count


def _read_tiff(path: Path) -> NDArray[Any]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            pages = _pages(image)
            if pages:
                planes = []
                for number in range(pages):
                    image.seek(number)
                    planes.append(np.asarray(image))
                return np.stack(planes, -1)
            if image.tag_v2.get(SAMPLES_PER_PIXEL, 1) <= len(image.getbands()):  # type: ignore[attr-defined]
                return np.asarray(image)
    except UnidentifiedImageError:
        pass
    with _tifffile().TiffFile(path) as file:
        series = file.series[0]
        if series.size * series.dtype.itemsize > MAX_BYTES:
            raise ValueError(f"it is said to be of shape {series.shape}, which is too large")
        return np.asarray(series.asarray())


def _scientific_form(path: Path) -> ImageForm:
    with _tifffile().TiffFile(path) as file:
        series = file.series[0]
        return _stored_form(series.shape, series.dtype)


def _tifffile() -> Any:
    try:
        import tifffile
    except ImportError:
        raise ValueError(
            "a TIFF with such bands needs tifffile; install it with: pip install tifffile, or save the bands as NPY"
        ) from None
    return tifffile

"""Read images of any number of channels: arrays in NPY and NPZ files, TIFF files with several bands or pages.

Legend: H height, W width, C channels.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from petune.base.errors import DataError
from petune.data.bands import RGB, ImageForm, channels_last, is_channels_first, stored_form
from petune.data.image_limit import refuse_bomb

if TYPE_CHECKING:
    from PIL.Image import Image

ARRAY_SUFFIXES = frozenset([".npy", ".npz"])
TIFF_SUFFIXES = frozenset([".tif", ".tiff"])
BITS_PER_SAMPLE, SAMPLES_PER_PIXEL = 258, 277
PAGE_TYPES = {"L": "uint8", "I;16": "uint16", "I;16B": "uint16", "I;16L": "uint16", "F": "float32", "I": "float32"}
"""Pillow's modes of one channel, and the type that keeps their values."""
MAX_BYTES = 2**31
"""Largest image that is read; a damaged header may ask for more than the memory."""


Source = Path | bytes
"""An image: its file, or the bytes of a file."""


def form_of(source: Source) -> ImageForm | None:
    """Return channels and type of an image as it will be stored, from the header of its file.

    None for a file that cannot be read; decoding reports it.

    Raises:
        DataError: The package that reads such files is not installed.
    """
    if not may_have_bands(source):
        return RGB
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata; decoding warns again
            return stored_form(*_array_header(source)) if is_array_file(source) else _tiff_form(source)
    except DataError:
        raise
    except Exception:  # Pillow, numpy and tifffile raise a dozen types
        return None


def is_array_file(source: Source) -> bool:
    """Return True for an NPY or NPZ file: a path by its suffix, bytes by how they begin."""
    if isinstance(source, bytes):
        return source.startswith((b"\x93NUMPY", b"PK\x03\x04"))
    return source.suffix.lower() in ARRAY_SUFFIXES


def may_have_bands(source: Source) -> bool:
    """Return True for an array and a TIFF file: a path by its suffix, bytes by how they begin."""
    if is_array_file(source):
        return True
    if isinstance(source, bytes):
        return source.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"))
    return source.suffix.lower() in TIFF_SUFFIXES


def form_of_all(paths: Sequence[Path]) -> ImageForm:
    """Return the form that all images of a dataset share.

    Raises:
        DataError: Two files differ; the message names them.
    """
    forms: dict[ImageForm, Path] = {}
    for path in paths:
        form = form_of(path)
        if form is not None:
            forms.setdefault(form, path)
        if len(forms) > 1:
            (first, first_path), (second, second_path) = forms.items()
            raise DataError(
                f"{first_path} has {first}, but {second_path} has {second}. Images of one dataset need the same "
                "channels and the same type"
            )
    return next(iter(forms), RGB)


def check_channels_first(source: Source, channels_first: bool) -> None:
    """Check that the shape of an NPY or NPZ file is read in this layout; other and broken files pass.

    Predictions read a file by its shape, too, so training must not read it otherwise.

    Args:
        source: The image.
        channels_first: It is (C, H, W); else (H, W, C).

    Raises:
        DataError: It is read in the other layout.
    """
    if not is_array_file(source):
        return
    try:
        shape = _array_header(source)[0]
    except Exception:  # numpy raises several types; decoding reports the file
        return
    if len(shape) == 3 and is_channels_first(shape) != channels_first:
        layout = "(height, width, channels)" if channels_first else "(channels, height, width)"
        raise DataError(
            f"{source if isinstance(source, Path) else 'an embedded image'}: a file of shape {shape} is read as "
            f"{layout}, and channels_first={str(channels_first).lower()} says otherwise. Put the arrays themselves "
            "into a Parquet table, or leave channels_first out"
        )


def read_bands(source: Source) -> NDArray[Any]:
    """Return an image with all its channels, (H, W, C) of uint8, uint16 or float32.

    Raises:
        DataError: The file is broken, or holds no image.
    """
    where = source if isinstance(source, Path) else "an embedded image"
    if not may_have_bands(source):
        raise DataError(f"{where}: an encoded image of {RGB}, neither an array nor a TIFF file")
    try:
        return channels_last(_read_array(source)) if is_array_file(source) else _read_tiff(source)
    except FileNotFoundError:
        raise DataError(f"{where}: no such file") from None
    except DataError:
        raise
    except Exception as error:  # Pillow, numpy and tifffile raise a dozen types, and each means a broken file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{where}: not a readable image ({reason})") from None


def preview(path: Path) -> Image:
    """Return the first channels of an image for people, each stretched from its smallest to its largest value."""
    from PIL import Image

    bands = read_bands(path)
    shown = bands[..., :3] if bands.shape[-1] >= 3 else np.repeat(bands[..., :1], 3, -1)
    shown = shown.astype(np.float64)
    low, high = shown.min((0, 1)), shown.max((0, 1))
    stretched = (shown - low) / np.where(high > low, high - low, 1) * 255
    return Image.fromarray(np.rint(stretched).astype(np.uint8))


def _opened(source: Source) -> Path | io.BytesIO:
    return io.BytesIO(source) if isinstance(source, bytes) else source


def _array_header(source: Source) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and type of the array in a file without reading its values, if it is an NPY file."""
    if isinstance(source, Path) and source.suffix.lower() == ".npy":
        array = np.load(source, mmap_mode="r", allow_pickle=False)
        return array.shape, array.dtype
    array = _read_array(source)
    return array.shape, array.dtype


def _read_array(source: Source) -> NDArray[Any]:
    mmap_mode = "r" if isinstance(source, Path) else None  # a file that is too short is refused at once
    loaded: Any = np.load(_opened(source), mmap_mode=mmap_mode, allow_pickle=False)  # type: ignore[arg-type]
    if isinstance(loaded, np.ndarray):
        return np.array(loaded)
    with loaded:
        names = list(loaded.files)
        name = "image" if "image" in names else names[0] if len(names) == 1 else None
        if name is None:
            raise ValueError(f"it holds the arrays {', '.join(names) or 'none'}; name one of them image")
        array: NDArray[Any] = loaded[name]
        return array


def _tiff_form(source: Source) -> ImageForm:
    from PIL import Image, UnidentifiedImageError

    _silence_pillow()
    try:
        with Image.open(_opened(source)) as image:
            pages = _pages(image)
            if pages:
                return ImageForm(pages, PAGE_TYPES[image.mode])
            if _loses_values(image):
                return _scientific_form(source)
            return ImageForm(1, "float32") if image.mode in {"F", "I"} else RGB
    except UnidentifiedImageError:
        return _scientific_form(source)


@cache
def _silence_pillow() -> None:
    """Keep Pillow's log about TIFF files that are then read by tifffile from the terminal of people without logging."""
    logging.getLogger("PIL.TiffImagePlugin").addHandler(logging.NullHandler())


def _loses_values(image: Image) -> bool:
    """Return True if Pillow would drop bands of a TIFF, or the lower half of 16-bit colors."""
    tags: Any = image.tag_v2  # type: ignore[attr-defined]
    bits = tags.get(BITS_PER_SAMPLE, (8,))
    num_bits = max(bits) if isinstance(bits, tuple) else bits
    return tags.get(SAMPLES_PER_PIXEL, 1) > len(image.getbands()) or (len(image.getbands()) > 1 and num_bits > 8)


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


def _read_tiff(source: Source) -> NDArray[Any]:
    """Return (H, W, C). The file says where the channels are; where tifffile finds no word of it, the shape does."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(_opened(source)) as image:
            refuse_bomb(image)
            pages = _pages(image)
            if pages:
                planes = []
                for number in range(pages):
                    image.seek(number)
                    planes.append(np.asarray(image))
                return channels_last(np.stack(planes, -1), is_first=False)
            if not _loses_values(image):
                return channels_last(np.asarray(image), is_first=False)
    except UnidentifiedImageError:
        pass
    with _tifffile().TiffFile(_opened(source)) as file:
        series = file.series[0]
        if series.size * series.dtype.itemsize > MAX_BYTES:
            raise ValueError(f"it is said to be of shape {series.shape}, which is too large")
        return channels_last(np.asarray(series.asarray()), _is_channels_first(series))


def _scientific_form(source: Source) -> ImageForm:
    with _tifffile().TiffFile(_opened(source)) as file:
        series = file.series[0]
        return stored_form(series.shape, series.dtype, _is_channels_first(series))


def _is_channels_first(series: Any) -> bool | None:
    """Return whether the file says that its first axis are the channels; None if it says nothing."""
    axes = str(series.axes)
    return axes[0] in "SC" if len(axes) == 3 and {*axes} & {*"SC"} else None


def _tifffile() -> Any:
    try:
        import tifffile
    except ImportError:
        raise DataError(
            "a TIFF with such bands needs tifffile. Install it with: pip install tifffile, or save the bands as NPY"
        ) from None
    return tifffile

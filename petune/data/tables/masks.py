"""Masks: a class for each pixel, from palette or gray images; unknown values and other sizes are refused.

Legend: N masks, S side of a stored mask in pixels.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from petune.base.errors import DataError
from petune.data.image_limit import refuse_bomb
from petune.data.squares import center_mask
from petune.data.tables.contents import ImageColumn, image_size, map_contents
from petune.data.tables.options import ColumnOptions
from petune.data.tables.table import Content, listed
from petune.data.target import Target

if TYPE_CHECKING:
    from PIL.Image import Image

IGNORE = 255
"""Value of ignored pixels in the masks that petune trains on."""
UNKNOWN = -1
NOTHING = -1
"""Instead of the range of a mask whose pixels are all ignored."""


@dataclass(frozen=True)
class MaskCodes:
    """The class of each value in a mask file.

    Attributes:
        class_256: int16 (256,): class, `IGNORE` or `UNKNOWN`.
        names: Class names; None if they are found, as the values.
        first_class: See `ColumnOptions`.
    """

    class_256: NDArray[np.int16]
    names: tuple[str, ...] | None
    first_class: int

    @classmethod
    def of(cls, options: ColumnOptions) -> MaskCodes:
        """Return the codes that the options describe."""
        codes = np.full(256, UNKNOWN, np.int16)
        if options.classes is None:
            names, values = None, list(range(options.first_class, 255))
        elif isinstance(options.classes, Mapping):
            names, values = tuple(options.classes.values()), list(options.classes)
        else:
            names = tuple(options.classes)
            values = list(range(options.first_class, options.first_class + len(names)))
        if len(values) > IGNORE or not all(0 <= value <= 255 for value in values):
            raise DataError("classes names more values than 8-bit masks have. Values are from 0 to 254")
        if options.ignore is not None:
            codes[options.ignore] = IGNORE
        codes[values] = np.arange(len(values))
        if options.ignore is not None and not isinstance(options.classes, Mapping):
            codes[options.ignore] = IGNORE
        return cls(codes, names, options.first_class)

    def found_names(self, ranges: NDArray[np.int64], title: str) -> tuple[str, ...]:
        """Return the class names; found ones are the values from the first class to the largest that occurs.

        Args:
            ranges: int64 (N,), see `decode_masks`.
            title: The table, for messages.

        Raises:
            DataError: The values do not look like classes.
        """
        if self.names is not None:
            return self.names
        counted = ranges[ranges != NOTHING]
        smallest, largest = (int((counted >> 8).min()), int((counted & 255).max())) if len(counted) else (0, 0)
        if smallest > 0:
            raise DataError(
                f"{title}: the masks have no pixel of value {self.first_class}; the smallest is "
                f"{smallest + self.first_class}. If classes start there, as in Oxford's trimaps, use "
                f"first_class={smallest + self.first_class}; else name them all with classes=[…]"
            )
        if largest == 0:
            raise DataError(
                f"{title}: the masks have one class only, of value {self.first_class}. If 255 is a class and not "
                "ignored, use classes={0: background, 255: object}"
            )
        return tuple(str(value + self.first_class) for value in range(largest + 1))


def decode_masks(
    masks: ImageColumn, images: ImageColumn, codes: MaskCodes, out: NDArray[np.uint8] | None
) -> tuple[NDArray[np.int64], dict[int, str]]:
    """Decode masks to classes and cut their center squares, as of the images; nearest pixel, so classes never mix.

    Args:
        masks: N masks.
        images: Their images, which have the same sizes.
        codes: See `MaskCodes`.
        out: uint8 (N, S, S), filled here; None to look at the values only.

    Returns:
        Smallest class · 256 + largest class of each mask, int64 (N,), and a message for each unreadable mask.

    Raises:
        DataError: A mask has an unknown value, or another size than its image.
    """
    ranges = np.full(len(masks.table), NOTHING, np.int64)
    broken: dict[int, str] = {}
    wrong: dict[int, str] = {}
    sizes = (size for part in map_contents(images, _size_or_none) for size in part[2]) if out is not None else None

    def decode(row: int, content: Content) -> NDArray[np.uint8] | None:
        name = masks.row_name(row, content)
        try:
            values = _values(content)
        except DataError as error:
            wrong[row] = f"{name} {error}"
            return None
        except Exception as error:  # Pillow raises a dozen types, and each means that this mask is broken
            broken[row] = f"{name}: not a readable mask ({' '.join(str(error).split()) or type(error).__name__})"
            return None
        unknown = np.unique(values)[codes.class_256[np.unique(values)] == UNKNOWN].tolist()
        if unknown:
            wrong[row] = f"{name} has {_unknown_message(unknown, codes)}"
            return None
        classes = codes.class_256[values].astype(np.uint8)
        counted = classes[classes != IGNORE]
        if counted.size:
            ranges[row] = int(counted.min()) * 256 + int(counted.max())
        return classes

    for start, contents, results in map_contents(masks, decode):
        if wrong:
            raise DataError(wrong[min(wrong)])
        for i, classes in enumerate(results):
            size = next(sizes) if sizes is not None else None
            if classes is None or out is None:
                continue
            if size is not None and classes.shape[::-1] != size:
                name = masks.row_name(start + i, contents[i])
                raise DataError(
                    f"{name} is {classes.shape[1]}x{classes.shape[0]}, but its image is {size[0]}x{size[1]}. A mask "
                    "needs the size of its image"
                )
            out[start + i] = center_mask(classes, out.shape[1])
    return ranges, broken


def mask_target(masks: ImageColumn, codes: MaskCodes) -> Target:
    """Return the classes of masks; they are decoded if their names are not given."""
    names = codes.names
    if names is None:
        ranges, _ = decode_masks(masks, masks, codes, None)
        names = codes.found_names(ranges, masks.table.title)
    return Target("mask", names, IGNORE)


def is_mask(content: Content) -> bool:
    """Return True if a mask can be decoded."""
    try:
        _values(content)
    except Exception:  # Pillow raises a dozen types
        return False
    return True


def _size_or_none(_row: int, content: Content) -> tuple[int, int] | None:
    try:
        return image_size(content)
    except Exception:  # a broken image, which decoding reports
        return None


def _values(content: Content) -> NDArray[np.uint8]:
    """Return the values of a mask, uint8 (H, W); of a palette image the indices."""
    from PIL import Image, ImageOps

    if isinstance(content, np.ndarray):
        values = content
    else:
        with Image.open(content if isinstance(content, Path) else io.BytesIO(content)) as image:
            refuse_bomb(image)
            if image.format == "JPEG":
                raise DataError("is a JPEG, which changes the values of masks. Save masks as PNG")
            if image.mode not in {"1", "L", "P", "I", "I;16"}:
                raise DataError(f"has mode {image.mode}. A mask is a palette or gray image with a class a pixel")
            largest = _largest_level(image)
            values = np.asarray(ImageOps.exif_transpose(image))
            if largest is not None:
                values = np.rint(values * (largest / (255 if image.mode == "L" else 65535))).astype(np.int64)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.ndim != 2 or values.dtype.kind not in "biu":
        raise DataError(f"has shape {values.shape} and type {values.dtype}. A mask is (height, width), of integers")
    if values.size and (values.min() < 0 or values.max() > 255):
        raise DataError(f"has values from {values.min()} to {values.max()}. Masks have classes from 0 to 254")
    return values.astype(np.uint8)


def _largest_level(image: Image) -> int | None:
    """Return the value of white in the file, if Pillow stretches its values to 8 or 16 bits; else None."""
    tiles = getattr(image, "tile", None)  # what Pillow's decoder will get
    arguments = tiles[0][3] if tiles else None
    if image.format == "PPM":
        return int(arguments[1]) if isinstance(arguments, tuple) else None
    rawmode = str(arguments[0] if isinstance(arguments, tuple) else arguments)
    return next((2**bits - 1 for bits in (2, 4) if rawmode.startswith(f"L;{bits}")), None)


def _unknown_message(unknown: list[int], codes: MaskCodes) -> str:
    known = np.flatnonzero((codes.class_256 != UNKNOWN) & (codes.class_256 != IGNORE)).tolist()
    values = listed([str(value) for value in unknown], 5)
    is_one = len(unknown) == 1
    text = f"the {'value' if is_one else 'values'} {values}, which {'is' if is_one else 'are'} no class"
    if codes.names is not None:
        text += f": classes names {len(known)} values, {known[0]} to {known[-1]}"
        if codes.first_class == 0 and unknown == [len(known)]:
            text += ". If classes start at 1, use first_class=1"
    else:
        text += f": classes start at {codes.first_class}"
    return f"{text}. A value that does not count is ignore=VALUE"
